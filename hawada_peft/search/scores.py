"""What cutting each unit is expected to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..errors import InvalidPlanError
from ..gates.attach import collect_gates
from ..gates.kinds import SigmoidGate
from ..gates.reading import UnitScores, further_gates, gate_scores, hidden_gate, layers_of
from ..vanilla.family import Layout
from ..vanilla.shape import HEADS, Shape


def unit_scores(
    model: PeftModel, layout: Layout, adapter_names: Sequence[str], importance: Mapping[str, torch.Tensor] | None
) -> UnitScores:
    """
    What cutting each unit is expected to cost, up to a factor: the importance of its gate times the square of the
    gate's value over its start; the gate's value if there is no importance.

    Raises:
        InvalidPlanError: if importance is given under other names than the model's gates have.
        BrokenGatesError: if a gate is NaN.
    """
    base = cast(nn.Module, model.base_model.model)
    plain = gate_scores(base, layout, adapter_names)
    if importance is None:
        return plain
    gates = collect_gates(model)
    unknown = sorted(set(importance) - set(gates))
    if unknown:
        raise InvalidPlanError(
            f"importance is given for gates that the model lacks: {unknown[:4]}; compute it from the same model"
        )
    by_gate = {id(gates[name]): value for name, value in importance.items()}

    def scores(gates: Sequence[SigmoidGate]) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for gate in gates:
            if id(gate) in by_gate:
                value = by_gate[id(gate)].double().cpu() * gate.factor(hard=False).detach().double().cpu().square()
                total = value if total is None else total + value
        return total

    layers = layers_of(base, layout, adapter_names)
    size = layout.dense.sizes()["intermediate_size"]
    stream = [gate for name in adapter_names if (gate := hidden_gate(base, layout, name)) is not None]
    hidden = None if plain.hidden is None else _spread(scores(stream), layout.hidden_size)
    return replace(
        plain,
        heads=tuple(scores(layer.heads) for layer in layers),
        channels=tuple(_spread(scores(layer.ffn), size) for layer in layers),
        further={
            name: scores(gates) if layout.further_axis(name) == HEADS else _spread(scores(gates), size)
            for name, gates in further_gates(base, layout, adapter_names).items()
        },
        hidden=None if hidden is None else stream[0].ranked(hidden, trained=False),
    )


def _spread(scores: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """Scores of groups as scores of their channels: (size,)."""
    return None if scores is None else (scores * len(scores) / size).repeat_interleave(size // len(scores))


def heads_cut(scores: torch.Tensor | None, dense: Shape, pairs: Sequence[Shape]) -> np.ndarray:
    """
    The sum of the scores that a layer loses at each (query heads, KV groups).

    Args:
        scores: (query heads,), None where none is gated.
        dense: the dense model's sizes.
        pairs: the numbers of heads and groups.

    Returns:
        (pairs,).
    """
    if scores is None:
        return np.zeros(len(pairs))
    table = scores.reshape(-1, dense.heads_per_group).sort(dim=1, descending=True).values
    best_groups = scores.reshape(table.shape).sum(1).argsort(descending=True, stable=True)
    kept = table[best_groups].cumsum(0).cumsum(1)  # (KV groups, heads per group)
    cut = [float(kept[-1, -1] - kept[(p.num_key_value_heads or 1) - 1, p.heads_per_group - 1]) for p in pairs]
    return np.maximum(cut, 0.0)


def channels_cut(scores: torch.Tensor | None, sizes: Sequence[int]) -> np.ndarray:
    """The sum of the scores (FFN channels,) that a layer loses at each FFN size: (sizes,)."""
    if scores is None:
        return np.zeros(len(sizes))
    kept = scores.sort(descending=True).values.cumsum(0)
    return np.maximum([float(kept[-1] - kept[size - 1]) for size in sizes], 0.0)


def loss_curve(points: Mapping[float, float]) -> Callable[[np.ndarray], np.ndarray]:
    """
    From sums of scores to losses: straight lines between measured points, both axes logarithmic; the sums themselves
    without any.

    Args:
        points: losses by the sum of scores, both above 0.
    """
    if not points:
        return lambda sums: np.asarray(sums, dtype=float)
    knots = np.log(sorted(points))
    heights = np.maximum.accumulate([np.log(points[key]) for key in sorted(points)])

    def curve(sums: np.ndarray) -> np.ndarray:
        logs = np.log(np.maximum(sums, 1e-30))
        # Beyond the measured points loss is proportional to the sum.
        outside = np.minimum(logs - knots[0], 0) + np.maximum(logs - knots[-1], 0)
        return np.where(sums > 0, np.exp(np.interp(logs, knots, heights) + outside), 0.0)

    return curve
