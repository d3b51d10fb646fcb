"""
Which unit every row of a weight belongs to, by gradients while units are closed under a binary code.

All units whose number has a 0 at bit `b` are closed, then all that have a 1 there. A row whose gradient vanishes in
exactly one of both belongs to a unit with that bit: 2 log2(units) backward passes decode every row of every dimension
in all layers at once, in whatever order a fused weight holds them. A row whose gradient survives both belongs to
several units, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .builds import Dim, Moves
from .closing import Closed
from .found import nearest
from .specimen import Specimen

SURVIVES, LIVE = 1e-13, 1e-11
"""Gradients above this share of the largest one are there: with units closed, and at all."""

BLOCKS = (1, 2, 3, 4, 6)
"""How many things of the same units a dimension may hold one after the other."""


@dataclass
class Decoded:
    """
    What the gradients tell.

    Args:
        rows: the unit of every row of each dimension; -1: it stays.
        norms: norms among what moved: the module's name to its scale's.
        shared: dimensions with more rows that stay than the new size has room for; the rest was not looked at then.
    """

    rows: dict[Dim, list[Any]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    shared: list[Dim] = field(default_factory=list)


def decode(
    specimen: Specimen,
    moves: Moves,
    places: Mapping[Dim, Sequence[int]],
    sizes: Mapping[Dim, tuple[int, int]] | None = None,
    *,
    spare: int = 0,
    routers: Sequence[str] = (),
    vectors: Sequence[str] = (),
    experts: int = 0,
) -> Decoded:
    """
    Find the unit of every row of every dimension that moved.

    Args:
        specimen: the model.
        moves: the dimensions, with their old and new sizes.
        places: where units are closed, and the unit of every row there.
        sizes: units at each place: all, and those of the new size. Given, the first bit decides whether the rest is
            worth while.
        spare: so many dimensions may have more rows that stay than the new size has room for; -1: no more than the
            first bit is looked at.
        routers: weights of routers, whose rows are experts; instead of places.
        vectors: vectors with an entry for each expert.
        experts: how many.
    """
    norms = {module: name for name, _ in moves if (module := specimen.norm_of(name)) is not None}
    linear = tuple(norms)
    tied = {dim: list(places[place]) for dim, place in _tied(specimen, moves, places)}
    plain = specimen.open_gradients(linear)
    top = _top(plain)
    targets = [dim for dim in moves if dim not in places and dim not in tied and dim[0] in plain]
    names = {name for name, _ in targets}
    live = {dim: _largest(plain, dim, moves[dim][0]) > LIVE * top for dim in targets}
    counts = {place: max(rows) + 1 for place, rows in places.items()}

    def closed_to(bit: int, want: int) -> Closed:
        closed = Closed(linear=linear)
        for place, rows in places.items():
            closed.zero.append(
                (place, [row for row, unit in enumerate(rows) if unit >= 0 and unit >> bit & 1 != want])
            )
        gone = [unit for unit in range(experts) if unit >> bit & 1 != want]
        closed.logits = dict.fromkeys(routers, gone)
        closed.vectors = dict.fromkeys(vectors, gone)
        return closed

    bits = max(1, math.ceil(math.log2(max([*counts.values(), experts]))))
    open_at: dict[Dim, list[torch.Tensor]] = {dim: [] for dim in targets}
    shut_at: dict[Dim, list[torch.Tensor]] = {dim: [] for dim in targets}
    for bit in range(bits):
        for want, there in ((1, open_at), (0, shut_at)):
            gradients = specimen.gradients(closed_to(bit, want), names)
            for dim in targets:
                there[dim].append(_largest(gradients, dim, moves[dim][0]) > SURVIVES * top)
        if bit == 0 and sizes:
            both = {dim: int((open_at[dim][0] & shut_at[dim][0]).sum()) for dim in targets}
            shared = [dim for dim in targets if both[dim] > _room(dim, moves, sizes)]
            if len(shared) > spare:
                return Decoded(norms=norms, shared=shared)
    rows: dict[Dim, list[Any]] = {place: list(units) for place, units in places.items()} | tied
    for dim in targets:
        rows[dim] = _read(torch.stack(open_at[dim]), torch.stack(shut_at[dim]), live[dim])
    found = Decoded(rows, norms)
    for dim in moves:
        if dim not in places and dim not in tied:
            _complete(found, dim, moves, places, experts or counts[nearest(dim[0], counts)])
    return found


def leaks(
    specimen: Specimen, moves: Moves, places: Collection[Dim], sizes: Mapping[Dim, tuple[int, int]]
) -> list[Dim]:
    """
    The dimensions that something else reads: with all units closed more of their rows have a gradient than the new
    size has room for. No share of the places among several axes makes up for that.
    """
    top, tied = _top(specimen.open_gradients(())), dict(_tied(specimen, moves, places))
    closed = Closed(zero=[(place, range(moves[place][0])) for place in places])
    found = specimen.gradients(closed, {name for name, _ in moves})
    return [
        dim
        for dim, (size, _) in moves.items()
        if dim not in places
        and dim not in tied
        and dim[0] in found
        and int((_largest(found, dim, size) > SURVIVES * top).sum()) > _room(dim, moves, sizes)
    ]


def closes_any(specimen: Specimen, moves: Moves, places: Mapping[Dim, Sequence[int]]) -> bool:
    """Whether some other dimension falls in two, when the even units are closed, and when the odd ones are."""
    top = _top(specimen.open_gradients(()))
    names = {name for name, _ in moves}

    def survive(want: int, dims: Collection[Dim]) -> dict[Dim, torch.Tensor]:
        shut: list[tuple[Dim, Sequence[int]]] = [
            (place, [row for row, unit in enumerate(rows) if unit & 1 != want]) for place, rows in places.items()
        ]
        found = specimen.gradients(Closed(zero=shut), names)
        return {dim: _largest(found, dim, moves[dim][0]) > SURVIVES * top for dim in dims if dim[0] in found}

    odd = {
        dim: rows for dim, rows in survive(1, moves.keys() - places.keys()).items() if rows.any() and not rows.all()
    }
    even = survive(0, odd) if odd else {}
    return any(bool(rows.any()) and not bool((odd[dim] & rows).any()) for dim, rows in even.items())


def _tied(specimen: Specimen, moves: Moves, places: Collection[Dim]) -> Iterator[tuple[Dim, Dim]]:
    """The dimensions that are a place by another name, with that place."""
    for dim in moves:
        for place in places if dim not in places else ():
            if dim[1] == place[1] and specimen.parameters.get(dim[0]) is specimen.parameters[place[0]]:
                yield dim, place


def _top(gradients: Mapping[str, torch.Tensor]) -> float:
    """The largest of all."""
    return max((float(each.abs().max()) for each in gradients.values() if each.numel()), default=0.0) or 1.0


def _largest(gradients: Mapping[str, torch.Tensor], dim: Dim, size: int) -> torch.Tensor:
    """The largest absolute gradient in each row; 0 where there is none."""
    gradient = gradients.get(dim[0])
    if gradient is None or not gradient.numel():  # of a weight without entries, as of a pool of 0 rows
        return torch.zeros(size)
    return gradient.abs().movedim(dim[1], 0).flatten(1).amax(1) if gradient.ndim > 1 else gradient.abs()


def _room(dim: Dim, moves: Moves, sizes: Mapping[Dim, tuple[int, int]]) -> float:
    """Rows that stay whatever the size is, as the old and the new size tell."""
    old, new = moves[dim]
    units, left = sizes[nearest(dim[0], sizes)]
    return old - (old - new) / (units - left) * units + 1e-9


def _read(opened: torch.Tensor, shut: torch.Tensor, live: torch.Tensor) -> list[Any]:
    """The unit of each row; of rows whose gradient told too little, the bits that are known."""
    stays = (opened & shut).any(0).tolist()
    whole = (live & (opened | shut).all(0)).tolist()
    powers = 2 ** torch.arange(len(opened))
    units = (opened * powers[:, None]).sum(0).tolist()
    rows: list[Any] = [-1 if fixed else unit for fixed, unit in zip(stays, units, strict=True)]
    for row, known in enumerate(whole):
        if not known and not stays[row]:
            told = (opened[:, row] | shut[:, row]).tolist()
            rows[row] = {bit: is_set for bit, is_set in enumerate(opened[:, row].tolist()) if told[bit]}
    return rows


def _complete(found: Decoded, dim: Dim, moves: Moves, places: Mapping[Dim, Any], units: int) -> None:
    """
    Fill in what has no gradient: a bias that a softmax does not see, a buffer, a dead ReLU.

    Where some rows are known, the regular pattern that agrees with them; else the rows of the module's weight; else
    equal stretches. The outputs decide whether that was right.
    """
    rows = found.rows.get(dim)
    if rows is not None and any(isinstance(row, int) for row in rows):
        if any(not isinstance(row, int) for row in rows):
            found.rows[dim] = _regular(rows, units)
        return
    module, size = dim[0].rpartition(".")[0], moves[dim][0]
    same = [
        rows
        for other, rows in found.rows.items()
        if other != dim and other not in places and other[0].rpartition(".")[0] == module
        if len(rows) == size and all(isinstance(row, int) for row in rows)
    ]
    if not same and size % units == 0:
        same = [[row // (size // units) for row in range(size)]]
    if same:
        found.rows[dim] = list(same[0])
    else:
        found.rows.pop(dim, None)


def _regular(rows: list[Any], units: int) -> list[int]:
    size = len(rows)
    guesses = [
        [row // (size // (blocks * units)) % units for row in range(size)]
        for blocks in BLOCKS
        if size % (blocks * units) == 0
    ]
    for guess in (*guesses, [row % units for row in range(size)]):
        if all(_agrees(known, unit) for known, unit in zip(rows, guess, strict=True)):
            return guess
    return [row if isinstance(row, int) else -1 for row in rows]


def _agrees(known: Any, unit: int) -> bool:
    if isinstance(known, int):
        return known == unit
    return all(bool(unit >> bit & 1) == is_set for bit, is_set in known.items())
