"""What the tuner refuses, and that nothing has been changed by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from transformers import TrainingArguments

from hawada_peft import (
    GateTrainingArguments,
    HawAdaTrainer,
    LatencyBudget,
    Plan,
    Shape,
    collect_gates,
    find_plan,
    init_gates,
    recover,
    save_slim,
    slim,
)
from hawada_peft.errors import (
    BadDataError,
    BrokenGatesError,
    HawAdaError,
    IllegalShapeError,
    IncompatibleBaseError,
    InvalidPlanError,
)


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


# ------------------------------------------------------------------ arguments of other types


INPUTS = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
BUDGET = LatencyBudget(speedup=1.5, batch_size=1, seq_len=4)
ARGUMENTS: dict[str, Callable[[PeftModel, Path], object]] = {
    "no list of adapters": lambda model, _: model.plan(keep_ratio=0.5, adapter_names=3),
    "a name as the list": lambda model, _: model.plan(keep_ratio=0.5, adapter_names="default"),
    "no adapters": lambda model, _: model.merge_and_unload(adapter_names=[]),
    "calibration that is none": lambda model, _: model.merge_and_unload(calibration=3),
    "a batch as calibration": lambda model, _: model.merge_and_unload(calibration=INPUTS),
    "no budget": lambda model, _: find_plan(model, 1.5, [INPUTS]),
    "no effort": lambda model, _: find_plan(model, BUDGET, [INPUTS], effort=3),
    "a table that is none": lambda model, _: find_plan(model, BUDGET, [INPUTS], table=3),
    "images for a text model": lambda model, _: find_plan(model, replace(BUDGET, image_size=8), [INPUTS]),
    "training arguments that are none": lambda model, _: HawAdaTrainer(model, {}, keep_ratio=0.5),
    "recovery with arguments that are none": lambda model, _: recover(model, {}, train_dataset=[INPUTS]),
    "a weight that is a word": lambda model, _: recover(model, train_dataset=[INPUTS], kl_weight="x"),
    "a relaxation that is a list": lambda model, _: GateTrainingArguments("x", relaxation=[]),
    "slim of a word": lambda model, _: slim("model", model.applied_plan()),
    "slim by a dict": lambda model, _: slim(build(LM_ROW), model.applied_plan().to_dict()),
    "gates of a word": lambda model, _: init_gates("model", [INPUTS]),
    "a gated model saved as slim": lambda model, folder: save_slim(model, folder / "slim"),
    "a plan that is no text": lambda model, _: Plan.from_json(None),
    "rows of a plan that are none": lambda model, _: Plan(Shape(8, 4, 96, 4), (0,), (0,), ((0,),)),
    "a plan for a Shape that is none": lambda model, _: Plan(None, (0,), ((0,),), ((0,),)),
    "truth as a layer": lambda model, _: Plan(Shape(8, 4, 96, 4), (True,), ((0, 1),), ((0,),)),
    "sizes that no model has": lambda model, _: Plan(Shape(8, 4, 96, 2**40), (0,), ((0, 1),), ((0,),)),
    "fewer heads than groups": lambda model, _: Plan(Shape(4, 8, 96, 4), (0,), ((0,),), ((0,),)),
    "a field that no plan has": lambda model, _: Plan.from_dict(model.applied_plan().to_dict() | {"layer": [0]}),
    "truth as a format": lambda model, _: Plan.from_dict(model.applied_plan().to_dict() | {"format": True}),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_of_other_types_are_told(what: str, tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    expected = logits_of(model)
    with pytest.raises(HawAdaError):
        ARGUMENTS[what](model, tmp_path)
    assert torch.equal(logits_of(model), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [3, [3, 4], [{"input_ids": [1, 2]}, {"input_ids": [1]}], [{"labels": None}]])
@pytest.mark.parametrize("student", [False, True])
def test_data_that_makes_no_batch_is_told(data: Any, student: bool, tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    plan = scattered_plan(model, LM_ROW.slim)
    with pytest.raises(BadDataError, match="train_dataset"):
        recover(model, args, train_dataset=data, plan=plan) if student else HawAdaTrainer(
            model, args, train_dataset=data, keep_ratio=0.5
        ).train()
