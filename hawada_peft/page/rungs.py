"""The race that chose the plan, as a section and a bracket: who ran, who left when, at what loss and latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .drawing import COLOURS, WIDTH, Picture, picture_of
from .known import SlimFacts
from .parts import Part, figure, number, table, text


def losses_of(race: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """By entrant the rungs that it ran, from 1, and its losses after them; failed runs left out."""
    found: dict[str, list[tuple[int, float]]] = {entrant["key"]: [] for entrant in race["entrants"]}
    for run in race["runs"]:
        if run["loss"] is not None:
            found[run["entrant"]].append((run["rung"] + 1, float(run["loss"])))
    return found


def standing_of(race: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entrants, the longest in the race first; those of a rung by their losses, those beside the budget last."""
    losses = losses_of(race)

    def place(entrant: Mapping[str, Any]) -> tuple[bool, bool, int, float]:
        points = losses[entrant["key"]]
        last, loss = points[-1] if points else (0, 0.0)
        return entrant["neighbour"], entrant["key"] != race["winner"], -last, loss

    return sorted(race["entrants"], key=place)


def end_of(race: Mapping[str, Any], entrant: Mapping[str, Any]) -> str:
    """How the race ended for an entrant."""
    if entrant["neighbour"]:
        return "beside the budget"
    if entrant["key"] == race["winner"]:
        return "won"
    losses = losses_of(race)
    points = losses[entrant["key"]]
    if not points:
        return "failed" if any(run["entrant"] == entrant["key"] for run in race["runs"]) else "did not run"
    rung, loss = points[-1]
    beside = {each["key"] for each in race["entrants"] if each["neighbour"]}
    others = [dict(line)[rung] for key, line in losses.items() if key not in beside and rung in dict(line)]
    return f"left after rung {rung}, {1 + sum(other < loss for other in others)} of {len(others)}"


def race_picture(facts: SlimFacts) -> Picture | None:
    """The race as a bracket: a line for each entrant, as long as it ran, with its losses."""
    race = facts.race
    if race is None or not race["runs"]:
        return None
    losses, entrants = losses_of(race), [each for each in standing_of(race) if losses_of(race)[each["key"]]]
    labels = [_label(each) for each in entrants]
    size = min(9.0, 72 * WIDTH / (0.6 * max(map(len, labels))))  # the longest is as wide as the picture

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row, (entrant, label) in enumerate(zip(entrants, labels, strict=True)):
            won, points = entrant["key"] == race["winner"], losses[entrant["key"]]
            colour = COLOURS["second" if won else "muted" if entrant["neighbour"] else "first"]
            last = points[-1][0]
            places = list(range(last + 1)) if entrant["start"] is not None else [rung for rung, _ in points]
            axes.plot(places, [row] * len(places), color=colour, linewidth=2.5 if won else 1.2, zorder=1)
            marked = ([(0, entrant["start"])] if entrant["start"] is not None else []) + points
            axes.plot([rung for rung, _ in marked], [row] * len(marked), "o", color=colour, markersize=5)
            for rung, loss in marked:
                axes.annotate(
                    f"{loss:.3g}", (rung, row), (0, -12), textcoords="offset points", ha="center", fontsize=8,
                    color=COLOURS["ink"],
                )  # fmt: skip
            end = {"won": "won", "beside the budget": "beside"}.get(end_of(race, entrant), "out")
            axes.annotate(
                end, (last, row), (8, 0), textcoords="offset points", va="center", fontsize=8, color=COLOURS["ink"]
            )
            axes.annotate(
                label, (0, row), (-6, 8), textcoords="offset points", fontsize=size, color=COLOURS["ink"],
                fontweight="bold" if won else "normal", annotation_clip=False,
            )  # fmt: skip
        rungs = len(race["lengths"])
        axes.set_xlim(-0.15, rungs + 0.45)
        axes.set_ylim(len(entrants) - 0.4, -0.8)
        axes.set_yticks([])
        axes.set_xticks(range(rungs + 1), ["cut", *(f"{steps} steps" for steps in race["lengths"])])
        axes.spines["left"].set_visible(False)

    last = {label: losses[each["key"]][-1] for label, each in zip(labels, entrants, strict=True)}
    ended = "; ".join(f"{label}: {loss:.4g} after rung {rung}" for label, (rung, loss) in last.items())
    return picture_of("race", f"The race, the longest in it first. {ended}.", draw, 0.8 + 0.46 * len(entrants))


def _label(entrant: Mapping[str, Any]) -> str:
    return entrant["name"] + ("" if entrant["ms"] is None else f" ({entrant['ms']:.4g} ms)")


def race_section(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Who ran."""
    race = facts.race
    if race is None:
        return
    losses, timed = losses_of(race), race["dense_ms"] is not None
    able = [entrant for entrant in race["entrants"] if not entrant["neighbour"]]
    yield text(
        f"{len(able)} ways to meet the budget were recovered for a few steps each, on the same batches; the better "
        f"half went on, in rungs of {', '.join(map(str, race['lengths']))} steps. All of it cost {race['cost']:.0f} "
        "steps of the recovery."
    )
    if "race" in pictures:
        measure = "KL in nats per prediction, or the mean squared difference of outputs that are no distribution."
        note = f"Below the points: how far from the dense model on held-out calibration batches. {measure}"
        yield figure(pictures["race"], f"{note} In brackets: measured latency." if timed else note)
    last = len(race["lengths"])

    ordered = standing_of(race)
    rows = []
    for entrant in ordered:
        points = dict(losses[entrant["key"]])
        rows.append(
            (
                entrant["name"],
                entrant["source"],
                *([number(entrant["ms"])] if timed else []),
                number(entrant["start"]),
                *(number(points.get(rung)) for rung in range(1, last + 1)),
                end_of(race, entrant),
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
