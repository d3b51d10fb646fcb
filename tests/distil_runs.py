"""Recoveries of a few steps: a tiny slim Llama distilled from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import LM_ROW, Row, build, scattered_plan
from transformers import PreTrainedModel, TrainingArguments

from hawada_peft import DistillTrainer, slim
from hawada_peft.distil.objective import Distillation
from hawada_peft.vanilla.heads import Classes

LENGTHS = [12, 5, 9, 7, 12, 4, 10, 8]


def padded(length: int, seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < length).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


DATA = [padded(length, seed) for seed, length in enumerate(LENGTHS)]
IMAGES = [{"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(8)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no"}
    return TrainingArguments(str(folder), **(fixed | defaults | {"lr_scheduler_type": "constant"} | options))


def slimmed(row: Row = LM_ROW, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    dense = build(row, dtype)
    return slim(dense, scattered_plan(dense, row.slim))


def trainer_of(folder: Path, student: Any = None, *, args: Any = None, **options: Any) -> DistillTrainer:
    student = slimmed() if student is None else student
    options = {"teacher": build(LM_ROW), "train_dataset": DATA, "eval_dataset": DATA} | options
    return DistillTrainer(student, arguments(folder, **(args or {})), **options)


def logged(trainer: DistillTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def kl_of(student: torch.nn.Module, teacher: torch.nn.Module, **weights: float) -> float:
    """The loss over all positions of the data that are not padding."""
    batch = {name: torch.stack([row[name] for row in DATA]) for name in DATA[0]}
    objective = Distillation(**weights)
    with torch.no_grad():
        logits = [model.eval()(**batch).logits for model in (student, teacher)]
    return float(objective.loss(objective.terms(*logits, batch["attention_mask"], head=Classes())))
