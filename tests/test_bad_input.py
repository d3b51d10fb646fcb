"""What the tuner refuses, and that nothing has been changed by then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    LM_ROW,
    VISION_ROW,
    assert_same_state,
    build,
    difference,
    gate,
    logits_of,
    scattered_plan,
    state_of,
)
from peft import PeftModel

from hawada_peft import Shape, collect_gates
from hawada_peft.errors import BrokenGatesError, IllegalShapeError, IncompatibleBaseError, InvalidPlanError


def nan_gates() -> PeftModel:
    model = gate(build(VISION_ROW))
    next(iter(collect_gates(model).values())).theta.data[0] = float("nan")
    return model


@pytest.mark.parametrize("fold", [True, False])
def test_nan_gates_are_refused_with_a_plan_and_nothing_changes(fold: bool) -> None:
    model = nan_gates()
    plan = scattered_plan(model, VISION_ROW.slim)
    before = state_of(model)
    with pytest.raises(BrokenGatesError, match="NaN"):
        model.merge_and_unload(plan=plan, fold=fold)
    after = state_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not tensor.isnan().any())


@pytest.mark.filterwarnings("ignore:merge_and_unload folded the gates")
def test_nan_gates_are_refused_without_a_plan() -> None:
    with pytest.raises(BrokenGatesError, match="NaN"):
        nan_gates().merge_and_unload()


@pytest.mark.parametrize("use", ["apply_plan", "merge_and_unload"])
def test_plan_for_another_base_is_refused(use: str) -> None:
    plan = scattered_plan(build(LM_ROW), LM_ROW.slim)
    model = gate(build(LM_ROW, intermediate_size=128))
    before = state_of(model)
    with pytest.raises(IncompatibleBaseError, match="intermediate_size: plan 96, model 128"):
        model.apply_plan(plan) if use == "apply_plan" else model.merge_and_unload(plan=plan)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("use", ["apply_plan", "merge_and_unload"])
def test_plan_of_an_illegal_shape_is_refused(use: str) -> None:
    model = gate(build(LM_ROW))
    plan = scattered_plan(model, Shape(6, 3))
    with pytest.raises(IllegalShapeError, match=r"possible.*\(4, 4\)"):
        model.apply_plan(plan) if use == "apply_plan" else model.merge_and_unload(plan=plan)
    assert model.applied_plan() is None


@pytest.mark.parametrize(
    ("options", "shape", "facts"),
    [
        ({"gates": ("heads",)}, Shape(intermediate_size=40), "closes ffn in layer 0.* no gates"),
        ({"gates": ("ffn",)}, Shape(4, 2), "closes heads in layer 0.* no gates"),
        ({"gates": ("ffn",)}, Shape(num_hidden_layers=2), "layer 0, which has no gates on `layers` or `blocks`"),
        ({"group_size": 4}, Shape(intermediate_size=39), "splits groups of 4.*ffn in layer 0.*group_size=1"),
    ],
)
def test_plan_that_the_gates_cannot_carry_is_refused(options: dict[str, Any], shape: Shape, facts: str) -> None:
    model = gate(build(LM_ROW), **options)
    before = logits_of(model)
    with pytest.raises(InvalidPlanError, match=facts):
        model.apply_plan(scattered_plan(model, shape))
    assert torch.equal(logits_of(model), before)
    assert model.applied_plan() is None


def test_plan_on_a_merged_adapter_is_refused_or_takes_effect() -> None:
    model = gate(build(LM_ROW))
    model.merge_adapter()
    try:
        model.apply_plan(scattered_plan(model, LM_ROW.slim))
    except InvalidPlanError:
        return
    before = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), before) <= 1e-5


@pytest.mark.parametrize("arguments", [{"shape": 0.5}, {"keep_ratio": "half"}], ids=str)
def test_arguments_of_a_wrong_type_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlanError, match="keep_ratio"):
        gate(build(LM_ROW)).plan(**arguments)
