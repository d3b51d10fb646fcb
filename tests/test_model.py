"""The tuner: plans, merging, unloading."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import (
    EVERYTHING,
    LM_ROW,
    PLAIN,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from peft import PeftModel, get_peft_model

from hawada_peft import HawAdaConfig, Plan, Shape, collect_gates
from hawada_peft.errors import HawAdaError, IncompatibleBaseError
from hawada_peft.gates import GateAdapter
from hawada_peft.vanilla.family import locate

DENSE = Shape(8, 4, 96, 4)


def planned(**options: Any) -> tuple[PeftModel, Plan]:
    model = gate(build(LM_ROW, torch.float64), **options)
    plan = scattered_plan(model, LM_ROW.slim)
    model.apply_plan(plan)
    return model, plan


@pytest.mark.parametrize(
    ("gates", "slots"),
    [
        (("heads",), {"hawada_units": 4}),
        (("ffn",), {"hawada_units": 4}),
        (("blocks",), {"hawada_block": 8}),
        (("layers",), {"hawada_layer": 4}),
        (EVERYTHING, {"hawada_units": 8, "hawada_block": 8, "hawada_layer": 4}),
    ],
)
def test_only_what_is_named_is_gated(gates: tuple[str, ...], slots: dict[str, int]) -> None:
    found = [name.split(".")[-2] for name in collect_gates(gate(build(LM_ROW), gates=gates))]
    assert {slot: found.count(slot) for slot in found} == slots


@pytest.mark.parametrize("gates", [("blocks",), ("layers",), ("blocks", "layers"), EVERYTHING])
def test_layers_are_dropped_by_either_kind_of_gate(gates: tuple[str, ...]) -> None:
    model = gate(build(LM_ROW, torch.float64), gates=gates)
    model.apply_plan(model.plan(Shape(num_hidden_layers=2)))
    masked = logits_of(model)
    slimmed = model.merge_and_unload()
    assert slimmed.config.num_hidden_layers == 2
    assert difference(logits_of(slimmed), masked) <= 1e-12


def test_group_size_and_temperature_reach_the_gates() -> None:
    model = gate(build(LM_ROW, torch.float64), group_size=8, temperature=0.5, init_value=0.9)
    ffn = next(g for name, g in collect_gates(model).items() if "mlp" in name)
    assert (ffn.units, ffn.group_size, ffn.start.temperature) == (12, 8, 0.5)
    model.apply_plan(model.plan(Shape(4, 2, 40, 2)))
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-12


@pytest.mark.parametrize("options", [{"init_value": 0.6}, {"temperature": 0.3}, {"group_size": 16}])
def test_any_start_leaves_the_output_alone(row: Row, options: dict[str, Any]) -> None:
    model = build(row)
    dense = logits_of(model)
    assert torch.equal(logits_of(gate(model, shuffle=False, **options)), dense)


def test_random_start_changes_the_output() -> None:
    model = build(VISION_ROW)
    dense = logits_of(model)
    assert difference(logits_of(gate(model, shuffle=False, init_weights=False)), dense) > 0.01


def test_group_size_must_divide_the_ffn() -> None:
    with pytest.raises(HawAdaError, match=r"group_size must divide the 96 features, got 7; possible: \[1, 2, 3, 4"):
        gate(build(LM_ROW), group_size=7)


def test_a_config_that_was_used_is_refused_for_another_base() -> None:
    config = HawAdaConfig()
    get_peft_model(build(LM_ROW), config)
    with pytest.raises(IncompatibleBaseError, match="new HawAdaConfig"):
        get_peft_model(build(VISION_ROW), config)


def test_plan_is_soft_in_training_unless_asked() -> None:
    model, plan = planned()
    free = gate(build(LM_ROW, torch.float64)).train()
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).logits, free(**inputs).logits)
        masked = model.eval()(**inputs).logits
        model.apply_plan(plan, in_training=True)
        assert torch.equal(model.train()(**inputs).logits, masked)


def test_plan_can_be_lifted_and_replaced() -> None:
    model, plan = planned()
    masked = logits_of(model)
    other = scattered_plan(model, Shape(2, 2, 24, 3), seed=9)
    model.apply_plan(other)
    assert model.applied_plan() == other
    model.apply_plan(plan)
    assert torch.equal(logits_of(model), masked)
    model.apply_plan(None)
    assert model.applied_plan() is None
    assert torch.equal(logits_of(model), logits_of(gate(build(LM_ROW, torch.float64))))


def test_closed_units_get_no_gradient_under_a_hard_plan() -> None:
    model, plan = planned()
    model.apply_plan(plan, in_training=True)
    model.train()(**inputs_of(model)).logits.square().mean().backward()
    gates = collect_gates(model)
    for position, layer in enumerate(plan.layers):
        gradient = next(g.theta.grad for name, g in gates.items() if f"layers.{layer}.mlp" in name)
        assert gradient.nonzero().flatten().tolist() == list(plan.channels[position])


def test_merging_without_a_plan_warns_and_removes_nothing() -> None:
    model = gate(build(LM_ROW, torch.float64))
    gated = logits_of(model)
    with pytest.warns(UserWarning, match=r"removed nothing, because no plan is applied.*apply_plan"):
        merged = model.merge_and_unload()
    assert locate(merged).dense == DENSE
    assert difference(logits_of(merged), gated) <= 1e-12


def test_merging_with_a_plan_does_not_warn() -> None:
    model, _ = planned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


def test_a_passed_plan_replaces_the_applied_one() -> None:
    model, plan = planned()
    other = scattered_plan(model, Shape(2, 2, 24, 3), seed=9)
    twin = gate(build(LM_ROW, torch.float64))
    twin.apply_plan(other)
    assert difference(logits_of(model.merge_and_unload(plan=other)), logits_of(twin)) <= 1e-12
    assert plan != other


def test_without_folding_the_kept_weights_are_the_dense_ones() -> None:
    base = build(LM_ROW, torch.float64)
    dense = base.model.layers[1].mlp.down_proj.weight.detach().clone()
    model = gate(base)
    plan = scattered_plan(model, LM_ROW.slim)
    model.apply_plan(plan)
    found = model.merge_and_unload(fold=False).model.layers[0].mlp.down_proj.weight
    assert torch.equal(found, dense[:, list(plan.channels[0])])


def test_merging_after_merge_adapter_is_the_same() -> None:
    (model, _), (other, _) = planned(), planned()
    model.merge_adapter()
    assert_same_state(state_of(model.merge_and_unload()), state_of(other.merge_and_unload()))


def test_folding_happens_in_the_weights_that_consume() -> None:
    base = build(LM_ROW)
    before = state_of(base)
    gate(base).merge_adapter()
    after = {name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items()}
    changed = {name.split(".")[-2] for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"o_proj", "down_proj"}


def test_named_modules_of_any_model_fold_exactly() -> None:
    fields = {"vocab_size": 128, "n_embd": 64, "n_head": 8, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}
    base = build(Row("GPT2LMHeadModel", "GPT2Config", fields, PLAIN), torch.float64)
    model = gate(base, target_modules=["c_proj"], group_size=4)
    gated = logits_of(model)
    with pytest.warns(UserWarning, match="removed nothing"):
        merged = model.merge_and_unload()
    assert difference(logits_of(merged), gated) <= 1e-12


def test_modules_can_be_excluded_and_layers_chosen() -> None:
    model = gate(build(LM_ROW), exclude_modules=["mlp.down_proj"], layers_to_transform=[0, 2])
    names = [name for name, module in model.named_modules() if isinstance(module, GateAdapter)]
    assert [name.split("layers.")[1] for name in names] == ["0.self_attn.o_proj", "2.self_attn.o_proj"]


def test_mode_and_class_survive_merging() -> None:
    model, _ = planned()
    merged = model.train().merge_and_unload()
    assert type(merged) is type(build(LM_ROW))
    assert merged.training
