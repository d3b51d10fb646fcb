"""The residual stream: channels that everything reads, alone or with the heads that its size is divided into."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..anatomy import HEADS, HIDDEN
from ..trial.builds import Dim, Moves
from ..trial.config_tree import Path, numbers_of, value_at
from ..trial.found import Found, changes_of, misfits
from ..trial.specimen import CONVS, Specimen
from ..trial.units import closes_any, decode, leaks
from .heads import HEAD_SIZE, HEADLIKE
from .widths import made_of

NOT_HEADS = re.compile("dim|size|hidden|linear|mamba")
"""Words in names of numbers that do not count heads of the stream."""

MOST_RAW = 3
"""Weights without a module of their own that may read the stream, at most."""

Sizes = dict[Dim, tuple[int, int]]


def find_stream(specimen: Specimen, path: Path) -> Found | str:
    """
    Make an axis of a number that moves most of the model.

    Args:
        specimen: the model.
        path: of the number.

    Returns:
        The axis, not yet proved; else the reason why there is none.
    """
    value = value_at(specimen.builds.tree, path)
    if not isinstance(value, int):
        return "the residual stream: it is no whole number"
    reasons = []
    for numbers, written in _edits(specimen, path, value):
        for tried in (value // 2, value * 2, value * 3 // 4):
            moves = specimen.builds.moves(changes_of(numbers, tried, value) | written)
            if not isinstance(moves, str) and moves:
                break
            reasons.append(moves if isinstance(moves, str) else "nothing moves")
        else:
            continue
        axis = _axis(specimen, numbers, written, value, tried, moves)
        if not isinstance(axis, str):
            return axis
        reasons.append(axis)
    return "residual stream: " + "; ".join(dict.fromkeys(reasons))


def _edits(specimen: Specimen, path: Path, value: int) -> Iterator[tuple[dict[Path, int | float], dict[Path, Any]]]:
    """The number alone, with the head size written, and in step with the heads."""
    scope = path[:-1]
    own = value_at(specimen.builds.tree, scope)
    heads: dict[Path, int | float] = {
        (*scope, *inner): number
        for inner, number in numbers_of(own)
        if len(inner) == 1 and isinstance(number, int)
        if HEADLIKE.search(str(inner[0])) and not NOT_HEADS.search(str(inner[0]))
    }
    alone: dict[Path, int | float] = {path: value}
    yield alone, {}
    if not heads:
        return
    most = int(max(heads.values()))
    if not isinstance(own.get(HEAD_SIZE), int) and value % most == 0:
        yield alone, {(*scope, HEAD_SIZE): value // most}
    if value % min(heads.values()) == 0:
        yield alone | heads, {}


def _axis(
    specimen: Specimen,
    numbers: Mapping[Path, int | float],
    written: Mapping[Path, Any],
    value: int,
    tried: int,
    moves: Moves,
) -> Found | str:
    known = specimen.reads(moves)
    if not known:
        return "nothing reads it"
    odd = next((dim for dim in known if moves[dim][0] % value), None)
    if odd is not None:
        return f"{odd[0]} reads no multiple of it"

    def made(places: list[Dim], rows: dict[Dim, Any], norms: dict[str, str]) -> Found:
        counts = dict.fromkeys(places, value)
        return Found(
            dict(numbers),
            value,
            _channels(places, moves, value),
            rows,
            counts,
            kind=HIDDEN,
            written=dict(written),
            norms=norms,
            tied=True,
        )

    sizes: Sizes = dict.fromkeys(known, (value, tried))
    decoded = decode(specimen, moves, _channels(known, moves, value), sizes)
    bad = decoded.shared or misfits(decoded.rows, moves, sizes)
    if not bad:
        return made(known, decoded.rows, decoded.norms)
    if len(numbers) > 1:
        split = None
        if not leaks(specimen, moves, known, sizes):
            split = _with_heads(specimen, numbers, value, tried, moves, known)
        if split is not None:
            (outer, rows, norms), partner = split
            axis = made(outer, rows, norms)
            axis.partner = partner
            return axis
        return made_of(bad, moves, "channels")
    for more in _raw_readers(specimen, moves, known, value, tried):
        sizes = dict.fromkeys(more, (value, tried))
        decoded = decode(specimen, moves, _channels(more, moves, value), sizes)
        if not decoded.shared and not misfits(decoded.rows, moves, sizes):
            return made(more, decoded.rows, decoded.norms)
    return made_of(bad, moves, "channels")


def _channels(places: list[Dim], moves: Moves, value: int) -> dict[Dim, list[int]]:
    return {place: [row % value for row in range(moves[place][0])] for place in places}


def layerless(name: str) -> str:
    """A parameter's name without the indices in it."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _raw_readers(specimen: Specimen, moves: Moves, known: list[Dim], value: int, tried: int) -> Iterator[list[Dim]]:
    """The places with further ones: weights that no module of a known kind owns."""
    modules = (nn.Embedding, *CONVS)
    raw = sorted(
        {
            (layerless(name), dim)
            for name, dim in moves
            if (name, dim) not in known and specimen.parameters[name].ndim >= 2
            if specimen.input_dim(name) is None and not isinstance(specimen.owner(name), modules)
        }
    )

    def places(some: Collection[tuple[str, int]]) -> list[Dim]:
        return known + [dim for dim in moves if (layerless(dim[0]), dim[1]) in some]

    raw = [one for one in raw if all(moves[dim][0] % value == 0 for dim in places([one]))]
    every = places(raw)
    if len(raw) > 1 and leaks(specimen, moves, every, dict.fromkeys(every, (value, tried))):
        return
    for count in range(1, min(MOST_RAW, len(raw)) + 1):
        yield from map(places, itertools.combinations(raw, count))


