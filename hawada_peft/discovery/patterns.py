"""Rows put in patterns: which segments of units a dimension is made of, also at another size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .anatomy import Segment


@dataclass(frozen=True)
class Pattern:
    """
    A dimension as segments, repeated for each group; see `Rows`.

    Args:
        segments: in their order.
        groups: how often.
    """

    segments: tuple[Segment, ...]
    groups: int = 1

    @property
    def per_unit(self) -> int:
        """Rows of a unit."""
        return sum(segment.width for segment in self.segments if segment.units)

    @property
    def fixed(self) -> int:
        """Rows that always stay."""
        return self.groups * sum(segment.width for segment in self.segments if not segment.units)

    def resized(self, units: int, groups: int, per_unit: int, fixed: int) -> Pattern | None:
        """
        The pattern of a dimension of other sizes, whose segments are in the same proportions.

        Args:
            units: in all.
            groups: how often the segments repeat.
            per_unit: rows of a unit.
            fixed: rows that always stay.

        Returns:
            None if that does not come out in whole rows.
        """
        segments = []
        for segment in self.segments:
            of, to, parts = (self.per_unit, per_unit, 1) if segment.units else (self.fixed, fixed, groups)
            width, rest = divmod(segment.width * to * (1 if segment.units else self.groups), of * parts)
            if rest or width < 1 or units % groups:
                return None
            segments.append(Segment(width, units // groups if segment.units else 0))
        made = Pattern(tuple(segments), groups)
        return made if (made.per_unit, made.fixed) == (per_unit, fixed) else None


def pattern_of(rows: Sequence[int], units: int) -> Pattern | None:
    """The pattern with the fewest groups of a dimension's rows, given the unit of each; None if it has none."""
    for groups in range(1, units + 1):
        if len(rows) % groups or units % groups:
            continue
        per_group, size = units // groups, len(rows) // groups
        first = list(rows[:size])
        segments = list(_segments(first, per_group))
        if not segments or sum(segment.rows for segment in segments) != size:
            continue
        again = [unit if unit < 0 else unit + group * per_group for group in range(groups) for unit in first]
        if again == list(rows):
            return Pattern(tuple(segments), groups)
    return None


def _segments(rows: Sequence[int], units: int) -> Iterator[Segment]:
    """Segments from the front, as far as they go."""
    at = 0
    while at < len(rows):
        width = _run(rows, at)
        if rows[at] < 0:
            yield Segment(width)
            at += width
            continue
        wanted = [unit for unit in range(units) for _ in range(width)]
        if list(rows[at : at + len(wanted)]) != wanted:
            return
        yield Segment(width, units)
        at += len(wanted)


def _run(rows: Sequence[int], at: int) -> int:
    """How many rows from one on are of the same unit."""
    end = at
    while end < len(rows) and rows[end] == rows[at]:
        end += 1
    return end - at
