"""The section of the page about a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..planning.cut import BESIDE, SHORT, SIZES
from .drawing import Picture
from .known import SlimFacts
from .parts import Part, figure, folded, number, table, text


def frontier(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """The shapes that the search looked at."""
    search = facts.search
    if search is None:
        return
    points = search["points"]
    timed = [point for point in points if point["measured_ms"] is not None]
    yield text(
        f"{search['shapes']:,} shapes were estimated and scored, {len(timed)} of them built with random weights and "
        f"timed beside the dense model, in {search['rounds']} rounds."
    )
    if "frontier" in pictures:
        yield figure(pictures["frontier"], f"{pictures['frontier'].text} Loss: {search['loss']}.")
    ordered = sorted(timed, key=lambda point: float(point["measured_ms"]))
    evaluated = any(point["measured_loss"] is not None for point in points)
    columns = _columns(points)
    yield table(
        f"Shapes that were timed, the fastest first. Loss: {search['loss']}.",
        (
            *_head(columns),
            "ms expected",
            "measured",
            "loss expected",
            *(["measured"] if evaluated else []),
            "parameters",
            "why not",
        ),
        (_candidate(point, columns, evaluated) for point in ordered),
        chosen=_chosen(ordered),
    )
    others = [point for point in points if point["measured_ms"] is None]
    if others:
        yield folded(
            f"{len(others)} more shapes on the frontier, by their estimates",
            table(
                "Shapes that were estimated only, slowest first.",
                (*_head(columns), "ms", "loss", "parameters", "why not"),
                (
                    (
                        *_sizes(point, columns),
                        number(point["estimate_ms"]),
                        number(point["predicted_loss"]),
                        number(point["parameters"], ","),
                        point["rejected"] or "chosen",
                    )
                    for point in others
                ),
            ),
        )


def milliseconds(facts: SlimFacts, pictures: Mapping[str, Picture]) -> Iterator[Part]:
    """Where they go, dense and slim: why this was cut and not that."""
    parts = (facts.search or {}).get("parts")
    if not parts:
        return
    if "milliseconds" in pictures:
        yield figure(pictures["milliseconds"], pictures["milliseconds"].text)
    yield table(
        "By the latency table of the search, which was measured on this device.",
        ("part", "dense, ms", "slim, ms", "slim / dense"),
        (
            (name, number(ms), number(parts["slim"][name]), number(parts["slim"][name] / ms if ms else None, ".0%"))
            for name, ms in parts["dense"].items()
        ),
    )


def _candidate(point: Mapping[str, Any], columns: Sequence[tuple[str, str]], evaluated: bool) -> tuple[Any, ...]:
    loss = point["predicted_loss"] if point["expected_loss"] is None else point["expected_loss"]
    return (
        *_sizes(point, columns),
        number(point["expected_ms"]),
        number(point["measured_ms"]),
        number(loss),
        *([number(point["measured_loss"])] if evaluated else []),
        number(point["parameters"], ","),
        point["rejected"] or "chosen",
    )


def _chosen(points: list[Mapping[str, Any]]) -> int | None:
    return next((place for place, point in enumerate(points) if point["rejected"] is None), None)


def _columns(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The towers and sizes that points speak of: some leave out those of the dense model."""
    towers = dict.fromkeys(tower for point in points for tower in _towers(point))
    return [
        (tower, name)
        for tower in towers
        for name in SIZES
        if any(name in _towers(point).get(tower, {}) for point in points)
    ]


def _towers(point: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"": point["shape"], **point.get(BESIDE, {})}


def _head(columns: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{SHORT[name]} of {tower}" if tower else SHORT[name] for tower, name in columns]


def _sizes(point: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """The sizes of a point, those of further towers last; what it leaves out is as in the dense model."""
    found = [_towers(point).get(tower, {}).get(name) for tower, name in columns]
    return ["dense" if size is None else number(size, ",") for size in found]
