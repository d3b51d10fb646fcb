"""How far a slim model is from the dense one on calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..processes import Reduce, all_reduced
from ..vanilla.batches import Batch, position_mask
from ..vanilla.heads import head_of
from ..vanilla.outputs import output_of

KEPT_BYTES = 2**30
"""Outputs of a dense model that are kept to compare several others with."""


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
        The head's metric (`head_of`): `"kl"` and KL(dense || slim) in nats, of classes or of independent labels;
        `"mse"` and the mean squared difference of outputs that are no distribution.
    """
    return Expected(dense, batches, kept_bytes=0).divergence(slim, reduce)


class Expected:
    """
    What a dense model gives on some batches, computed once.

    Args:
        dense: the model.
        batches: keyword arguments of its forward pass, without labels.
        kept_bytes: its outputs are kept up to this size; those of further batches are computed each time.
    """

    def __init__(self, dense: PreTrainedModel, batches: Sequence[Batch], kept_bytes: int = KEPT_BYTES) -> None:
        self.dense, self.batches = dense, batches
        self._room, self._kept = kept_bytes, dict[int, torch.Tensor]()

    def divergence(self, slim: PreTrainedModel, reduce: Reduce = all_reduced) -> tuple[str, float]:
        """As the function `divergence` of this module says."""
        pairs = ((batch, self._output(index), output_of(slim, batch)) for index, batch in enumerate(self.batches))
        return mean_divergence(self.dense, pairs, reduce)

    def _output(self, index: int) -> torch.Tensor:
        if index in self._kept:
            return self._kept[index]
        output = output_of(self.dense, self.batches[index])
        if output.nbytes <= self._room:
            self._room -= output.nbytes
            self._kept[index] = output
        return output


def mean_divergence(
    model: nn.Module, pairs: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]], reduce: Reduce
) -> tuple[str, float]:
    """
    `divergence` of outputs.

    Args:
        model: whose outputs they are, by its class.
        pairs: for each batch, of one at least, its inputs, the dense model's outputs and the other one's.
        reduce: sums over ranks.
    """
    name, sums = "kl", torch.zeros(2, dtype=torch.float64)
    for batch, expected, found in pairs:
        name, more = batch_divergence(model, batch, expected, found)
        sums = sums.to(more.device) + more
    total, count = reduce(sums).tolist()
    return name, total / count


def batch_divergence(
    model: nn.Module, batch: Batch, expected: torch.Tensor, found: torch.Tensor
) -> tuple[str, torch.Tensor]:
    """
    `divergence` on one batch, as a sum over positions and their number: the metric, and (2,), float64.

    Args:
        model: whose outputs they are, by its class.
        batch: its inputs.
        expected: the dense model's outputs.
        found: the other one's.
    """
    head = head_of(model, expected)
    loss, sums = head.loss(), torch.zeros(2, dtype=torch.float64, device=found.device)
    mask, dtype = position_mask(batch, expected.shape[:-1]), torch.promote_types(expected.dtype, torch.float32)
    for row in range(len(expected)):  # wider copies of a whole batch's logits could be larger than the model
        values = loss.value(found[row], expected[row], dtype).clamp(min=0)
        weights = torch.ones_like(values) if mask is None else mask[row].to(values.dtype)
        sums += torch.stack([(values * weights).sum(), weights.sum()]).double()
    return head.metric, sums
