"""Quality by stage, as a picture and a section: cut, refitted, recovered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .drawing import COLOURS, Picture, legend, picture_of, wide_scale
from .known import AGREEMENT, SlimFacts
from .parts import Part, figure, number, table, text

CUT, REFITTED, RECOVERED = "cut", "refitted", "recovered"
STAGES = (CUT, REFITTED, RECOVERED)
SERIES = (("first", "o-"), ("second", "D-"), ("third", "s-"), ("muted", "^-"))
"""Colour and style of what was measured on the same data."""


@dataclass(frozen=True)
class Stage:
    """
    A loss on the way from the dense model, which has none, to the slim one.

    Args:
        stage (`str`): one of `STAGES`.
        loss (`float`): divergence from the dense model.
        data (`str`): on what. Losses compare only on the same.
        by (`str`): who measured it.
    """

    stage: str
    loss: float
    data: str
    by: str


def stages_of(facts: SlimFacts) -> list[Stage]:
    """All that is known, in the order of the stages."""
    report, found = facts.report, []
    refit, losses, race = report.get("reconstruction") or {}, report.get("losses") or {}, facts.race
    if {"before", "after"} <= set(refit):
        data = "the refit's held-out batches"
        found.append(Stage(CUT, refit["before"], data, "the refit"))
        found.append(Stage(REFITTED, refit["after"], data, "the refit"))
    if {"recovery_start", "recovery_end"} <= set(losses):
        start = REFITTED if refit.get("applied") else CUT
        data = "the recovery's held-out examples"
        found.append(Stage(start, losses["recovery_start"], data, "the recovery, at its start"))
        found.append(Stage(RECOVERED, losses["recovery_end"], data, "the recovery, at its end"))
    elif "gates" in losses:
        found.append(Stage(CUT, losses["gates"], "held-out examples", "the gates' training, under the plan"))
    if race is not None:
        won = next(each for each in race["entrants"] if each["key"] == race["winner"])
        runs = [run for run in race["runs"] if run["entrant"] == race["winner"] and run["loss"] is not None]
        data = "the race's held-out batches"
        if won["start"] is not None:
            found.append(Stage(CUT, won["start"], data, "the race"))
        if runs:
            last = max(runs, key=lambda run: run["rung"])
            found.append(Stage(RECOVERED, last["loss"], data, f"the race, {last['steps']} steps in its last rung"))
    return sorted(found, key=lambda each: STAGES.index(each.stage))


def stages_picture(facts: SlimFacts) -> Picture | None:
    """A line for each set of data, from cut to recovered."""
    found = stages_of(facts)
    lines: dict[str, list[Stage]] = {}
    for each in found:
        lines.setdefault(each.data, []).append(each)
    if not any(len(line) > 1 for line in lines.values()):
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for (data, line), (colour, style) in zip(lines.items(), SERIES, strict=False):
            places = [STAGES.index(each.stage) for each in line]
            values = [each.loss for each in line]
            axes.plot(places, values, style, color=COLOURS[colour], markersize=7, label=data)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.3g}", (place, value), (7, 4), textcoords="offset points", fontsize=9,
                    color=COLOURS["ink"],
                )  # fmt: skip
        wide_scale(axes, [each.loss for each in found])
        axes.margins(x=0.15, y=0.2)
        axes.set_xticks(range(len(STAGES)), STAGES)
        axes.set_ylabel("loss; the dense model's is 0")
        legend(figure, axes, columns=1)

    said = "; ".join(f"{each.stage} {each.loss:.4g} on {each.data}" for each in found)
    return picture_of("stages", f"Loss by stage: {said}.", draw, 3.9)


def stages_section(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """What each step lost and won back."""
    found = stages_of(facts)
    if not found:
        return
    yield text(
        "Loss: divergence from the dense model, which itself has 0. It compares along one line, on the same data, "
        "and not across lines."
    )
    if "stages" in pictures:
        yield figure(pictures["stages"], pictures["stages"].text)
    yield table(
        "Losses on the way, and in the end what was measured of both models.",
        ("stage", "loss", "on", "measured by"),
        ((each.stage, number(each.loss), each.data, each.by) for each in found),
    )
    for change in facts.qualities:
        if change["name"] != AGREEMENT:
            yield text(
                f"In the end, {change['name']}: dense {change['dense']:.4g}, slim {change['slim']:.4g}, on "
                f"{change['data']}."
            )
