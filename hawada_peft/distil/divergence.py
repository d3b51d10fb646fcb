"""Distillation of a gated model from itself: one copy of the weights is both teacher and student.

References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

import torch
from peft import PeftModel

from ..vanilla.batches import Batch
from ..vanilla.heads import Classes, Head, SquaredError
from ..vanilla.mode import adapters_off, evaluating
from ..vanilla.outputs import get_student_logits
from .sliced_loss import mean_over_positions


def get_teacher_logits(model: PeftModel, batch: Batch) -> torch.Tensor:
    """
    The dense model's logits: the same weights with the adapter disabled, in evaluation mode, without gradients. The
    mode of every module, and what requires gradients, is put back.

    Args:
        model: the PEFT model itself.
        batch: keyword arguments of its forward pass; labels are left out.

    Returns:
        As `get_student_logits`.
    """
    with evaluating(model), torch.no_grad(), adapters_off(model):
        return get_student_logits(model, batch)


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    head: Head | None = None,
) -> torch.Tensor:
    """
    `T^2 KL(teacher || student)` of the softened distributions, averaged over positions (Hinton et al., 2015).

    Computed slice by slice, as is the gradient: no float32 copy of all logits is made.

    Args:
        student_logits: (..., classes); gradients flow to the student's alone.
        teacher_logits: of the same shape.
        temperature: T, above 0.
        mask: (...), nonzero where a position counts; all if left out.
        head: what the logits stand for, as `head_of` tells of a model: one of several classes if left out. Of labels
            it is the sum of their divergences; of values, which have no distribution, the mean squared difference.

    Returns:
        () in nats, float32 or wider.
    """
    loss = (head or Classes()).loss(temperature)
    return mean_over_positions(loss, student_logits, teacher_logits, mask)


def mean_squared_error(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The squared difference of logits, averaged over classes and positions.

    Args:
        student_logits: (..., classes); gradients flow to the student's alone.
        teacher_logits: of the same shape.
        mask: (...), nonzero where a position counts; all if left out.

    Returns:
        (), float32 or wider.
    """
    return mean_over_positions(SquaredError(), student_logits, teacher_logits, mask)
