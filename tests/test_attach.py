"""Adapters on any module tree, without PEFT."""

from __future__ import annotations

import pytest
import torch
from conftest import Row, assert_same_state, build, difference, gate, logits_of, state_of
from torch import nn

from hawada_peft import attach_adapters, collect_gates
from hawada_peft.errors import UnsupportedModelError
from hawada_peft.gates import (
    AttentionHeadAdapter,
    BlockAdapter,
    ChannelAdapter,
    GateAdapter,
    HeadGate,
    detach_adapters,
    is_attention_layer,
    is_ffn_layer,
)
from hawada_peft.vanilla.family import locate


def shuffled(model: nn.Module) -> nn.Module:
    for found in collect_gates(model).values():
        nn.init.normal_(found.theta)
    return model


def adapters_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, GateAdapter)}


@pytest.fixture
def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Conv1d(8, 2, 1)).eval()


def test_default_places_head_gates_on_every_attention(row: Row) -> None:
    model = attach_adapters(build(row))
    layout = locate(model)
    layers = range(layout.dense.num_hidden_layers)
    assert adapters_of(model) == {layout.attention_out(layer) for layer in layers}
    assert {(type(g), g.units) for g in collect_gates(model).values()} == {(HeadGate, 8)}


def test_filters_find_the_ends_of_every_family(row: Row) -> None:
    model = build(row)
    layout = locate(model)
    for selects, end in ((is_attention_layer, layout.attention_out), (is_ffn_layer, layout.ffn_out)):
        found = [name for name, module in model.named_modules() if selects(name, module)]
        assert found == [end(layer) for layer in range(4)]


def test_attach_then_detach_leaves_nothing(row: Row) -> None:
    model = build(row)
    before, dense = state_of(model), logits_of(model)
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    shuffled(attach_adapters(attach_adapters(model), ChannelAdapter, is_ffn_layer))
    assert difference(logits_of(model), dense) > 0.01
    assert detach_adapters(model) is model
    assert_same_state(state_of(model), before)
    assert torch.equal(logits_of(model), dense)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_base_state_dict_loads_strictly(row: Row) -> None:
    model = build(row)
    state = state_of(model)
    attached = shuffled(attach_adapters(build(row).train(), start=None))
    thetas = {name: found.theta.clone() for name, found in collect_gates(attached).items()}
    for parameter in detached_parameters(attached):
        parameter.data.zero_()
    attached.load_state_dict(dict(state), strict=True)
    assert all(torch.equal(found.theta, thetas[name]) for name, found in collect_gates(attached).items())
    assert_same_state(state_of(detach_adapters(attached)), state)


def detached_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not name.endswith("theta")]


def test_its_own_state_dict_loads_as_well(mlp: nn.Sequential) -> None:
    state = state_of(shuffled(attach_adapters(mlp, ChannelAdapter, nn.Linear)))
    for parameter in mlp.parameters():
        parameter.data.zero_()
    mlp.load_state_dict(state, strict=True)
    assert_same_state(state_of(mlp), state)


def test_missing_weights_are_still_noticed(mlp: nn.Sequential) -> None:
    state = state_of(mlp)
    del state["2.weight"]
    attach_adapters(mlp, ChannelAdapter, nn.Linear)
    with pytest.raises(RuntimeError, match=r"Missing key.*2\."):
        mlp.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("filter_fn", "expected"),
    [
        (nn.Linear, {"0", "2"}),
        ((nn.Conv1d, nn.Linear), {"0", "2", "4"}),
        (r"[24]", {"2", "4"}),
        (lambda name, module: name == "2", {"2"}),
    ],
    ids=["type", "types", "expression", "function"],
)
def test_filters(mlp: nn.Sequential, filter_fn, expected: set[str]) -> None:
    assert adapters_of(attach_adapters(mlp, ChannelAdapter, filter_fn)) == expected


def test_gates_start_below_one_and_scale(mlp: nn.Sequential) -> None:
    x = torch.randn(3, 4)
    before = mlp[0](x)
    attach_adapters(mlp, BlockAdapter, r"0")
    torch.testing.assert_close(mlp[0](x), before * collect_gates(mlp)["0.hawada_block.default"].value())


def test_detaching_unmerges(mlp: nn.Sequential) -> None:
    before = state_of(mlp)
    shuffled(attach_adapters(mlp, ChannelAdapter, nn.Linear))
    mlp[0].merge()
    assert_same_state(state_of(detach_adapters(mlp)), before)


def test_gates_are_collected_by_adapter_name(mlp: nn.Sequential) -> None:
    attach_adapters(mlp, ChannelAdapter, r"0", adapter_name="a", group_size=2)
    attach_adapters(mlp, BlockAdapter, r"2", adapter_name="b")
    assert list(collect_gates(mlp)) == ["0.hawada_units.a", "2.hawada_block.b"]
    assert list(collect_gates(mlp, "b")) == ["2.hawada_block.b"]


def test_the_tuner_uses_the_same_adapters(row: Row) -> None:
    model = gate(build(row), gates=("heads",))
    found = {type(module) for module in model.modules() if isinstance(module, GateAdapter)}
    assert found == {AttentionHeadAdapter}
    detach_adapters(model)
    assert not adapters_of(model)


def test_mode_of_the_module_is_kept(mlp: nn.Sequential) -> None:
    assert not attach_adapters(mlp, ChannelAdapter, nn.Linear)[0].training


@pytest.mark.parametrize("filter_fn", [r"nothing", nn.Embedding])
def test_a_filter_that_selects_nothing_is_refused(mlp: nn.Sequential, filter_fn) -> None:
    with pytest.raises(UnsupportedModelError, match=r"selects no module of this Sequential.*\['0', '2', '4'\]"):
        attach_adapters(mlp, ChannelAdapter, filter_fn)


def test_a_module_that_cannot_be_gated_is_refused(mlp: nn.Sequential) -> None:
    with pytest.raises(UnsupportedModelError, match="ReLU is not supported"):
        attach_adapters(mlp, ChannelAdapter, nn.ReLU)


def test_a_refused_attachment_changes_nothing(mlp: nn.Sequential) -> None:
    with pytest.raises(UnsupportedModelError):
        attach_adapters(mlp, ChannelAdapter, (nn.Linear, nn.ReLU))
    assert not adapters_of(mlp)
