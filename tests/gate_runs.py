"""Gate trainings of a few steps on a tiny Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import LM_ROW, build, gate
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from hawada_peft import HawAdaTrainer, Shape, collect_gates
from hawada_peft.training.arguments import GATE_OPTIONS, GateTrainingArguments

TARGET = Shape(4, 2, 40, 2)
DATA = [{"input_ids": torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i))} for i in range(8)]
LABELLED = [row | {"labels": row["input_ids"]} for row in DATA]


def arguments(folder: Path, **options: Any) -> GateTrainingArguments:
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.3, "save_strategy": "no"}
    defaults["keep_better"] = "never"  # what training does is what these tests are about
    return GateTrainingArguments(str(folder), **(fixed | defaults | {"lr_scheduler_type": "constant"} | options))


def trainer_of(folder: Path, model: PeftModel | None = None, *, args: Any = None, **options: Any) -> HawAdaTrainer:
    model = gate(build(LM_ROW), shuffle=False) if model is None else model
    options = {"shape": TARGET, "train_dataset": DATA, "eval_dataset": LABELLED, "soft_fraction": 0.5} | options
    named = {name: options.pop(name) for name in list(options) if name in GATE_OPTIONS}
    return HawAdaTrainer(model, arguments(folder, **named, **(args or {})), **options)


def thetas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: found.theta.detach().clone() for name, found in collect_gates(model).items()}


def logged(trainer: HawAdaTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step
