"""Gates on whole layers: where a factor is linear, they multiply; where a layer norms its sum, they blend."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import KINDS, ROWS, Row, build, difference, gate, inputs_of, logits_of, scattered_plan, shuffle_gates
from families import FURTHER
from peft import PeftModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from zoo import ZOO

from hawada_peft import HawAdaConfig, Plan, Shape, collect_gates
from hawada_peft.errors import InvalidPlanError, UnsupportedModelError
from hawada_peft.gates.adapter import BLOCK, LAYER, GateAdapter
from hawada_peft.gates.branches import branches_of
from hawada_peft.gates.concrete import BlockAdapter
from hawada_peft.gates.kinds import BlendGate
from hawada_peft.gates.scaling import scale
from hawada_peft.vanilla.family import locate, register_family
from hawada_peft.vanilla.modules import norm_offset

ALL = ROWS | KINDS | FURTHER
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")
EXPECTED = {
    "llama": PROJECTIONS,
    "gemma": PROJECTIONS,
    "phi3": PROJECTIONS,
    "dinov2": ("attention.o_proj", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "gemma2": BEHIND,
    "gemma3_text": BEHIND,
    "exaone4": BEHIND,
    "olmo2": BEHIND,
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "bert": (),
    "distilbert": (),
    "wav2vec2": (),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_branches_are_where_a_factor_is_linear(name: str) -> None:
    model = build(ALL[name])
    state = torch.get_rng_state()
    assert branches_of(locate(model)) == EXPECTED[name]
    assert torch.equal(torch.get_rng_state(), state)


def test_towers_of_another_dtype_are_no_obstacle() -> None:
    kind = ZOO["llava"]
    config = kind.make_config()
    config.vision_config.dtype = torch.bfloat16  # as it is in what `from_pretrained` gives
    assert branches_of(locate(kind.model_class(config))) == PROJECTIONS


def test_a_row_may_name_them(rows_of_families: None) -> None:
    model = build(ROWS["llama"])
    register_family("llama", replace(locate(model).family, branches=()))
    gates = collect_gates(gate(model, gates=("layers",)))
    assert all(isinstance(each, BlendGate) for each in gates.values())
    assert len(gates) == 4


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4", "exaone4", "bert"])
def test_gates_of_layers_are_alive(name: str) -> None:
    """A factor before a norm is undone by it: gradients of 1e-6 of what head gates have."""
    model = gate(
        build(ALL[name], torch.float64), shuffle=False, gates=("ffn" if name == "bert" else "heads", "layers")
    )
    logits_of_training = model(**inputs_of(model))[0]
    logits_of_training.square().mean().backward()
    means = {}
    for slot in ("hawada_units", LAYER):
        found = [g.theta.grad.abs().mean() for n, g in collect_gates(model).items() if n.split(".")[-2] == slot]
        means[slot] = torch.stack(found).mean()
    assert means[LAYER] > 0.1 * means["hawada_units"]


def test_a_norm_takes_the_factor_into_its_weight() -> None:
    norm = Gemma2RMSNorm(8).requires_grad_(False)
    norm.weight.normal_()
    assert norm_offset(norm) == 1
    adapter = BlockAdapter(norm, inference_mode=True).eval()
    adapter.gates("default")[BLOCK].theta.data.fill_(0.3)
    x = torch.randn(2, 3, 8)
    expected = scale(norm(x), adapter.gates("default")[BLOCK].features().detach())
    assert difference(adapter(x), expected) < 1e-6
    adapter.merge()
    assert difference(norm(x), expected) < 1e-6
    adapter.unmerge()
    assert difference(adapter.train()(x), expected) < 1e-6


def bert(**options: object) -> PeftModel:
    return gate(build(KINDS["bert"], torch.float64), **options)


def layer_gate(model: PeftModel, layer: int, name: str = "default") -> BlendGate:
    end = model.get_base_model().get_submodule(locate(model.get_base_model()).attention_out(layer))
    found = end.gates(name)[LAYER]
    assert isinstance(found, BlendGate)
    return found


def test_a_soft_gate_blends_and_hidden_states_say_so() -> None:
    model = bert(gates=("layers",))
    inputs = inputs_of(model)
    states = model(**inputs, output_hidden_states=True).hidden_states
    part = layer_gate(model, 1).features()
    layer = model.get_base_model().bert.encoder.layer[1]
    with model.disable_adapter():
        own = layer(states[1])
    torch.testing.assert_close(states[2], part * own + (1 - part) * states[1])


def test_under_a_plan_layers_are_there_or_gone() -> None:
    model = bert(gates=("layers",))
    everything = Plan.keep_all(locate(model.get_base_model()).dense)
    plan = Plan(everything.dense, (0, 2), everything.heads[:2], everything.channels[:2])
    model.apply_plan(plan)
    assert [float(layer_gate(model, layer).features().detach()) for layer in range(4)] == [1, 0, 1, 0]
    states = model(**inputs_of(model), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])
    model.apply_plan(everything)
    dense = logits_of(build(KINDS["bert"], torch.float64))
    assert torch.equal(logits_of(model), dense)
    model.apply_plan(None)
    assert difference(logits_of(model), dense) > 1e-3


def test_soft_values_are_never_folded_silently() -> None:
    model = bert(gates=("layers",))
    before = logits_of(model)
    with pytest.raises(InvalidPlanError, match="it blends a layer's output and input"):
        model.merge_and_unload()
    assert torch.equal(logits_of(model), before)
    model.merge_adapter()  # still in the model, and so still applied
    assert torch.equal(logits_of(model), before)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="removed nothing"):
        gate(build(KINDS["bert"]), shuffle=False).merge_and_unload()


def test_towards_a_plan_what_stays_counts_in_full_and_has_gradients() -> None:
    found = BlendGate(relative=True)
    found.theta.data.fill_(-1.0)
    found.set_plan(torch.tensor([True]))
    assert found.features().detach() == 1
    found.features().sum().backward()
    assert float(found.theta.grad) > 0


def test_blocks_are_refused_where_none_is_a_summand() -> None:
    with pytest.raises(UnsupportedModelError, match="leave 'blocks' out"):
        bert(gates=("ffn", "blocks"))


def test_two_adapters_and_one_per_row() -> None:
    model = bert(gates=("ffn", "layers"))
    first = logits_of(model)
    model.add_adapter("second", HawAdaConfig(gates=("layers",)))
    model.set_adapter("second")
    shuffle_gates(model, "second", seed=5)
    second = logits_of(model.eval())
    assert difference(second, first) > 1e-3
    mixed = model(**inputs_of(model), adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed[0], second[0])
    torch.testing.assert_close(mixed[1], first[1])
    assert torch.equal(logits_of(model), second)


def test_a_copy_blends_by_its_own_gates() -> None:
    model = bert(gates=("layers",))
    copied = copy.deepcopy(model)
    before = logits_of(model)
    assert torch.equal(logits_of(copied), before)
    for found in collect_gates(copied).values():
        found.theta.data.add_(1.0)
    assert torch.equal(logits_of(model), before)
    assert difference(logits_of(copied), before) > 1e-4


@pytest.mark.parametrize("way", ["unload", "merge"])
def test_nothing_stays_behind(way: str) -> None:
    model = bert()
    base = model.get_base_model()
    model.apply_plan(scattered_plan(model, Shape(8, 8, 40, 2)))
    left = [model.unload()] if way == "unload" else [model.merge_and_unload(), base]
    for each in left:
        assert not any(isinstance(module, GateAdapter) for module in each.modules())
        assert not any(layer._forward_hooks for layer in each.bert.encoder.layer)


@pytest.mark.parametrize("row", [KINDS["olmo2"], FURTHER["olmo3"]], ids=["olmo2", "olmo3"])
def test_a_norm_over_all_heads_knows_those_that_stay(row: Row) -> None:
    model = gate(build(row, torch.float64), gates=("heads",))
    model.add_adapter("second", HawAdaConfig(gates=("heads",)))
    model.eval()
    masked = {}
    for seed, name in enumerate(("default", "second")):
        model.apply_plan(scattered_plan(model, Shape(4, 2), seed=seed), adapter_name=name)
        model.set_adapter(name)
        masked[name] = logits_of(model)
    mixed = model(**inputs_of(model), adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([masked["second"][0], masked["default"][1]]))
    assert difference(logits_of(model.merge_and_unload()), masked["second"]) < 1e-12
