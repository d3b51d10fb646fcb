"""How far a slim model is from the dense one on calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import distributed
from torch.nn import functional
from transformers import PreTrainedModel

from ..vanilla.outputs import Batch, output_of, position_mask

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""What makes one sum of those of all ranks."""


def all_reduced(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place, where `torch.distributed` is in use."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def of_this_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The sum as it is: for what one rank does while the others wait."""
    return tensor


def divergence(
    dense: PreTrainedModel, slim: PreTrainedModel, batches: Sequence[Batch], reduce: Reduce = all_reduced
) -> tuple[str, float]:
    """
    The mean divergence of a slim model's outputs from the dense model's, over all positions that are not padding.

    Args:
        dense, slim: two models with outputs of the same shape.
        batches: keyword arguments of their forward pass, without labels.
        reduce: sums over ranks.

    Returns:
        `"kl"` and KL(dense || slim) in nats for a model with a head of two or more outputs, otherwise `"mse"` and the
        mean squared difference of the outputs.
    """
    name, sums = "kl", torch.zeros(2, dtype=torch.float64, device=dense.device)
    for batch in batches:
        expected, found = output_of(dense, batch), output_of(slim, batch)
        name = "kl" if dense.base_model is not dense and expected.shape[-1] > 1 else "mse"
        difference = _kl if name == "kl" else _squares
        mask = position_mask(batch, expected.shape[:-1])
        for row in range(len(expected)):  # wider copies of a whole batch's logits could be larger than the model
            values = difference(found[row], expected[row])
            weights = torch.ones_like(values) if mask is None else mask[row].to(values.dtype)
            sums += torch.stack([(values * weights).sum(), weights.sum()]).double()
    total, count = reduce(sums).tolist()
    return name, total / count


def _kl(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(expected.dtype, torch.float32)
    log_found, log_expected = (functional.log_softmax(logits.to(dtype), dim=-1) for logits in (found, expected))
    return functional.kl_div(log_found, log_expected, reduction="none", log_target=True).sum(-1).clamp(min=0)


def _squares(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(expected.dtype, torch.float32)
    return (found.to(dtype) - expected.to(dtype)).square().mean(-1)
