"""The product of activations and factors: values, gradients, and what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, build, gate, inputs_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from hawada_peft import collect_gates
from hawada_peft.gates import BlockGate, ChannelGate, HeadGate, SigmoidGate
from hawada_peft.gates.adapter import BLOCK, LAYER
from hawada_peft.gates.concrete import BlockAdapter, ChannelAdapter
from hawada_peft.gates.kinds import GateStart
from hawada_peft.gates.scaling import scale, scale_rows

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [
    ((5,), (5,), -1),
    ((7, 3, 5), (5,), -1),
    ((7, 3, 5), (3, 5), -1),
    ((7, 5, 4, 6), (5,), 1),
    ((7, 5, 4, 6), (5,), -3),
    ((5, 3), (5,), 0),
    ((7, 3, 5), (1,), -1),
    ((7, 3, 5), (7, 1, 5), -1),
    ((0, 3, 5), (5,), -1),
    ((0,), (1,), -1),
]


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(True)


def kept_by(call) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a call returns, and the tensors it keeps for the backward pass."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), kept


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "factor_shape", "dim"), LAYOUTS)
def test_product_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], factor_shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    x, factor = half(*shape, dtype=dtype), torch.rand(factor_shape, requires_grad=True)
    exact_x, exact_factor = (t.detach().double().requires_grad_(True) for t in (x, factor))
    found, expected = scale(x, factor, dim), scale(exact_x, exact_factor, dim)
    upstream = torch.randn(shape).to(dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    assert found.dtype == x.grad.dtype == dtype
    assert torch.equal(found, (x.float() * exact_factor.float().reshape(factor_of(found, factor, dim))).to(dtype))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=rounding, atol=0)
    assert factor.grad.dtype == torch.float32
    terms = float((upstream.double() * exact_x.detach()).abs().sum())
    assert float((factor.grad - exact_factor.grad).abs().max()) <= rounding * terms


def factor_of(x: torch.Tensor, factor: torch.Tensor, dim: int) -> tuple[int, ...]:
    return (*factor.shape, *(1,) * (x.ndim - 1 - dim % x.ndim))


def test_gradient_of_the_factor_is_summed_in_float32() -> None:
    x, factor = torch.ones(4096, 2, dtype=torch.bfloat16), torch.ones(2, requires_grad=True)
    scale(x, factor).sum().backward()
    assert factor.grad.tolist() == [4096.0, 4096.0]  # bfloat16 would stop counting at 256


def test_float16_terms_neither_overflow_nor_vanish() -> None:
    x, factor = torch.tensor([[3e4, 1e-4]], dtype=torch.float16), torch.ones(2, requires_grad=True)
    scale(x, factor).backward(torch.tensor([[4.0, 1e-4]], dtype=torch.float16))
    torch.testing.assert_close(factor.grad, torch.tensor([1.2e5, 1e-8]), rtol=2e-2, atol=0)


def test_float16_gradient_of_many_rows() -> None:
    x, upstream = (torch.randn(2100, 2048).to(torch.float16) for _ in range(2))  # more than one slice
    factor = torch.ones(2048, requires_grad=True)
    scale(x, factor).backward(upstream)
    torch.testing.assert_close(factor.grad, (x.float() * upstream.float()).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "made", [ChannelGate(12), ChannelGate(12, 4), HeadGate(4, 3), BlockGate(), SigmoidGate((2, 12))], ids=repr
)
def test_gradient_of_every_kind_of_gate(made: SigmoidGate) -> None:
    nn.init.normal_(made.theta)
    x, upstream = half(9, 2, 12), torch.randn(9, 2, 12).to(torch.bfloat16)
    made(x).backward(upstream)
    found, made.theta.grad = made.theta.grad, None
    made(x.detach().float()).backward(upstream.float())
    torch.testing.assert_close(found, made.theta.grad, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", HALVES)
def test_untrained_relative_gate_is_the_identity_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    untrained, x = HeadGate(4, 3, start=GateStart(value=0.9), relative=True), half(5, 12, dtype=dtype)
    upstream = torch.randn(5, 12).to(dtype)
    y = untrained(x)
    y.backward(upstream)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, upstream)


def test_channels_last_stays_channels_last() -> None:
    x = half(2, 8, 3, 3).detach().to(memory_format=torch.channels_last).requires_grad_(True)
    factor = torch.rand(8, requires_grad=True)
    y = scale(x, factor, -3)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(factor.grad, x.detach().float().sum((0, 2, 3)), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("of_factor", [True, False])
def test_keeps_only_what_a_gradient_needs(of_x: bool, of_factor: bool) -> None:
    x, factor = torch.randn(16, 8).to(torch.bfloat16), torch.rand(8)
    x.requires_grad_(of_x)
    factor.requires_grad_(of_factor)
    y, kept = kept_by(lambda: scale(x, factor))
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()] * of_factor + [factor.data_ptr()] * of_x
    assert y.requires_grad == (of_x or of_factor)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None, factor.grad is not None) == (of_x, of_factor)


def test_rows_of_half_precision_keep_no_wide_copy() -> None:
    x, factors = half(3, 4, 8), torch.rand(3, 8, requires_grad=True)
    y, kept = kept_by(lambda: scale_rows(x, factors, -1))
    y.sum().backward()
    assert {tensor.dtype for tensor in kept if tensor.numel() >= x.numel()} == {torch.bfloat16}
    torch.testing.assert_close(factors.grad, x.detach().float().sum(1), rtol=0, atol=0.05)


def test_can_be_differentiated_twice() -> None:
    x, factor = half(4, 8), torch.rand(8, requires_grad=True)
    (first,) = torch.autograd.grad(scale(x, factor).float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), factor)
    torch.testing.assert_close(second, (4 * x.detach().float() * factor.detach()).sum(0), rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_without_a_break(dtype: torch.dtype) -> None:
    eager, x = ChannelGate(8, 2, relative=True), half(4, 8, dtype=dtype)
    nn.init.normal_(eager.theta)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    results = []
    for call in (eager, compiled):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.sum(), [x, eager.theta])))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    adapter, x = ChannelAdapter(nn.Linear(8, 8, dtype=torch.bfloat16)), half(4, 8)
    theta = adapter.gates("default")["hawada_units"].theta
    adapter(x).sum().backward()
    expected = x.grad, theta.grad
    x.grad = theta.grad = None
    checkpoint(adapter, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(theta.grad, expected[1])


def test_autocast_gives_gates_their_gradients() -> None:
    model = gate(build(LM_ROW)).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs_of(model))["logits"].float().square().mean().backward()
    gradients = [found.theta.grad for found in collect_gates(model).values()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


# ------------------------------------------------------------------ gates on the output


def with_whole_gates(base: nn.Module) -> ChannelAdapter:
    """Gates on the input, and two on the whole output, at random values."""
    made = ChannelAdapter(base).gates("default") | {BLOCK: BlockGate(), LAYER: BlockGate()}
    adapter = ChannelAdapter(base, gates=made)
    for found in made.values():
        nn.init.normal_(found.theta)
    return adapter


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda b: nn.Linear(8, 4, bias=b), lambda b: nn.Conv1d(8, 4, 3, padding=1, bias=b)],
    ids=["linear", "conv"],
)
def test_gates_on_the_output_scale_it_with_its_bias(make, bias: bool) -> None:
    base = make(bias).double()
    adapter, x = with_whole_gates(base).double(), torch.randn(3, 8, 8, dtype=torch.float64)
    inputs, output = adapter.input_factor(["default"]), adapter.output_factor(["default"])
    expected = base(scale(x, inputs, -1 if isinstance(base, nn.Linear) else -2)) * output
    torch.testing.assert_close(adapter(x), expected)
    gates = adapter.gates("default")
    found, wanted = (
        torch.autograd.grad(y.square().sum(), [g.theta for g in gates.values()]) for y in (adapter(x), expected)
    )
    torch.testing.assert_close(found, wanted)


def test_without_a_bias_no_output_is_kept() -> None:
    base, x = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False), half(32, 64)
    _, kept = kept_by(lambda: with_whole_gates(base)(x))
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel() and t.data_ptr() != base.weight.data_ptr()] == [
        x.data_ptr()
    ]


def test_two_gates_on_an_output_are_one_pass() -> None:
    base, x = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False), half(32, 64)
    adapter = BlockAdapter(base, gates={BLOCK: BlockGate(), LAYER: BlockGate()})
    _, kept = kept_by(lambda: adapter(x))
    assert len([t for t in kept if t.shape == x.shape]) == 1


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["without bias", "with bias"])
def test_closed_layers_add_exactly_nothing(row) -> None:
    model = gate(build(row, torch.bfloat16))
    for name, found in collect_gates(model).items():
        if LAYER in name:
            found.set_plan(torch.zeros(1))
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _layer, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    model(**inputs_of(model))
    assert len(seen) == len(layers)
    assert all(torch.equal(into, out) for into, out in seen)
