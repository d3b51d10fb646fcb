"""
What was found of a small model, said of the large one.

The large class is built on the meta device with few layers, the same ones, at two sizes of an axis: the dimensions
that move must be those of the small model, and of each the two sizes give the rows per unit and those that stay. The
order of rows is that of the small model. Layers that were left out are like one of their kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .anatomy import EXPERTS, HEADS, INPUT, LOGITS, NORM, PARAMETER, Axis, Number, Place, Rows, Sizes
from .parts.heads import heads_in
from .patterns import Pattern, pattern_of
from .shortened import Layers
from .trial.builds import Builds, Dim, Moves
from .trial.config_tree import Path, dotted, value_at
from .trial.found import Found, changes_of, nearest
from .trial.specimen import Specimen

MANY = 64
"""Up to so many units every number of them is tried."""

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Sizes may be multiples of one of these, where not all are built."""

NOT_BUILT = "no smaller size is built as asked"


class Large:
    """
    An axis of the small model at its large size.

    Args:
        specimen: the small model.
        found: the axis there.
        builds: the large class and config, with the small model's layers.
        layers: of both.
    """

    def __init__(self, specimen: Specimen, found: Found, builds: Builds, layers: Layers) -> None:
        self.specimen, self.found, self.builds, self.layers = specimen, found, builds, layers
        self.place = max(found.places, key=lambda place: found.counts[place])
        values = list(found.numbers.values())
        self.counted = found.units in values and all(isinstance(value, int) for value in values)
        self.numbers = {path: self._value(path, small) for path, small in found.numbers.items()}
        if self.counted:
            leading = next(path for path, value in found.numbers.items() if value == found.units)
            self.units = int(self.numbers[leading])
        else:
            self.units = self.size(self.place) * found.units // len(found.places[self.place])
        self.written = {path: self._written(path, small) for path, small in found.written.items()}

    def size(self, dim: Dim) -> int:
        """Of a dimension, with all units."""
        return self.builds.base[dim[0]][dim[1]]

    def _value(self, path: Path, small: int | float) -> int | float:
        """A number; of one that is left out what it stands for."""
        value: int | float | None = value_at(self.builds.tree, path)
        rows = len(self.found.places[self.place])
        return self.size(self.place) * small // rows if value is None else value

    def _written(self, path: Path, small: Any) -> Any:
        """A head's size, which grows with the place that heads are read at, or with the stream."""
        if self.found.kind != HEADS:
            return self.units // max(heads_in(value_at(self.builds.tree, path[:-1])))
        per_unit = self.size(self.place) * self.found.units * small
        return per_unit // (self.units * len(self.found.places[self.place]))

    def changes(self, units: int) -> dict[Path, Any]:
        """Values of the config with so many units left."""
        return changes_of(self.numbers, units, self.units) | self.written

    def count(self, place: Dim) -> int:
        """Units at a place."""
        if self.counted:
            return self.units
        return self.size(place) * self.found.counts[place] // len(self.found.places[place])

    def moves(self, size: int) -> Moves | None:
        """The dimensions that move at a size, if the class builds what the axis says."""
        moves = self.builds.moves(self.changes(size))
        if isinstance(moves, str) or moves.keys() != self.found.everything().keys():
            return None
        for place, rows in self.found.places.items():
            if self.found.kind == EXPERTS:
                continue
            old, new = moves[place]
            fixed = rows.count(-1) * old // len(rows)
            if (old - fixed) * size != (new - fixed) * self.units:
                return None
        return moves

    def sizes(self, groups: int) -> Sizes:
        """Numbers of units that are built as asked, all of them among these."""

        def fits(size: int) -> bool:
            return size > 0 and not (groups and size % groups) and self.moves(size) is not None

        if self.units <= MANY:
            return _regular((*(size for size in range(1, self.units) if fits(size)), self.units))
        for step in STEPS:
            if self.units % step or self.units < 4 * step or (groups and step % groups):
                continue
            tried = (self.units - step, self.units // step // 2 * step, self.units // step * 37 // 101 * step, step)
            if all(fits(size) for size in dict.fromkeys(tried)):
                return range(step, self.units + 1, step)
        return (*(size for size in sorted({self.units * part // 8 for part in range(1, 8)}) if fits(size)), self.units)

    def axes(self, groups: int, least: int, step: int) -> list[Axis] | str:
        """
        The axis as data, and its partner; else why it is none.

        Args:
            groups: that its units come in.
            least: the fewest units with which the model runs.
            step: only multiples of it do.
        """
        sizes = _from(self.sizes(max(groups, step)), least)
        probe = sizes[0]
        moves = self.moves(probe) if probe < self.units else None
        if moves is None:
            return NOT_BUILT
        parts = _Parts(self, self.found, groups)
        described = parts.described(moves, self.units, probe)
        if isinstance(described, str):
            return described
        axis = replace(
            described,
            numbers=tuple(Number(dotted(path), value) for path, value in self.numbers.items()),
            written=tuple((dotted(path), value) for path, value in self.written.items()),
            sizes=sizes,
        )
        if self.found.partner is None:
            return [axis]
        heads = int(self.numbers[next(iter(self.found.partner.numbers))])
        if any(size * heads % self.units for size in sizes):
            sizes = tuple(size for size in sizes if size * heads % self.units == 0)
        partner = _Parts(self, self.found.partner, 0).described(moves, heads, probe * heads // self.units)
        if isinstance(partner, str):
            return partner
        along = tuple(size * heads // self.units for size in sizes)
        return [replace(axis, sizes=sizes), replace(partner, sizes=along, follows=axis.name)]


@dataclass
class _Parts:
    """The places and rows of an axis, or of its partner."""

    large: Large
    found: Found
    groups: int

    def described(self, moves: Moves, units: int, left: int) -> Axis | str:
        found, large = self.found, self.large

        def count(place: Dim) -> int:
            return large.count(place) if found is large.found else units

        places: dict[tuple[str, int, str], Place] = {}
        deciding: dict[Dim, tuple[str, int, str]] = {}

        def add(dim: Dim, how: str, at: Dim) -> None:
            template, layers = large.layers.template(dim[0])
            key = (template, dim[1], how)
            before = places[key].layers if key in places else ()
            places[key] = Place(template, dim[1], how, count(at), tuple(sorted({*before, *layers})))
            deciding.setdefault(dim, key)

        for place in found.places:
            add(place, self._how(place), place)
        for scale in found.norms.values():
            add((scale, 0), NORM, nearest(scale, found.places))
        for vector in found.vectors:
            add((vector, 0), LOGITS, nearest(vector, found.places))
        index = {key: number for number, key in enumerate(places)}
        rows: dict[Rows, set[int]] = {}
        for dim, small in found.rows.items():
            at = nearest(dim[0], found.places)
            units_at = count(at)
            made = self._rows(dim, small, found.counts[at], moves[dim], units_at, units_at * left // units)
            if isinstance(made, str):
                return made
            template, layers = large.layers.template(dim[0])
            key = replace(made, parameter=template, place=index[deciding[at]])
            rows.setdefault(key, set()).update(layers)
        every = tuple(replace(each, layers=tuple(sorted(layers))) for each, layers in rows.items())
        return Axis(
            found.name,
            found.kind,
            units,
            (),
            tuple(places.values()),
            every,
            (),
            groups=self.groups,
            tied=found.tied,
            alike=bool(found.alike),
        )

    def _how(self, place: Dim) -> str:
        if self.found.kind == EXPERTS:
            return LOGITS
        return INPUT if self.large.specimen.input_dim(place[0]) == place[1] else PARAMETER

    def _rows(
        self, dim: Dim, small: Sequence[int], small_units: int, move: tuple[int, int], units: int, left: int
    ) -> Rows | str:
        """How a dimension is made of units, from how it is in the small model and from two sizes of it."""
        old, new = move
        per_unit, rest = divmod(old - new, units - left)
        fixed = old - per_unit * units
        pattern = pattern_of(small, small_units)
        if pattern is None and len(small) == old and units == small_units:
            return Rows("", dim[1], 0, explicit=tuple(small))
        large = None if pattern is None or rest else self._resized(pattern, small_units, units, per_unit, fixed)
        if large is None:
            return f"the order of the rows of {dim[0]}[{dim[1]}] is not regular"
        return Rows("", dim[1], 0, large.segments, large.groups)

    def _resized(self, pattern: Pattern, small: int, units: int, per_unit: int, fixed: int) -> Pattern | None:
        if pattern.groups == 1:
            groups = 1
        elif pattern.groups == self.found.groups:
            groups = self.groups
        else:
            groups = pattern.groups * units // small
        return pattern.resized(units, groups, per_unit, fixed)


def _from(sizes: Sizes, least: int) -> Sizes:
    """Sizes from one on."""
    if isinstance(sizes, range):
        return sizes[-(-(least - sizes.start) // sizes.step) :] if least > sizes.start else sizes
    return tuple(size for size in sizes if size >= least)


def _regular(sizes: tuple[int, ...]) -> Sizes:
    """Three sizes and more at equal distances as a range."""
    steps = {later - size for size, later in itertools.pairwise(sizes)}
    return range(sizes[0], sizes[-1] + 1, steps.pop()) if len(sizes) > 2 and len(steps) == 1 else sizes
