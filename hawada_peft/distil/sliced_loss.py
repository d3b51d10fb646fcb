"""The mean over positions of a loss between logits, computed a slice of the positions at a time.

Logits over a large vocabulary are the largest tensors of a distillation step. Here no float32 copy of them is made
as a whole: the backward pass computes the gradient by its formula, slice by slice, in the logits' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import HawAdaError
from ..vanilla.heads import PositionLoss

# Elements of a float32 slice: on the CPU it should stay in the cache, an accelerator wants large kernels (32 MiB).
_SLICE = {"cpu": 2**18}
_SLICE_ELSEWHERE = 2**23


def mean_over_positions(
    loss: PositionLoss, student_logits: torch.Tensor, teacher_logits: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """
    The mean of a loss where the mask is nonzero; 0 where it is zero everywhere.

    Args:
        loss: the loss at each position.
        student_logits, teacher_logits: (..., classes); the teacher's count as constants.
        mask: (...), nonzero where a position counts; all if left out.

    Returns:
        (), float32 or wider.

    Raises:
        HawAdaError: if the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise HawAdaError(
            f"student and teacher logits must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; do both see the same batch, and have they the same classes?"
        )
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise HawAdaError(
            f"the mask must have the shape of the positions, {tuple(student_logits.shape[:-1])}, got "
            f"{tuple(mask.shape)}"
        )
    classes = student_logits.shape[-1]
    student, teacher = student_logits.reshape(-1, classes), teacher_logits.detach().reshape(-1, classes)
    dtype = torch.promote_types(student.dtype, torch.float32)
    if mask is None:
        weights = torch.full((len(student),), 1 / max(1, len(student)), dtype=dtype, device=student.device)
    else:
        weights = mask.reshape(-1).to(dtype)
        weights = weights / weights.sum().clamp(min=1)
    return _MeanOverPositions.apply(loss, student, teacher, weights)


class _MeanOverPositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: PositionLoss, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.loss = loss
        ctx.save_for_backward(student, teacher, weights)
        values = torch.empty_like(weights)
        for part in _slices(student):
            values[part] = loss.value(student[part], teacher[part], weights.dtype)
        return (values * weights).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        student, teacher, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the formulas below leave no graph
            mean = (ctx.loss.value(student, teacher, weights.dtype) * weights).sum()
            return None, torch.autograd.grad(mean, student, gradient, create_graph=True)[0], None, None
        factors = (weights * gradient)[:, None]
        result = torch.empty_like(student)
        for part in _slices(student):
            by_student = ctx.loss.gradient(student[part], teacher[part], weights.dtype)
            result[part] = by_student.mul_(factors[part])
        return None, result, None, None


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    positions, classes = logits.shape
    step = max(1, _SLICE.get(logits.device.type, _SLICE_ELSEWHERE) // max(1, classes))
    return (slice(start, start + step) for start in range(0, positions, step))
