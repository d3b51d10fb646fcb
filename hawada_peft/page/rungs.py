"""The race that chose the plan, as a section and a picture: who ran, who left when, at what loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .drawing import COLOURS, Picture, legend, picture_of
from .known import SlimFacts
from .parts import Part, figure, number, table, text


def losses_of(race: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """By entrant the rungs that it ran, from 1, and its losses after them; failed runs left out."""
    found: dict[str, list[tuple[int, float]]] = {entrant["key"]: [] for entrant in race["entrants"]}
    for run in race["runs"]:
        if run["loss"] is not None:
            found[run["entrant"]].append((run["rung"] + 1, float(run["loss"])))
    return found


def race_picture(facts: SlimFacts) -> Picture | None:
    """Each entrant's loss, rung by rung, until it left."""
    race = facts.race
    if race is None or not race["runs"]:
        return None
    losses, names = losses_of(race), {entrant["key"]: entrant["name"] for entrant in race["entrants"]}
    beside = {entrant["key"] for entrant in race["entrants"] if entrant["neighbour"]}
    others = [points for key, points in losses.items() if points and key not in beside and key != race["winner"]]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, points in enumerate(others):
            label = "left the race" if place == 0 else None
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["first"], markersize=5, linewidth=1, label=label)
        for place, key in enumerate(key for key in beside if losses[key]):
            label = "beside the budget" if place == 0 else None
            axes.plot(*zip(*losses[key], strict=True), "^", color=COLOURS["muted"], markersize=6, label=label)
        won = losses.get(race["winner"], [])
        if won:
            axes.plot(*zip(*won, strict=True), "D-", color=COLOURS["second"], markersize=7, linewidth=2, label="won")
        axes.set_xticks(range(1, len(race["lengths"]) + 1), [f"{steps} steps" for steps in race["lengths"]])
        axes.set_xlabel("rung of the race")
        axes.set_ylabel("held-out loss")
        legend(figure, axes)

    last = {names[key]: points[-1] for key, points in losses.items() if points}
    ended = "; ".join(f"{name}: {loss:.4g} after rung {rung}" for name, (rung, loss) in last.items())
    return picture_of("race", f"Losses after the rungs of the race. {ended}.", draw, 3.9)


def race_section(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Who ran."""
    race = facts.race
    if race is None:
        return
    losses = losses_of(race)
    able = [entrant for entrant in race["entrants"] if not entrant["neighbour"]]
    yield text(
        f"{len(able)} ways to meet the budget were recovered for a few steps each, on the same batches; the better "
        f"half went on, in rungs of {', '.join(map(str, race['lengths']))} steps. All of it cost {race['cost']:.0f} "
        "steps of the recovery."
    )
    if "race" in pictures:
        measure = "KL in nats per prediction, or the mean squared difference of outputs that are no distribution."
        yield figure(pictures["race"], f"How far from the dense model on held-out calibration batches: {measure}")
    timed = race["dense_ms"] is not None
    last = len(race["lengths"])

    def standing(entrant: Mapping[str, Any]) -> tuple[int, float]:
        points = losses[entrant["key"]]
        return (-points[-1][0], points[-1][1]) if points else (0, 0.0)

    ordered = sorted(able, key=standing) + [each for each in race["entrants"] if each["neighbour"]]
    rows = []
    for entrant in ordered:
        points = dict(losses[entrant["key"]])
        end = "beside the budget" if entrant["neighbour"] else "won" if entrant["key"] == race["winner"] else "left"
        rows.append(
            (
                entrant["name"],
                entrant["source"],
                *([number(entrant["ms"])] if timed else []),
                number(entrant["start"]),
                *(number(points.get(rung)) for rung in range(1, last + 1)),
                end if points else "did not run",
            )
        )
    yield table(
        "The entrants, the longest in the race first. Loss: cut and untrained, then after each rung.",
        (
            "what goes",
            "source",
            *(["ms"] if timed else []),
            "cut",
            *(f"{steps} steps" for steps in race["lengths"]),
            "",
        ),
        rows,
        chosen=next((place for place, each in enumerate(ordered) if each["key"] == race["winner"]), None),
    )
