"""Whether this machine can do what a recipe says, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..errors import HawAdaError
from ..latency.budget import LatencyBudget
from ..search.timed import check_regime, regime_of
from ..vanilla.loading import load_skeleton
from .recipe import Recipe


def missing_here(recipe: Recipe) -> list[str]:
    """What this machine lacks: data files that are not there, packages that `report_to` names."""
    named = [*recipe.source().paths(), *([recipe.plan] if recipe.plan else [])]
    lost = [path for path in named if not Path(path).exists()]
    return lost + [each for section in ("training", "recovery") for each in _loggers_missing(recipe, section)]


def _loggers_missing(recipe: Recipe, section: str) -> Iterator[str]:
    """What `Trainer` would find out when it begins."""
    wanted = (getattr(recipe, section) or {}).get("report_to")
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all"):
            continue
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            yield f"{section}.report_to: {str(error).strip().splitlines()[0]}"


def check_device(recipe: Recipe, device: torch.device) -> None:
    """
    Refuse what a device or this kind of model cannot do.

    Raises:
        HawAdaError: with all of it.
    """
    problems = [
        f"{section}.fp16 needs a GPU, and this is trained on the CPU: use bf16, or neither"
        for section in ("training", "recovery")
        if device.type == "cpu" and (getattr(recipe, section) or {}).get("fp16")
    ]
    skeleton = load_skeleton(recipe.model)
    budget = None if recipe.budget is None else LatencyBudget(**recipe.budget)
    if budget is not None and budget.image_size is not None and skeleton.main_input_name == "input_ids":
        problems.append(f"budget.image_size is not for {type(skeleton).__name__}, which takes input_ids")
    if problems:
        raise HawAdaError("\n".join(problems))
    if budget is not None:
        check_regime(skeleton, regime_of(skeleton, budget))
