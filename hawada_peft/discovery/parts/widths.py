"""Axes of one number, or of several in step: where their units are closed, and which rows they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..anatomy import EXPERTS
from ..trial.builds import Dim, Moves
from ..trial.config_tree import Number, Path
from ..trial.found import Found, misfits
from ..trial.specimen import CONVS, Specimen
from ..trial.units import decode

NOTHING_READS = "no weight reads it through an input dimension"

STREAM = 0.6
"""Of a stack's parameters more than this share moves with the residual stream."""

Layout = tuple[dict[Dim, list[int]], dict[Dim, tuple[int, int]]]
"""The unit of every row at each place, and units there: all, and those of the size that was tried."""


def made_of(dims: list[Dim], moves: Moves, what: str) -> str:
    """Why some dimensions are not cut."""
    name, dim = dims[0]
    return f"{len(dims)} of {len(moves)} dimensions are not made of its {what}, as {name}[{dim}]"


def find_width(
    specimen: Specimen,
    numbers: Mapping[Path, Number],
    value: Number,
    tried: Number,
    moves: Moves,
    written: Mapping[Path, Any] | None = None,
) -> Found | str:
    """
    Make an axis of numbers that move dimensions.

    Args:
        specimen: the model.
        numbers: the config's numbers that were changed in step.
        value: the least of them now.
        tried: and in the config that gave `moves`.
        moves: the dimensions.
        written: config values that were written beside.

    Returns:
        The axis, not yet proved; else the reason why there is none.
    """
    why = NOTHING_READS
    for places in _places(specimen, moves):
        for layout in _layouts(places, moves, value, tried):
            rows, sizes = layout
            decoded = decode(specimen, moves, rows, sizes)
            bad = decoded.shared or misfits(decoded.rows, moves, sizes)
            if bad:
                why = made_of(bad, moves, "units")
                continue
            counts = {place: units for place, (units, _) in sizes.items()}
            units = max(counts.values())
            return Found(
                dict(numbers), units, rows, decoded.rows, counts, written=dict(written or {}), norms=decoded.norms
            )
    return why


def _places(specimen: Specimen, moves: Moves) -> Iterator[list[Dim]]:
    """Where units may be closed: inputs of modules; with them, stacked weights of one name."""
    known = specimen.reads(moves)
    if known:
        yield known
    raw = sorted({name.rpartition(".")[2] for name, _ in moves if is_stacked(specimen, name)})
    for own in raw:
        yield known + [dim for dim in moves if dim[0].rpartition(".")[2] == own and dim not in known]


def is_stacked(specimen: Specimen, name: str) -> bool:
    """Whether a parameter holds several weights: it has three dimensions, and no module that is known owns it."""
    stacked = specimen.parameters[name].ndim >= 3 and specimen.input_dim(name) is None
    return stacked and not isinstance(specimen.owner(name), CONVS)


def _layouts(places: list[Dim], moves: Moves, value: Number, tried: Number) -> Iterator[Layout]:
    """Every row a unit; then as many units as the number says, of several rows each."""
    if min(moves[place][0] for place in places) >= 2:
        yield {place: list(range(moves[place][0])) for place in places}, {place: moves[place] for place in places}
    if not isinstance(value, int) or not isinstance(tried, int) or value < 2:
        return
    widths = {place: moves[place][0] // value for place in places}
    whole = all(moves[place] == (width * value, width * tried) for place, width in widths.items())
    if whole and 1 not in widths.values():
        rows = {place: [row // width for row in range(moves[place][0])] for place, width in widths.items()}
        yield rows, dict.fromkeys(places, (value, tried))


def find_experts(specimen: Specimen, path: Path, value: Number, tried: Number, moves: Moves) -> Found | str | None:
    """
    Make an axis of experts: stacked weights that lose a slice of their first dimension together with rows of a router.

    Returns:
        The axis, not yet proved; the reason why it is none; None if there are no such weights.
    """
    if not isinstance(value, int) or not isinstance(tried, int):
        return None

    def counted(ndim: int) -> list[str]:
        return [
            name
            for name, dim in moves
            if dim == 0 and specimen.parameters[name].ndim == ndim and moves[name, dim][0] == value
        ]

    stacked = [
        name
        for name in counted(3)
        if isinstance(specimen.parameters[name], nn.Parameter) and not isinstance(specimen.owner(name), CONVS)
    ]
    routers = [name for name in counted(2) if name.endswith("weight")]
    if not stacked or not routers:
        return None
    vectors = tuple(name for name in counted(1) if "correction" in name)
    decoded = decode(specimen, moves, {}, routers=routers, vectors=vectors, experts=value)
    places: dict[Dim, list[int]] = {(name, 0): list(range(value)) for name in routers}
    rows = decoded.rows | places | {(name, 0): list(range(value)) for name in vectors}
    bad = misfits(rows, moves, dict.fromkeys(places, (value, tried)))
    if bad:
        return made_of(bad, moves, "experts")
    return Found({path: value}, value, places, rows, dict.fromkeys(places, value), kind=EXPERTS, vectors=vectors)


def built_sizes(specimen: Specimen, axis: Found, candidates: list[int]) -> list[int]:
    """Those of some numbers of units with which the class builds what the axis says."""
    whole = axis.everything()
    return [units for units in candidates if _builds(specimen, axis, units, whole)]


def _builds(specimen: Specimen, axis: Found, units: int, whole: Mapping[Dim, list[int]]) -> bool:
    if axis.groups and units % axis.groups:
        return False
    moves = specimen.builds.moves(axis.changes(units))
    if isinstance(moves, str) or moves.keys() != whole.keys():
        return False
    lefts = {place: axis.left_at(place, units) for place in axis.places}
    if any(left is None for left in lefts.values()):
        return False
    widths = {place: sum(unit >= 0 for unit in axis.places[place]) // axis.counts[place] for place in axis.places}
    return all(
        moves[place][1] == axis.places[place].count(-1) + widths[place] * left
        for place, left in lefts.items()
        if left is not None and axis.kind != EXPERTS
    )


def is_stream(specimen: Specimen, moves: Moves, stacks: Collection[str]) -> bool:
    """
    Whether most parameters of a stack moved, and some outside of all stacks, which heads do not move; of a model
    without stacks, most parameters. The residual stream does that.
    """
    moved = {name for name, _ in moves}
    inside = tuple(f"{stack}." for stack in stacks)
    if inside and all(name.startswith(inside) for name in moved):
        return False
    for prefix in inside or ("",):
        own = {name for name in specimen.base if name.startswith(prefix)}
        if len(moved & own) > STREAM * len(own):
            return True
    return False
