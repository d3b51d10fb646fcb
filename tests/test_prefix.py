"""Passes from the first layer on that computes anew, against whole passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KINDS, ROWS, VISION_ROW, Row, build, families, gate, inputs_of
from torch import nn

from hawada_peft import Shape
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.vanilla.prefix import Prefix

BACKBONE = Row("Dinov2Backbone", "Dinov2Config", VISION_ROW.fields | {"mlp_ratio": 2, "out_indices": [1, 4]}, Shape())
"""Its outputs are gathered by hooks on its layers."""


@pytest.mark.parametrize("name", [*families(ROWS | KINDS), "backbone"])
@pytest.mark.usefixtures("rows_of_families")
def test_layers_are_dropped_by_the_losses_of_whole_passes(name: str) -> None:
    model = gate(build((ROWS | KINDS | {"backbone": BACKBONE})[name]))
    batch = inputs_of(model)
    quality = MaskedQuality(model, [batch, {key: value.flip(0) for key, value in batch.items()}])
    base, layout = model.get_base_model(), quality.layout
    layers: Any = base.get_submodule(layout.stack)
    real, hooked, calls = list(layers), [len(each._forward_hooks) for each in layers], list[int]()
    for at in range(len(layers)):
        base.get_submodule(layout.ffn_out(at)).register_forward_hook(lambda *_, at=at: calls.append(at))
    quality.drop_order(2)
    assert list(layers) == real
    assert [len(each._forward_hooks) for each in layers] == hooked
    assert len(calls) < 2 / 3 * 2 * 4 * len(quality.measured)  # of whole passes through 4 layers on both batches
    for plan, found in quality.measured.items():
        assert found == quality._mean_of(plan, quality.references, None)


class Adder(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden_states: torch.Tensor, written: dict[str, Any] | None = None) -> torch.Tensor:
        if written is not None:
            written["seen"] = written.get("seen", 0) + 1
        return hidden_states + self.value


class Stack(nn.Module):
    def __init__(self, times: int, written: Callable[[], dict[str, Any] | None]) -> None:
        super().__init__()
        self.layers, self.times, self.written = nn.ModuleList(map(Adder, range(1, 5))), times, written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written = self.written()
        for layer in [*self.layers] * self.times:
            x = layer(x, written=written)
        return x if written is None else x + 100 * written["seen"]


@pytest.mark.parametrize(("times", "writes"), [(1, False), (2, False), (1, True)], ids=["plain", "twice", "writing"])
def test_nothing_is_passed_on_that_is_not_all_there_is(times: int, writes: bool) -> None:
    """A layer that is dropped adds nothing: here it is told so after the pass."""
    model = Stack(times, lambda: {} if writes else None)
    prefix, x = Prefix(model.layers, (), 2**20), torch.zeros(2)
    values = [each.value for each in model.layers]
    for layer in (3, 2, 1):
        model.layers[layer].value = 0
        expected = model(x)
        with prefix.passing(0, layer):
            assert torch.equal(model(x), expected)
        model.layers[layer].value = values[layer]
    assert bool(prefix._known[0]) == (times == 1 and not writes)


def test_no_more_is_kept_than_there_is_room_for() -> None:
    model = Stack(1, lambda: None)
    prefix, x = Prefix(model.layers, (), 20), torch.zeros(2)
    for number in range(2):
        with prefix.passing(number, 3):
            model(x)
    assert [len(prefix._known[number]) for number in range(2)] == [2, 0]
    prefix.drop(1)
    with prefix.passing(1, 3):
        assert torch.equal(model(x), torch.full((2,), 1.0 + 2 + 3 + 4))
    assert [len(prefix._known[number]) for number in range(2)] == [1, 1]
