"""Attention heads: alone, or with the KV groups that they share; the head size written where it would be derived."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...vanilla.resize import HEAD_SIZE
from ..anatomy import HEADS
from ..trial.config_tree import Number, Path, dotted, numbers_of, value_at
from ..trial.found import Found, changes_of
from ..trial.specimen import Specimen
from .effects import Effect
from .widths import find_width, is_stream

HEADLIKE, NOT_HEADS = re.compile("head"), re.compile("dim|size|hidden|head_act|tail")
"""Names of fields that count heads, or groups of them."""

GROUPS = re.compile("kv|key_value")

WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
"""Fields of the residual stream's size, from which the head size follows otherwise."""

DERIVED = "accepted, and nothing moves: the head size is derived from the hidden size"


def head_numbers(specimen: Specimen) -> dict[Path, list[Path]]:
    """Paths of numbers that count heads, by the scope that they are in."""
    found: dict[Path, list[Path]] = {}
    for path, value in numbers_of(specimen.builds.tree):
        name = str(path[-2] if isinstance(path[-1], int) else path[-1])
        if isinstance(value, int) and HEADLIKE.search(name) and not NOT_HEADS.search(name):
            found.setdefault(path[:-1], []).append(path)
    return found


def heads_in(own: Mapping[str, Any]) -> list[int]:
    """The numbers of one scope that count heads."""
    return [
        value
        for name, value in own.items()
        if isinstance(value, int) and value > 1 and HEADLIKE.search(name) and not NOT_HEADS.search(name)
    ]


def find_heads(
    specimen: Specimen, scope: Path, paths: list[Path], effects: dict[Path, Effect], stacks: Collection[str]
) -> tuple[list[Found], dict[str, str]]:
    """
    The axes of one scope's heads: each number alone, then two in step.

    Args:
        specimen: the model.
        scope: a path in the config.
        paths: numbers there that count heads.
        effects: of single numbers.
        stacks: names of the lists of layers.

    Returns:
        The axes, and the reasons why others are none.
    """
    found: list[Found] = []
    alone: dict[Path, Found] = {}
    reasons: dict[str, str] = {}
    for group in (*((path,) for path in paths), *itertools.combinations(paths, 2)):
        label = "+".join(map(dotted, group))
        axis = _try(specimen, scope, group, stacks)
        if isinstance(axis, str):
            if axis:
                reasons[label] = axis
            continue
        axis.kind = HEADS
        if len(group) == 1:
            alone[group[0]] = axis
        else:
            mine = [alone[path] for path in group if path in alone]
            others = [effects.get(path) for path in group if path not in alone]
            follows = any(effect is not None and effect.moves for effect in others)
            if len(mine) == 2 or (mine and _same(mine[0], axis) and not GROUPS.search(label) and not follows):
                continue
            # One number that has to follow the other: both in step replace it.
            found = [each for each in found if not (len(mine) == 1 and each is mine[0] and each.units == axis.units)]
            for path in group:
                reasons.pop(dotted(path), None)
        found.append(axis)
    for axis in found:
        for other in found:
            if other is not axis and other.places.keys() == axis.places.keys() and other.units < axis.units:
                axis.groups = other.units if axis.units % other.units == 0 else axis.groups
    return sorted(found, key=lambda axis: axis.units), reasons


def _same(one: Found, other: Found) -> bool:
    return one.rows.keys() == other.rows.keys()


def _try(specimen: Specimen, scope: Path, group: tuple[Path, ...], stacks: Collection[str]) -> Found | str:
    """An axis of numbers in step; else why there is none."""
    values: dict[Path, Number] = {path: value_at(specimen.builds.tree, path) for path in group}
    least = int(min(values.values()))
    if least < 2 or any(value % least for value in values.values()):
        return ""
    reasons = []
    for written in _written(specimen, scope, int(max(values.values()))):
        for tried in dict.fromkeys((least // 2, least - 1, least * 2, least // 4)):
            if tried < 1:
                continue
            moves = specimen.builds.moves(changes_of(values, tried, least) | written)
            if isinstance(moves, str):
                reasons.append(moves)
            elif not moves:
                reasons.append(DERIVED)
            elif not specimen.reads(moves):
                reasons.append("no weight reads them through an input dimension")
            else:
                break
        else:
            continue
        if is_stream(specimen, moves, stacks):
            reasons.append("moves the residual stream")
            continue
        axis = find_width(specimen, _ordered(values), least, tried, moves, written)
        if not isinstance(axis, str):
            return axis
        reasons.append(axis)
    return "; ".join(dict.fromkeys(reasons))


def _ordered(values: dict[Path, Number]) -> dict[Path, Number]:
    """The number that counts the units first."""
    return dict(sorted(values.items(), key=lambda item: item[1]))


def _written(specimen: Specimen, scope: Path, heads: int) -> Iterator[dict[Path, Any]]:
    """Nothing; then the head size, where the config leaves it to be derived."""
    yield {}
    own = value_at(specimen.builds.tree, scope)
    if not isinstance(own, dict) or isinstance(own.get(HEAD_SIZE), int):
        return
    width = next((own[name] for name in WIDTHS if isinstance(own.get(name), int)), 0)
    if width and width % heads == 0:
        yield {(*scope, HEAD_SIZE): width // heads}
