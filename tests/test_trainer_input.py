"""What the trainer refuses, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LM_ROW, build, gate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hawada_peft import HawAdaConfig, HawAdaTrainer, Shape
from hawada_peft.errors import HawAdaError, IllegalShapeError, InvalidPlanError


def trainer_of(folder: Path, model: PeftModel | None = None, **options: Any) -> HawAdaTrainer:
    model = gate(build(LM_ROW)) if model is None else model
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    return HawAdaTrainer(model, args, **({"shape": Shape(4, 2, 40, 2)} | options))


def test_all_bad_arguments_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(HawAdaError) as caught:
        HawAdaTrainer(nn.Linear(2, 2), None, kd_temperature=0, kl_weight=0.0, size_weight=-1, soft_fraction=2)
    found = str(caught.value)
    facts = [
        "get_peft_model",
        "Linear",
        "`shape`, `keep_ratio` and `budget`",
        "kd_temperature",
        "'size_weight': -1",
        "soft_fraction",
    ]
    assert [fact for fact in facts if fact not in found] == []
    assert len(found.splitlines()) == 6


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
