"""A search without models: a space, losses and a machine that obey laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from toys import timing

from hawada_peft import Plan, Shape
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.timing import Timing
from hawada_peft.search.space import SearchSpace
from hawada_peft.vanilla.legality import head_shapes

DENSE = Shape(16, 4, 1024, 8)


def toy_space(dense: Shape = DENSE, ffn: Sequence[int] = range(64, 1025, 64)) -> SearchSpace:
    heads, sizes = tuple(head_shapes(dense)), tuple(ffn)
    layers = tuple(range(1, 9))
    parameters = np.array([n * (p.num_attention_heads * 100 + f * 10) for n in layers for p in heads for f in sizes])
    shape = (len(layers), len(heads), len(sizes))
    return SearchSpace(dense, layers, heads, sizes, parameters.reshape(shape).astype(float), np.zeros(shape))


class ToyQuality:
    """Loss grows with the square of what is cut on each axis."""

    meaning = "squares of what is cut"

    def __init__(self, *, measurable: bool = True) -> None:
        self.measurable, self.evaluated = measurable, []

    def predict(self, space: SearchSpace) -> np.ndarray:
        groups, per_group, ffn, layers = space.axes
        return (1 - groups * per_group / 16) ** 2 + (1 - ffn / 1024) ** 2 + (1 - layers / 8) ** 2 + 0.01

    def evaluate(self, shape: Shape) -> float | None:
        self.evaluated.append(shape)
        heads, _, ffn, layers = shape.sizes().values()
        loss = (1 - heads / 16) ** 2 + (1 - ffn / 1024) ** 2 + (1 - layers / 8) ** 2 + 0.01
        return loss if self.measurable else None

    def plan(self, shape: Shape) -> Plan:
        return Plan.keep_all(shape.complete(DENSE))


class Machine:
    """Takes `factor` times what a table says, and another speed each time it is asked."""

    def __init__(self, table: LatencyTable, factor: float = 1.0) -> None:
        self.table, self.factor, self.rounds = table, factor, 0

    def ms(self, shape: Shape) -> float:
        dense = self.table.estimate(DENSE)
        return self.table.estimate(shape) * (
            1 if shape == DENSE else 1 + (self.factor - 1) * (1 - self.table.estimate(shape) / dense)
        )

    def __call__(self, shapes: Sequence[Shape]) -> dict[Shape, Timing]:
        self.rounds += 1
        speed = 1 + 0.2 * (self.rounds % 3)
        return {shape: timing(self.ms(shape) * speed) for shape in (*shapes, DENSE)}
