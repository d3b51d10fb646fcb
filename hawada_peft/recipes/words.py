"""What a recipe will do, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..latency.budget import LatencyBudget
from .recipe import Recipe
from .schema import GOALS
from .settings import ReconstructionStep


def steps_of(recipe: Recipe) -> list[str]:
    """What will be done, in words."""
    data, training, folder = recipe.source(), recipe.training or {}, Path(recipe.output)
    where = ", ".join(data.paths()) or f"the dataset {data.dataset}"
    kinds = ", ".join(recipe.config().gates) + (" and LoRA" if (recipe.gates or {}).get("lora") else "")
    steps = [
        f"load {recipe.model} ({recipe.dtype}), and examples from {where}; {data.held_out} of them are held out",
    ]
    if recipe.plan is not None:
        steps.append(f"remove what the plan in {recipe.plan} closes")
    else:
        goal = next(name for name in GOALS if getattr(recipe, name) is not None)
        steps += [
            f"put gates in: {kinds}",
            f"train them{_length(training)} towards {goal} {_plain(getattr(recipe, goal))}",
            f"save the adapter: {folder / 'adapter'}",
            "merge: fold the gates, remove what the plan closes",
        ]
    if recipe.reconstruction is not None:
        refit = ReconstructionStep(**recipe.reconstruction)
        steps.append(f"refit the output projections on {refit.examples} examples")
    race = recipe.racing()
    if race is not None:
        steps.append(
            f"let the plan and at most {race.plans} others race with short recoveries; what recovers best goes on"
        )
    if recipe.recovery is not None:
        weights = "all weights" if recipe.recovery.get("lora") is None else "LoRA"
        steps.append(f"distil the dense model into the slim one{_length(recipe.recovery)}: {weights}")
    if recipe.times():
        steps.append(f"time both under {LatencyBudget(**(recipe.budget or {}))}")
    steps.append(f"save the slim model, reloaded and compared first, with card and report: {folder / 'slim'}")
    return steps


def _length(training: Mapping[str, Any]) -> str:
    steps = training.get("max_steps", -1)
    if steps > 0:
        return f" for {steps} steps"
    return f" for {training.get('num_train_epochs', TrainingArguments.num_train_epochs):g} epochs"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
