"""A first recipe for a model, its data and a budget, with what it will take: from sizes alone, without weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..latency.budget import LatencyBudget
from ..search.timed import regime_of

STEPS = {"quick": (20, 60), "normal": (100, 300), "thorough": (300, 2000)}
"""Steps of the gates and of the recovery."""

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens (or patches) of a step."""

RATES = ((5e8, 1e-4), (3e9, 5e-5), (math.inf, 2e-5))
"""Learning rates of the recovery up to so many parameters: larger models want smaller ones."""

PASSES = {"gates": 5, "recovery": 4}
"""Forward passes that a step is worth: the teacher's, the student's, two for its backward pass; one for a plan."""

ADAM = 16
"""Bytes for every weight that is trained in float32: the weight, its gradient and two moments."""


@dataclass(frozen=True)
class Draft:
    """
    A first recipe, and what it takes.

    Args:
        recipe (`dict`): for `Recipe.from_dict`, or YAML.
        seconds (`dict[str, float]`): estimates, of `"gates"` and `"recovery"`.
        bytes (`float`): of weights, gradients and optimizer in the recovery; activations are not in it.
        rate (`float`): floating-point operations a second of a matrix product on this device, as measured.
    """

    recipe: Mapping[str, Any]
    seconds: Mapping[str, float]
    bytes: float
    rate: float


def draft_recipe(
    model: str,
    skeleton: PreTrainedModel,
    data: Mapping[str, Any],
    budget: LatencyBudget,
    *,
    output: str,
    plan: str | None = None,
    effort: str = "normal",
) -> Draft:
    """
    A recipe with sensible numbers for a model and the device that trains it.

    Args:
        model: folder or id of the dense model.
        skeleton: the same without weights.
        data: fields of `DataSource`.
        budget: what the slim model may cost.
        output: folder for everything that is made.
        plan: file of a plan, instead of gates that are trained.
        effort: `"quick"`, `"normal"` or `"thorough"`: how many steps.

    Raises:
        InvalidRegimeError: if the model cannot run under the budget's conditions.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    regime, parameters = regime_of(skeleton, budget), skeleton.num_parameters()
    text = regime.length is not None
    length = int(regime.length or _patches(skeleton))
    rows = max(1, TOKENS[kind] // length)
    device = {"use_cpu": True, "dataloader_pin_memory": False} if kind == "cpu" else {"bf16": True}
    gates, recovery = STEPS[effort]
    given = {name: value for name, value in asdict(budget).items() if value not in (None, LEFT_OUT.get(name))}
    recipe: dict[str, Any] = {
        "model": model,
        "output": output,
        "data": dict(data) | ({"seq_len": length} if text else {}) | {"held_out": 32},
        "budget": given,
    }
    if plan is None:
        recipe["search"] = {"quick": True} if effort == "quick" else {}
        recipe["training"] = {"max_steps": gates, "per_device_train_batch_size": rows} | device
    else:
        recipe["plan"] = plan
    rate = next(value for most, value in RATES if parameters <= most)
    recipe["reconstruction"] = {"examples": 64, "batch_size": min(8, rows)}
    recipe["recovery"] = {
        "max_steps": recovery,
        "per_device_train_batch_size": rows,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
    } | device
    flops, pace = 2 * parameters * length * rows, matmul_rate(kind)
    steps = {"gates": 0 if plan is not None else gates, "recovery": recovery}
    seconds = {name: PASSES[name] * count * flops / pace for name, count in steps.items()}
    return Draft({name: part for name, part in recipe.items() if part != {}}, seconds, (4 + ADAM) * parameters, pace)


LEFT_OUT = {"batch_size": 1, "backend": "eager"}
"""What a budget need not say."""


def matmul_rate(device: str, size: int = 1024) -> float:
    """
    Floating-point operations a second of a matrix product in the dtype that is trained in, the best of three.

    Args:
        device: where.
        size: of the square matrices.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(4):  # the first one warms up
        begun = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times[1:])


def _patches(skeleton: PreTrainedModel) -> int:
    """Of an image; of what is neither text nor image, about as many as of an image."""
    config = skeleton.config
    image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if isinstance(image, int) and isinstance(patch, int):
        return (image // patch) ** 2 + 1
    return 256