Part = tuple[list[Dim], dict[Dim, Any], dict[str, str]]


def _with_heads(
    specimen: Specimen,
    numbers: Mapping[Path, int | float],
    value: int,
    tried: int,
    moves: Moves,
    known: list[Dim],
) -> tuple[Part, Found] | None:
    """
    Tell the readers of the stream from those of heads: one kind of module reads heads.

    Returns:
        Readers, rows and norms of the stream, and the axis of the heads; None if no kind of module fits.
    """
    counted = {path: int(number) for path, number in numbers.items() if number != value}
    heads = max(counted.values(), default=0)
    if not heads:
        return None
    width = value // heads
    for kind in sorted({layerless(name) for name, _ in known}):
        inner = [dim for dim in known if layerless(dim[0]) == kind]
        outer = [dim for dim in known if dim not in inner]
        if not outer:
            continue
        places = {dim: [row // width for row in range(moves[dim][0])] for dim in inner}
        if not closes_any(specimen, moves, places):
            continue
        sizes: Sizes = dict.fromkeys(outer, (value, tried))
        fewer = dict.fromkeys(inner, (heads, heads * tried // value))
        most = len(moves) // 2 + len(inner) - 1
        # What the first bit tells of both is enough for most kinds.
        rest = [*decode(specimen, moves, _channels(outer, moves, value), sizes, spare=-1).shared, *inner]
        rest = list(dict.fromkeys(rest))
        if len(rest) > most or decode(specimen, {dim: moves[dim] for dim in rest}, places, fewer, spare=-1).shared:
            continue
        stream = decode(specimen, moves, _channels(outer, moves, value))
        rest = list(dict.fromkeys([*misfits(stream.rows, moves, sizes), *inner]))
        if len(rest) > most:
            continue
        other = decode(specimen, {dim: moves[dim] for dim in rest}, places)
        if misfits(other.rows, {dim: moves[dim] for dim in rest}, fewer):
            continue
        partner = Found(
            {next(iter(counted)): heads},
            heads,
            places,
            other.rows,
            dict.fromkeys(inner, heads),
            kind=HEADS,
            norms=other.norms,
        )
        rows = {dim: units for dim, units in stream.rows.items() if dim not in rest}
        norms = {name: scale for name, scale in stream.norms.items() if (scale, 0) not in rest}
        return (outer, rows, norms), partner
    return None


def step_of(axis: Found) -> int:
    """Channels that go at once: those of a head, where heads go with them."""
    return axis.units // axis.partner.units if axis.partner is not None else 1
