"""What the dense model says on a calibration batch, and how far a masked one is from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..vanilla.batches import Batch, check_batch, position_mask, without_labels
from ..vanilla.heads import Classes, Head, head_of, is_bare
from ..vanilla.mode import adapters_off, evaluating
from ..vanilla.outputs import get_student_logits

RANKED = 2048
"""Predictions by which layers are ranked: further batches change the order hardly, and each costs as much again."""

JUDGED, LEAST_JUDGED = 8192, 2048
"""Predictions on which models are refitted to be judged, at most and at least: a search refits a few dozen."""

CPU_WORK = 2**38
"""On a CPU the parameters times these predictions are about that at most: the search stays one of minutes."""


def judged_predictions(model: nn.Module) -> int:
    """How many predictions judge a refitted model: as many as are soon computed on its device."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return JUDGED
    return min(JUDGED, max(LEAST_JUDGED, CPU_WORK // sum(each.numel() for each in model.parameters())))


def ranked_predictions(model: nn.Module) -> int:
    """How many predictions rank its layers."""
    return min(RANKED, judged_predictions(model) // 2)


@dataclass(frozen=True)
class Reference:
    """
    A calibration batch, and what the dense model predicts on it.

    Args:
        batch: without labels, on the device.
        head: what the outputs stand for.
        dense: of classes one per prediction, drawn from the dense model: (rows, ...); otherwise its outputs.
        surprise: the dense model's, of what was drawn: (rows, ...); None where nothing was.
        mask: (rows, ...), 1 where a prediction counts.
    """

    batch: Batch
    head: Head
    dense: torch.Tensor
    surprise: torch.Tensor | None
    mask: torch.Tensor

    @classmethod
    def of(cls, model: PeftModel, batch: Batch, seed: int) -> Reference:
        """
        The dense model on a batch: `model` with its adapters off.

        Raises:
            BadDataError: if the batch holds what the model cannot take.
        """
        check_batch(model, batch)
        inputs = without_labels(batch, next(model.parameters()).device)
        with evaluating(model), torch.no_grad(), adapters_off(model):
            logits = _logits(model, inputs)
        head, given = head_of(model, logits), position_mask(inputs, logits.shape[:-1])
        mask = torch.ones(logits.shape[:-1], device=logits.device) if given is None else given.float()
        if not isinstance(head, Classes):
            return cls(inputs, head, logits, None, mask)
        # By a generator of our own: the same on every device, and the caller's random state stays. Row by row, as
        # wider copies of a whole batch's logits could be larger than the model.
        generator = torch.Generator().manual_seed(seed)
        rows = [row.reshape(-1, row.shape[-1]) for row in logits]
        drawn = torch.stack([head.draw(row, generator) for row in rows]).reshape(mask.shape)
        return cls(inputs, head, drawn, _surprise(head, logits, drawn), mask)

    def divergence(self, model: PeftModel) -> tuple[float, float]:
        """How far the model is from the dense one on the batch: a sum over predictions, and their number."""
        logits, head = _logits(model, self.batch), self.head
        if self.surprise is None:
            dtype, loss = torch.promote_types(logits.dtype, torch.float32), head.loss()
            divergence = loss.value(logits, self.dense, dtype) * self.mask
        else:
            ratio = self.surprise - _surprise(head, logits, self.dense)
            divergence = (ratio.exp() - 1 - ratio) * self.mask
        return float(divergence.double().sum()), float(self.mask.double().sum())


def first_of(references: Sequence[Reference], predictions: int, *, least: int = 1) -> list[Reference]:
    """The first ones that hold so many predictions together, `least` of them or more; all, if they hold fewer."""
    sums = torch.tensor([float(each.mask.double().sum()) for each in references]).cumsum(0)
    return list(references[: max(least, int((sums < predictions).sum()) + 1)])


def _logits(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Without a cache, which nobody reads, and which would be written into."""
    base = cast(PreTrainedModel, model.get_base_model())
    caches = base.can_generate() or (is_bare(base) and "use_cache" in base.config.to_dict())
    return get_student_logits(model, ({"use_cache": False} if caches else {}) | dict(batch))


def _surprise(head: Head, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each outcome, in float32, formed row by row: like `drawn`."""
    pairs = zip(logits, drawn, strict=True)
    found = [head.surprise(row.reshape(-1, row.shape[-1]).float(), targets.reshape(-1)) for row, targets in pairs]
    return torch.stack(found).reshape(drawn.shape)
