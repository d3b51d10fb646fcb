"""Sigmoid gates by themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hawada_peft.errors import HawAdaError
from hawada_peft.gates import BlockGate, ChannelGate, HeadGate, SigmoidGate
from hawada_peft.gates.kinds import GateStart


def shuffled(gate: SigmoidGate) -> SigmoidGate:
    torch.nn.init.normal_(gate.theta)
    return gate.eval()


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_value_is_the_sigmoid_of_theta_over_temperature(temperature: float) -> None:
    gate = shuffled(SigmoidGate(5, start=GateStart(temperature=temperature)))
    torch.testing.assert_close(gate.value(), torch.sigmoid(gate.theta / temperature))
    assert gate.value().min() >= 0 <= gate.value().max() <= 1


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("value", [0.5, 0.9, 0.98])
def test_starts_at_the_start_value(temperature: float, value: float) -> None:
    gate = SigmoidGate(3, start=GateStart(temperature=temperature, value=value))
    torch.testing.assert_close(gate.value(), torch.full((3,), value), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_relative_gate_starts_as_exactly_one(dtype: torch.dtype, temperature: float) -> None:
    start = GateStart(temperature=temperature, value=0.93)
    gate = SigmoidGate(17, start=start, relative=True).to(dtype)
    x = torch.randn(2, 17).to(dtype)
    assert torch.equal(gate(x), x)


def test_relative_gate_starts_as_exactly_one_after_every_move() -> None:
    gate, x = SigmoidGate(17, start=GateStart(value=0.93), relative=True), torch.randn(2, 17)
    with torch.inference_mode():
        assert torch.equal(gate(x), x)
    gate(x).sum().backward()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert torch.equal(gate.to(dtype)(x), x)
    assert torch.equal(copy.deepcopy(gate)(x), x)


def test_random_start_is_far_from_one_and_from_each_other() -> None:
    values = SigmoidGate(64, start=GateStart(random=True)).value()
    assert values.std() > 0.1


@pytest.mark.parametrize("layout", [(5,), (2, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_broadcasts_along_the_last_axis(layout: tuple[int, ...]) -> None:
    gate, x = shuffled(SigmoidGate(5)), torch.randn(layout)
    torch.testing.assert_close(gate(x), x * gate.value())


@pytest.mark.parametrize(
    ("dim", "view"), [(-1, (1, 1, 1, 5)), (-3, (1, 5, 1, 1)), (1, (1, 5, 1, 1)), (0, (5, 1, 1, 1))]
)
def test_gates_any_axis(dim: int, view: tuple[int, ...]) -> None:
    gate, x = shuffled(SigmoidGate(5, dim=dim)), torch.randn(5, 5, 5, 5)
    torch.testing.assert_close(gate(x), x * gate.value().reshape(view))


def test_shape_of_several_axes() -> None:
    gate, x = shuffled(SigmoidGate((4, 3))), torch.randn(2, 4, 3)
    assert gate.units == 12
    torch.testing.assert_close(gate(x), x * gate.value())


@pytest.mark.parametrize("group", [1, 2, 6])
def test_channel_gate_scales_groups(group: int) -> None:
    gate, x = shuffled(ChannelGate(12, group)), torch.randn(3, 12)
    assert gate.theta.shape == (12 // group,)
    torch.testing.assert_close(gate(x), x * gate.value().repeat_interleave(group))


def test_head_gate_scales_heads() -> None:
    gate, x = shuffled(HeadGate(4, 8)), torch.randn(2, 3, 32)
    expected = x.reshape(2, 3, 4, 8) * gate.value()[:, None]
    torch.testing.assert_close(gate(x), expected.reshape(2, 3, 32))


def test_block_gate_scales_everything() -> None:
    gate, x = shuffled(BlockGate()), torch.randn(2, 3, 4)
    torch.testing.assert_close(gate(x), x * gate.value())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    gate, x = shuffled(SigmoidGate(5)), torch.randn(2, 5).to(dtype)
    assert gate(x).dtype == dtype
    assert gate.value().dtype == torch.float32


def test_half_precision_product_is_rounded_once() -> None:
    gate, x = shuffled(SigmoidGate(64)), torch.randn(8, 64).to(torch.bfloat16)
    assert torch.equal(gate(x), (x.float() * gate.value()).to(torch.bfloat16))


def test_plan_closes_in_evaluation_only() -> None:
    gate, x = shuffled(SigmoidGate(3)), torch.ones(3)
    gate.set_plan(torch.tensor([True, False, True]))
    assert torch.equal(gate(x), gate.value() * torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(gate.train()(x), gate.value())


def test_plan_closes_in_training_when_asked() -> None:
    gate = shuffled(SigmoidGate(3)).train()
    gate.set_plan(torch.tensor([True, False, True]), in_training=True)
    gate(torch.ones(3)).sum().backward()
    assert [bool(g) for g in gate.theta.grad != 0] == [True, False, True]


def test_plan_can_be_lifted() -> None:
    gate, x = shuffled(SigmoidGate(3)), torch.ones(3)
    gate.set_plan(torch.zeros(3), in_training=True)
    gate.set_plan(None)
    assert torch.equal(gate(x), gate.value())
    assert torch.equal(gate.train()(x), gate.value())


def test_state_dict_holds_theta_alone() -> None:
    gate = SigmoidGate(3)
    gate.set_plan(torch.ones(3))
    assert set(gate.state_dict()) == {"theta"}


def test_start_value_of_an_extreme_gate_is_finite() -> None:
    assert math.isfinite(GateStart(value=1 - 1e-7).theta)


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda: ChannelGate(12, 5), "must divide the 12 features, got 5; possible: \\[1, 2, 3, 4, 6, 12\\]"),
        (lambda: ChannelGate(12, 0), "got 0"),
        (lambda: SigmoidGate(()), "got \\(\\)"),
        (lambda: SigmoidGate((3, 0)), "got \\(3, 0\\)"),
        (lambda: SigmoidGate(3).set_plan(torch.ones(4)), "\\(4,\\), the gate \\(3,\\)"),
        (lambda: GateStart(temperature=-1, value=3), "temperature.*\n.*start value"),
    ],
)
def test_bad_input(make, facts: str) -> None:
    with pytest.raises(HawAdaError, match=facts):
        make()
