"""Targets drawn at random by a model's predictions, the same on every device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from ..errors import HawAdaError

NOT_FINITE = "the model's logits hold NaN or infinity: nothing can be drawn by them; check its weights"


def draw_classes(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    One class for each position, drawn by the softmax of its logits.

    First a block of neighbouring classes is drawn, then a class within it, so that of each position's probabilities
    about `2 sqrt(classes)` numbers go to the CPU, where two random numbers are made for it, not one for each class.

    Args:
        logits: (positions, classes).
        generator: on the CPU.

    Returns:
        (positions,) on the device of the logits.

    Raises:
        HawAdaError: if the logits hold NaN or infinity, or -infinity for all classes of a position.
    """
    positions, classes = logits.shape
    width = math.isqrt(classes - 1) + 1
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    blocks = functional.pad(probabilities, (0, -classes % width)).reshape(positions, -1, width)
    uniform = torch.rand(2, positions, 1, dtype=torch.float64, generator=generator)
    block = _pick(blocks.sum(-1), uniform[0])
    chosen = blocks[torch.arange(positions, device=logits.device), block.to(logits.device)]
    return (block * width + _pick(chosen, uniform[1])).to(logits.device)


def draw_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    0 or 1 for each label, drawn by the sigmoid of its logit.

    Args:
        logits: (positions, labels).
        generator: on the CPU.

    Returns:
        Like the logits.

    Raises:
        HawAdaError: if the logits hold NaN or infinity.
    """
    _check_finite(logits)
    uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
    return (uniform.to(device=logits.device, dtype=logits.dtype) < logits.sigmoid()).to(logits.dtype)


def draw_values(means: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Numbers drawn from normal distributions of variance 1.

    Args:
        means: (positions, outputs).
        generator: on the CPU.

    Returns:
        Like the means.

    Raises:
        HawAdaError: if the means hold NaN or infinity.
    """
    _check_finite(means)
    return means + torch.randn(means.shape, generator=generator).to(means)


def _check_finite(outputs: torch.Tensor) -> None:
    if not outputs.isfinite().all():
        raise HawAdaError(NOT_FINITE)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """From weights (positions, n) and numbers in [0, 1), (positions, 1): places of weight above 0, (positions,)."""
    cumulative = weights.cpu().double().cumsum(-1)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise HawAdaError(NOT_FINITE)
    # In (0, total]: never beyond the last place, never at one of weight 0.
    return torch.searchsorted(cumulative, (1 - uniform) * total)[:, 0]
