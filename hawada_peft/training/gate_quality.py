"""What shapes cost by the gates alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..gates.reading import UnitScores, expected_sizes, gate_scores
from ..latency.table import LatencyTable
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..search.space import SearchSpace
from ..vanilla.family import Layout
from ..vanilla.shape import Shape


class GateQuality:
    """
    What a shape costs by the gates alone, for the search at the end of training under a constraint.

    The loss of cutting a unit is the probability that it stays, times the latency that its axis has to give: where a
    multiplier has been at work, that is what the gates were weighed against.

    Args:
        model: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_name: whose gates.
        table: milliseconds per size.
    """

    meaning = "by the gates: the probability that what is cut stays, weighed by the latency it has to give"

    def __init__(self, model: nn.Module, layout: Layout, adapter_name: str, table: LatencyTable) -> None:
        self.layout, self.table = layout, table
        self.scores: UnitScores = gate_scores(model, layout, [adapter_name])
        with torch.no_grad():
            self.sizes = expected_sizes(model, layout, adapter_name)

    def nearest(self, space: SearchSpace) -> Shape:
        """The shape whose sizes are nearest to those that the gates expect, relative to the dense ones."""
        groups, per_group, ffn, layers = space.axes
        dense = np.array(list(self.layout.dense.sizes().values()), dtype=float)
        axes = (groups * per_group, groups, ffn, layers)
        distance = sum(
            ((axis - mean) / size) ** 2 for axis, mean, size in zip(axes, self.sizes.mean(), dense, strict=True)
        )
        return space.shape(int(np.argmin(distance)))

    def predict(self, space: SearchSpace) -> np.ndarray:
        """The loss over the space, in parts of the latency: (layers, heads, FFN sizes)."""
        groups, per_group, ffn, layers = space.axes
        heads_total, _, ffn_total, layers_total = self.layout.dense.sizes().values()
        mean_heads, _, mean_ffn, mean_layers = self.sizes.mean()
        dense = self.table.estimate(self.layout.dense)
        smallest = min(space.heads, key=lambda pair: pair.num_attention_heads or 0)
        shares = (
            (dense - self.table.estimate(smallest)) / dense,
            (dense - self.table.estimate(Shape(intermediate_size=space.ffn[0]))) / dense,
            1.0,
        )
        cut = (
            np.maximum(mean_heads - groups * per_group, 0) / heads_total,
            np.maximum(mean_ffn - ffn, 0) / ffn_total,
            np.maximum(mean_layers - layers, 0) / layers_total,
        )
        # What exceeds the expected sizes is closed mass that is kept: it gains little, but more than nothing.
        spare = (
            np.maximum(groups * per_group - mean_heads, 0) / heads_total,
            np.maximum(ffn - mean_ffn, 0) / ffn_total,
            np.maximum(layers - mean_layers, 0) / layers_total,
        )
        loss = sum(share * (part - 0.01 * extra) for share, part, extra in zip(shares, cut, spare, strict=True))
        return np.asarray(loss) - np.min(loss)

    def evaluate(self, shape: Shape) -> float | None:
        """Not measured: the gates have been trained on it."""
        return None

    def plan(self, shape: Shape) -> Plan:
        """What stays at a shape, by the gates."""
        return rank(self.layout, self.scores, shape.complete(self.layout.dense))
