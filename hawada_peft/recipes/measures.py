"""What is told of a slim model beside the dense one, on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..shipping.facts import QualityChange
from ..vanilla.outputs import output_of, position_mask


@torch.inference_mode()
def qualities(
    dense: PreTrainedModel, slim: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], data: str
) -> list[QualityChange]:
    """
    How much of the dense model is left.

    Args:
        dense, slim: on one device.
        batches: keyword arguments of the forward pass; labels of images are used if they are there.
        data: what they are, for the report.

    Returns:
        The part of predictions (largest outputs) that are the dense model's; the perplexity of a model that
        generates; the accuracy where there is one label per example.
    """
    sums: dict[str, list[float]] = {}
    for batch in batches:
        there = {name: tensor.to(dense.device) for name, tensor in batch.items()}
        labels = there.pop("labels", None)
        expected, found = output_of(dense, there), output_of(slim, there)
        mask = position_mask(there, expected.shape[:-1])
        weights = torch.ones(expected.shape[:-1], device=expected.device) if mask is None else mask.float()
        same = (expected.argmax(-1) == found.argmax(-1)).float()
        _add(sums, "same", float(weights.sum()), float(weights.sum()), float((same * weights).sum()))
        if dense.can_generate() and "input_ids" in there:
            after = weights[:, 1:] * weights[:, :-1]
            losses = [float((_surprise(logits, there["input_ids"]) * after).sum()) for logits in (expected, found)]
            _add(sums, "perplexity", float(after.sum()), *losses)
        elif labels is not None and labels.ndim == 1 and expected.ndim == 2:
            right = [float((logits.argmax(-1) == labels).sum()) for logits in (expected, found)]
            _add(sums, "accuracy", float(len(labels)), *right)
    changes = []
    for name, (count, before, after_cut) in sums.items():
        means = before / count, after_cut / count
        if name == "perplexity":
            changes.append(QualityChange(name, math.exp(means[0]), math.exp(means[1]), data))
        else:
            title = "predictions that are the dense model's, in %" if name == "same" else "accuracy in %"
            changes.append(QualityChange(title, 100 * means[0], 100 * means[1], data))
    return changes


def _surprise(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each token but the first, given those before it: (batch, seq - 1)."""
    flat = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


def _add(sums: dict[str, list[float]], name: str, *values: float) -> None:
    known = sums.setdefault(name, [0.0] * len(values))
    sums[name] = [old + new for old, new in zip(known, values, strict=True)]
