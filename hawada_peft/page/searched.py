"""The section of the page about a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    columns = [word for word, _ in _shape(points[0])]
    yield table(
        f"Shapes that were timed, the fastest first. Loss: {search['loss']}.",
        (
            *columns,
            "ms expected",
            "measured",
            "loss expected",
            *(["measured"] if evaluated else []),
            "parameters",
            "why not",
        ),
        (_candidate(point, evaluated) for point in ordered),
        chosen=_chosen(ordered),
    )
    others = [point for point in points if point["measured_ms"] is None]
    if others:
        yield folded(
            f"{len(others)} more shapes on the frontier, by their estimates",
            table(
                "Shapes that were estimated only, slowest first.",
                (*columns, "ms", "loss", "parameters", "why not"),
                (
                    (
                        *(size for _, size in _shape(point)),
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


def _candidate(point: Mapping[str, Any], evaluated: bool) -> tuple[Any, ...]:
    loss = point["predicted_loss"] if point["expected_loss"] is None else point["expected_loss"]
    return (
        *(size for _, size in _shape(point)),
        number(point["expected_ms"]),
        number(point["measured_ms"]),
        number(loss),
        *([number(point["measured_loss"])] if evaluated else []),
        number(point["parameters"], ","),
        point["rejected"] or "chosen",
    )


def _chosen(points: list[Mapping[str, Any]]) -> int | None:
    return next((place for place, point in enumerate(points) if point["rejected"] is None), None)


def _shape(point: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sizes of a point, each with the head of its column; those of further towers after them."""
    towers = {"": point["shape"], **point.get(BESIDE, {})}
    return [
        (f"{SHORT[name]} of {tower}" if tower else SHORT[name], number(shape[name], ","))
        for tower, shape in towers.items()
        for name in SIZES
        if name in shape
    ]
