"""An axis while it is looked for: rows by their names in one model, before they are put in patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..anatomy import OTHER, Number
from .builds import Dim, Moves
from .closing import Closed
from .config_tree import Path, dotted, parsed

Kept = Mapping[Dim, list[int]]
"""The units that stay at each place."""


@dataclass
class Found:
    """
    An axis of one model.

    Args:
        numbers: the config's numbers that set it, with what they are now.
        units: how many there are, at the widest place.
        places: the unit of every row at each place where units are closed.
        rows: the unit of every row of each dimension that gets smaller; -1: it stays.
        counts: units at each place.
        kind: as in `Axis`.
        written: config values to write beside a smaller size.
        norms: norms whose statistics are those of what stays: the module's name to its scale's.
        vectors: names of vectors with an entry that stands for each unit, which a closed one must not win by.
        groups: units come in so many groups of equally many; 0: in none.
        tied: the same units stay at every place.
        alike: of each place what it is called in every layer, where the same units stay in all layers; empty: others.
        partner: heads that go with channels of the residual stream, in proportion.
        sizes: numbers of units that the class builds as asked, below all.
    """

    numbers: dict[Path, int | float]
    units: int
    places: dict[Dim, list[int]]
    rows: dict[Dim, list[int]]
    counts: dict[Dim, int]
    kind: str = OTHER
    written: dict[Path, Any] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    groups: int = 0
    tied: bool = False
    alike: dict[Dim, str] = field(default_factory=dict)
    partner: Found | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The path of the first number."""
        return dotted(next(iter(self.numbers)))

    @property
    def label(self) -> str:
        """The paths of all numbers."""
        return "+".join(dotted(path) for path in self.numbers)

    def changes(self, units: int) -> dict[Path, Any]:
        """Values of the config with so many units left."""
        return changes_of(self.numbers, units, self.units) | self.written

    def left_at(self, place: Dim, units: int) -> int | None:
        """Units that stay at a place; None if that is no whole number of at least one."""
        left, rest = divmod(units * self.counts[place], self.units)
        return None if rest or left < 1 else left

    def grouped(self, other: Found) -> bool:
        """Whether its units are the groups of another axis."""
        return self is not other and self.units == other.groups and self.places.keys() == other.places.keys()

    def everything(self) -> dict[Dim, list[int]]:
        """The rows of the axis and of the partner."""
        return self.rows | (self.partner.rows if self.partner else {})

    def close(self, closed: Closed, kept: Kept) -> None:
        """Add to what is closed all units that do not stay."""
        for (name, dim), rows in self.places.items():
            stay = set(kept[name, dim])
            if self.kind == "experts":
                closed.logits[name] = [unit for unit in range(self.counts[name, dim]) if unit not in stay]
            else:
                closed.zero.append(((name, dim), [row for row, unit in enumerate(rows) if _goes(unit, stay)]))
        for name in self.vectors:
            stay = set(kept[nearest(name, kept)])
            closed.vectors[name] = [row for row, unit in enumerate(self.rows[name, 0]) if _goes(unit, stay)]
        closed.norms |= {name: self.staying((scale, 0), kept) for name, scale in self.norms.items()}

    def staying(self, dim: Dim, kept: Kept) -> list[int]:
        """The rows of a dimension that stay."""
        stay = set(kept[nearest(dim[0], kept)])
        return [row for row, unit in enumerate(self.rows[dim]) if not _goes(unit, stay)]


def _goes(unit: int, stay: set[int]) -> bool:
    return unit >= 0 and unit not in stay


def changes_of(numbers: Mapping[Path, int | float], units: int, of: int) -> dict[Path, Any]:
    """The numbers' values with some of the units left."""
    made = {path: Number(dotted(path), value) for path, value in numbers.items()}
    return {parsed(number.field): number.at(units, of) for path, number in made.items()}


def nearest(name: str, places: Iterable[Dim]) -> Dim:
    """Of some places the one whose name has most in common with a parameter's, from the front."""
    parts = name.split(".")

    def common(place: Dim) -> int:
        other = place[0].split(".")
        return next((i for i, (a, b) in enumerate(zip(parts, other, strict=False)) if a != b), len(parts))

    return max(places, key=common)


def misfits(found: Mapping[Dim, list[Any]], moves: Moves, sizes: Mapping[Dim, tuple[int, int]]) -> list[Dim]:
    """
    The moved dimensions whose rows do not fall to units so that fewer units give the new size.

    Args:
        found: the unit of every row; what is not known is no int.
        moves: the dimensions.
        sizes: units at each place: all, and those of the new size.
    """
    bad = []
    for dim, (_, new) in moves.items():
        rows = found.get(dim)
        if rows is None or any(not isinstance(row, int) for row in rows):
            bad.append(dim)
            continue
        units, left = sizes[dim] if dim in sizes else sizes[nearest(dim[0], sizes)]
        per_unit: dict[int, int] = {}
        for row in rows:
            per_unit[row] = per_unit.get(row, 0) + 1
        fixed = per_unit.pop(-1, 0)
        if (
            len(per_unit) != units
            or len(set(per_unit.values())) != 1
            or fixed + next(iter(per_unit.values())) * left != new
        ):
            bad.append(dim)
    return bad
