"""Numbers that are none: found at the step at which they come up, and named."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import DivergedError

NAMED = 4
"""Tensors that a message names."""


def check_finite(model: nn.Module, loss: torch.Tensor | None, step: int, accelerator: Any) -> None:
    """
    Check the loss and whatever is trained, in one reduction.

    Args:
        model: what is trained; of its weights those that require gradients.
        loss: (), of the step, if there was one.
        step: for the message.
        accelerator: an `Accelerator`. Every process calls this, and all raise if one finds something.

    Raises:
        DivergedError: naming the tensors that are not finite, of the whole model.
    """
    trained = [_here(each.detach()) for each in model.parameters() if each.requires_grad]
    trained = [each for each in trained if each.numel()]
    # The largest magnitude: it exists in every dtype, where a sum of squares does not, and NaN goes through it.
    largest = list(torch._foreach_norm(trained, ord=float("inf"))) if trained else []
    largest += [] if loss is None else [loss.detach()]
    if not largest:
        return
    device = largest[-1].device
    finite = torch.stack([each.to(device, torch.float32) for each in largest]).isfinite()
    broken = (~finite).any().float()
    if accelerator.num_processes > 1:
        broken = accelerator.reduce(broken, reduction="sum")
    if not bool(broken):
        return
    tensors = chain(model.named_parameters(), model.named_buffers())
    named = sorted(tensors, key=lambda item: item[1].requires_grad)  # frozen ones first: they are the cause
    found = [name for name, tensor in named if not _fine(tensor)]
    what = "" if loss is None or bool(loss.isfinite()) else f"the loss is {float(loss)}; "
    which = (
        f"not finite: {', '.join(found[:NAMED])} ({len(found)} tensors in all)" if found else "all weights are finite"
    )
    raise DivergedError(
        f"training stopped at step {step}: {what}{which}. Nothing of this step was saved. Resume from the last "
        "checkpoint with a lower learning rate, or load a model whose weights are finite"
    )


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fine(tensor: torch.Tensor) -> bool:
    """Masks hold -inf on purpose, buffers may: NaN is never meant."""
    tensor = _here(tensor)
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return not bool(tensor.isnan().any() if not isinstance(tensor, nn.Parameter) else (~tensor.isfinite()).any())
