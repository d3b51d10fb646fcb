"""What the trainer refuses, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LM_ROW, build, gate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hawada_peft import HawAdaConfig, HawAdaTrainer, Shape, collect_gates
from hawada_peft.errors import HawAdaError, IllegalShapeError, InvalidPlanError
from hawada_peft.training.arguments import GATE_OPTIONS, GateTrainingArguments


def trainer_of(folder: Path, model: PeftModel | None = None, **options: Any) -> HawAdaTrainer:
    model = gate(build(LM_ROW)) if model is None else model
    named = {name: options.pop(name) for name in list(options) if name in GATE_OPTIONS}
    args = GateTrainingArguments(str(folder), report_to="none", use_cpu=True, **named)
    return HawAdaTrainer(model, args, **({"shape": Shape(4, 2, 40, 2)} | options))


def test_all_bad_arguments_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(HawAdaError) as caught:
        HawAdaTrainer(nn.Linear(2, 2), TrainingArguments(str(tmp_path), learning_rate=-1.0))
    found = str(caught.value)
    facts = ["get_peft_model", "Linear", "`shape`, `keep_ratio` and `budget`", "learning_rate"]
    assert [fact for fact in facts if fact not in found] == []
    assert len(found.splitlines()) == 3


def test_plain_training_arguments_mean_the_defaults(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=0.07, logging_steps=3)
    args = HawAdaTrainer(gate(build(LM_ROW)), plain, shape=Shape(4, 2, 40, 2)).args
    assert {name: getattr(args, name) for name in GATE_OPTIONS} == GATE_OPTIONS
    assert (args.output_dir, args.learning_rate, args.logging_steps) == (str(tmp_path), 0.07, 3)


def frozen(folder: Path, how: str) -> PeftModel:
    if how == "inference_mode":
        return gate(build(LM_ROW), inference_mode=True)
    model = gate(build(LM_ROW), **({"lora": {"r": 2, "target_modules": ["q_proj"]}} if how == "joint" else {}))
    if how == "frozen by hand":
        for found in collect_gates(model).values():
            found.theta.requires_grad_(False)
        return model
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(build(LM_ROW), folder)


@pytest.mark.parametrize("how", ["loaded", "joint", "inference_mode", "frozen by hand"])
def test_gates_that_nothing_would_train_are_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(HawAdaError, match=r"no gate of adapter 'default'.*is_trainable=True"):
        trainer_of(tmp_path / "out", frozen(tmp_path, how))


def test_gates_that_were_loaded_to_be_trained_are_not(tmp_path: Path) -> None:
    gate(build(LM_ROW)).save_pretrained(tmp_path)
    trainer_of(tmp_path / "out", PeftModel.from_pretrained(build(LM_ROW), tmp_path, is_trainable=True))


def test_adapters_of_another_method_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(build(LM_ROW), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HawAdaError, match="HawAdaConfig"):
        trainer_of(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "error", "facts"),
    [
        ({"shape": Shape(6, 3)}, IllegalShapeError, r"possible.*\(4, 4\)"),
        ({"shape": None, "keep_ratio": 2.0}, InvalidPlanError, r"in \(0, 1\]"),
        ({"keep_ratio": 0.5}, HawAdaError, "one of `shape`, `keep_ratio` and `budget`"),
    ],
)
def test_targets_are_checked_before_training(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], facts: str
) -> None:
    with pytest.raises(error, match=facts):
        trainer_of(tmp_path, **options)


def test_a_target_without_gates_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlanError, match="no gates on"):
        trainer_of(tmp_path, gate(build(LM_ROW), gates=("ffn",)))


def test_several_active_adapters_are_refused(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    model.add_adapter("other", HawAdaConfig())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(HawAdaError, match=r"default.*other"):
        trainer_of(tmp_path, model)
