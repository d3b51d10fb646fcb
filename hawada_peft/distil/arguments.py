"""What is wrong with training arguments that `transformers` takes without a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

RATES = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
COUNTS = ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")

BETAS = ("adam_beta1", "adam_beta2")


def rate_problems(given: Mapping[str, Any]) -> list[str]:
    """
    One line for each kind of number that no training can mean.

    Args:
        given: values by the names of `TrainingArguments`; what is left out is not judged.
    """
    numbers = {
        name: given[name] for name in (*RATES, *COUNTS) if isinstance(given.get(name), int | float)
    }  # words are left to `TrainingArguments`
    problems = []
    if wrong := {name: value for name, value in numbers.items() if name in RATES and not 0 <= value < math.inf}:
        problems.append(f"these must be finite and not negative: {wrong}")
    least = {"num_train_epochs": 0, "max_steps": -1, "seed": 0, "dataloader_num_workers": 0}
    counts = {name: given[name] for name in least if isinstance(given.get(name), int | float)}
    if wrong := {name: value for name, value in counts.items() if not least[name] <= value < math.inf}:
        problems.append(f"these must be finite, and at least {least}: {wrong}")
    betas = {name: given[name] for name in BETAS if isinstance(given.get(name), int | float)}
    if wrong := {name: value for name, value in betas.items() if not 0 <= value < 1}:
        problems.append(f"these must be at least 0 and below 1: {wrong}")
    if wrong := {name: value for name, value in numbers.items() if name in COUNTS and not value >= 1}:
        problems.append(f"these must be at least 1: {wrong}")
    return problems
