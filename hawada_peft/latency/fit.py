"""
From timed shapes to costs per size: one least-squares fit of all of them, weighed by how well each is known. From the
tables of several calls to the one of their sum; from those of two hidden sizes to the one of a size between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..vanilla.shape import Shape
from .interpolate import bilinear, linear
from .regime import Regime
from .table import LatencyTable, Realised

BEND = 0.03
"""How far a cost is off a straight line or a plane, typically, in parts of a dense layer."""

INTERACTION = 0.1
"""How far attention and FFN are from adding up, typically, in parts of a dense layer."""

MODEL_ERROR = 0.003
"""Relative error that the form of the fit has even without noise."""


@dataclass(frozen=True)
class Observation:
    """A timed shape: its latency in milliseconds and the relative standard error of that."""

    shape: Shape
    ms: float
    error: float


@dataclass(frozen=True)
class Costs:
    """
    Milliseconds per size; `LatencyTable` says how they add up.

    Args:
        fixed_ms, layer_ms, interaction_ms: as in the table.
        attention_ms: (KV groups, heads per group), beyond the smallest.
        ffn_ms: per FFN size, beyond the smallest.
    """

    fixed_ms: float
    layer_ms: float
    interaction_ms: float
    attention_ms: tuple[tuple[float, ...], ...]
    ffn_ms: tuple[float, ...]


def fit_costs(
    observations: Sequence[Observation],
    dense: Shape,
    groups: tuple[int, ...],
    per_group: tuple[int, ...],
    ffn: tuple[int, ...],
) -> Costs:
    """
    The costs that explain timed shapes of different depths best.

    Unknown are the fixed cost, the cost of a layer, a slope and a departure from it for each attention size, a cost
    for each FFN size, and the interaction of both. Departures from planes and straight lines are expected to be small
    (`BEND`), so noise is averaged out where there is noise, and nothing is smoothed where there is none. This is
    Bayesian linear regression with Gaussian priors.

    Args:
        observations: timed shapes, at two depths or more. Attention sizes are on the grid, FFN sizes among `ffn`.
        dense: the dense sizes.
        groups, per_group: the grid of attention sizes.
        ffn: FFN sizes, rising.
    """
    heads, _, widest, _ = dense.sizes().values()
    cells = [(g, r) for g in groups for r in per_group]
    # Columns: fixed, layer, slope of KV groups, slope of heads, interaction, one per cell, one per FFN size.
    first_cell, first_ffn = 5, 5 + len(cells)
    columns = first_ffn + len(ffn)
    rows, targets = [], []
    for seen in observations:
        count, pairs, size, layers = seen.shape.sizes().values()
        row = np.zeros(columns)
        row[:5] = 1 / layers, 1, pairs, count, (1 - count / heads) * (1 - size / widest)
        row[first_cell + cells.index((pairs, count // pairs))] = 1
        row[first_ffn + ffn.index(size)] = 1
        weight = 1 / (seen.ms * np.hypot(seen.error, MODEL_ERROR))
        rows.append(row * layers * weight)
        targets.append(seen.ms * weight)
    deepest = max(seen.shape.sizes()["num_hidden_layers"] for seen in observations)
    per_layer = max(seen.ms for seen in observations) / deepest
    bend = BEND * per_layer
    for index in range(len(cells)):
        rows.append(_unit(columns, {first_cell + index: 1 / bend}))
    rows.append(_unit(columns, {4: 1 / (INTERACTION * per_layer)}))
    rows.append(_unit(columns, {first_ffn: 1e3 / per_layer}))  # the smallest FFN counts as part of the layer
    for index in range(1, len(ffn) - 1):
        low, here, high = ffn[index - 1 : index + 2]
        part = (here - low) / (high - low)
        weights = {first_ffn + index - 1: (part - 1) / bend, first_ffn + index: 1 / bend}
        rows.append(_unit(columns, weights | {first_ffn + index + 1: -part / bend}))
    for index in (2, 3):  # slopes that the observations leave open stay at 0
        rows.append(_unit(columns, {index: 1e-3 / per_layer}))
    targets += [0.0] * (len(rows) - len(targets))
    found = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    cost = {
        cell: found[2] * cell[0] + found[3] * cell[0] * cell[1] + found[first_cell + i] for i, cell in enumerate(cells)
    }
    low = min(cost.values())
    channels = found[first_ffn:]
    return Costs(
        fixed_ms=float(found[0]),
        layer_ms=float(found[1] + low + channels[0]),
        interaction_ms=float(found[4]),
        attention_ms=tuple(tuple(float(cost[g, r] - low) for r in per_group) for g in groups),
        ffn_ms=tuple((channels - channels[0]).tolist()),
    )


def _unit(columns: int, weights: dict[int, float]) -> np.ndarray:
    row = np.zeros(columns)
    for column, weight in weights.items():
        row[column] = weight
    return row


def mixed_table(regime: Regime, parts: Sequence[tuple[float, LatencyTable]]) -> LatencyTable:
    """
    One table for `sum(times * part)`.

    Every cost of a table is linear between its sizes, so that the sum is a table on the union of them, and nothing is
    lost. Shapes that were timed as a whole for all parts correct it anew; its `errors` are on these.

    Args:
        regime: what the sum is for.
        parts: tables of one model on one device, each with how often its call counts.
    """
    tables = [table for _, table in parts]
    first = tables[0]
    groups, per_group, sizes = (
        tuple(sorted({size for table in tables for size in getattr(table, name)}))
        for name in ("kv_groups", "heads_per_group", "ffn_sizes")
    )
    rows, columns = torch.meshgrid(_row(groups), _row(per_group), indexing="ij")
    attention, ffn = torch.zeros(len(groups), len(per_group), dtype=torch.float64), torch.zeros(len(sizes)).double()
    fixed = layer = interaction = 0.0
    for times, table in parts:
        factor = times * table.scale
        grid, column = (torch.tensor(each, dtype=torch.float64) for each in (table.attention_ms, table.ffn_ms))
        attention += factor * bilinear(rows, columns, table.kv_groups, table.heads_per_group, grid)
        ffn += factor * linear(_row(sizes), table.ffn_sizes, column)
        fixed += factor * table.fixed_ms + times * table.offset_ms
        layer += factor * table.layer_ms
        interaction += factor * table.interaction_ms
    least = attention.min()
    mixed = replace(
        first,
        regime=regime,
        kv_groups=groups,
        heads_per_group=per_group,
        ffn_sizes=sizes,
        fixed_ms=fixed,
        layer_ms=layer + float(least + ffn[0]),
        attention_ms=tuple(tuple(row) for row in (attention - least).tolist()),
        ffn_ms=tuple((ffn - ffn[0]).tolist()),
        interaction_ms=interaction,
        multiple=max(table.multiple for table in tables),
        dense_ms=sum(times * table.dense_ms for times, table in parts),
        scale=1.0,
        offset_ms=0.0,
        realised=(),
        errors={},
        seconds=sum(table.seconds for table in tables),
        measured_at=max(table.measured_at for table in tables),
        unsettled="; ".join(dict.fromkeys(table.unsettled for table in tables if table.unsettled)),
        path=None,
    )
    seen = [{point.shape: times * point.ms for point in table.realised} for times, table in parts]
    common = [shape for shape in seen[0] if all(shape in each for each in seen)]
    return mixed.with_realised([Realised(shape, sum(each[shape] for each in seen)) for shape in common])


def table_between(
    wide: LatencyTable, narrow: LatencyTable, base_sizes: Mapping[str, int | str], multiple: int, axis: str
) -> LatencyTable:
    """
    The table of a hidden size, or a size of heads, between those of two tables.

    Every cost of a model is linear in its hidden size: products of weights in it and an inner size, whatever that is;
    norms in itself; the core of attention not in it at all. And in the size of heads: the core of attention and the
    projections around it in that, all else not at all. So is each cost of a table, and the table of a size
    between is the mean of both, weighed by how near they are. What departs from that (sizes for which a device has no
    fast kernel) is for shapes that are timed as a whole to correct.

    Args:
        wide, narrow: on one device under one regime, the first with the larger size.
        base_sizes: what the new one is for.
        multiple: of its FFN sizes.
        axis: `"hidden_size"` or `"head_dim"`: in which they differ.
    """
    high, low, size = (int(sizes[axis]) for sizes in (wide.base_sizes, narrow.base_sizes, base_sizes))
    part = (size - low) / (high - low)
    scale = wide.dense_ms / narrow.dense_ms
    mixed = mixed_table(wide.regime, [(part, wide), ((1 - part) * scale, narrow)])
    return replace(mixed, base_sizes=dict(base_sizes), multiple=multiple)


def _row(sizes: Sequence[int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.float64)
