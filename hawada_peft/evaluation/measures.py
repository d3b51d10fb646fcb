"""What is told of a slim model beside the dense one, on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import BadDataError
from ..shipping.facts import QualityChange
from ..vanilla.batches import on_device, position_mask
from ..vanilla.heads import Classes, Head, Labels, Values, head_of
from ..vanilla.outputs import output_of

TITLES = {
    "same": "predictions that are the dense model's, in %",
    "labels": "labels that are the dense model's, in %",
    "explained": "variance of the dense model's outputs that is explained, in %",
    "accuracy": "accuracy in %",
    "cosine": "cosine of mean embeddings with the dense model's, in %",
}


@torch.inference_mode()
def qualities(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    batches: Sequence[dict[str, torch.Tensor]],
    data: str,
    each: Callable[[], object] = lambda: None,
) -> list[QualityChange]:
    """
    How much of the dense model is left.

    Args:
        dense: on the same device as the slim one.
        slim: the slim model.
        batches: keyword arguments of the forward pass; labels of images are used if they are there.
        data: what they are, for the report.
        each: is called after every batch.

    Returns:
        How far the predictions are the dense model's: the part of largest outputs that are the same, or of labels
        that are; of values the part of their variance that the slim model's explain, 100 % where they are the same,
        below 0 where their mean would be nearer, and for sequences of hidden states the cosine of their means, as
        embeddings are compared. The perplexity of a model that generates; the accuracy where there is
        one label per example.

    Raises:
        BadDataError: if there are no examples.
    """
    sums: dict[str, list[float]] = {}
    if not batches:
        raise BadDataError("there are no held-out examples to compare the models on")
    for batch in batches:
        there = on_device(batch, dense.device)
        labels = there.pop("labels", None)
        expected, found = output_of(dense, there), output_of(slim, there)
        head, mask = head_of(dense, expected), position_mask(there, expected.shape[:-1])
        weights = torch.ones(expected.shape[:-1], device=expected.device) if mask is None else mask.float()
        _add(sums, *_agreement(head, expected.float(), found.float(), weights))
        if dense.can_generate() and "input_ids" in there and there["input_ids"].shape[1] > 1:
            after = weights[:, 1:] * weights[:, :-1]
            losses = [float((_surprise(logits, there["input_ids"]) * after).sum()) for logits in (expected, found)]
            _add(sums, "perplexity", float(after.sum()), *losses)
        elif isinstance(head, Classes) and labels is not None and labels.ndim == 1 and expected.ndim == 2:
            right = [float((logits.argmax(-1) == labels).sum()) for logits in (expected, found)]
            _add(sums, "accuracy", float(len(labels)), *right)
        elif isinstance(head, Values) and expected.ndim == 3:
            pooled = [(values.float() * weights[..., None]).sum(1) for values in (expected, found)]
            near = float(functional.cosine_similarity(pooled[0], pooled[1]).sum())
            _add(sums, "cosine", float(len(expected)), float(len(expected)), near)
        each()
    changes = []
    for name, (count, before, after_cut) in sums.items():
        if count == 0:
            continue  # values that do not vary, texts that are padding
        means = before / count, after_cut / count
        if name == "perplexity":
            changes.append(QualityChange(name, math.exp(means[0]), math.exp(means[1]), data))
        else:
            changes.append(QualityChange(TITLES[name], 100 * means[0], 100 * means[1], data))
    return changes


def _agreement(
    head: Head, expected: torch.Tensor, found: torch.Tensor, weights: torch.Tensor
) -> tuple[str, float, float, float]:
    """What is counted, and sums: of the weights, of the dense model's score and of the slim one's."""
    count = float(weights.sum())
    if isinstance(head, Values):
        mean = (expected * weights[..., None]).sum(tuple(range(expected.ndim - 1))) / count
        spread = float(((expected - mean).square().mean(-1) * weights).sum())
        error = float((head.loss().value(found, expected, torch.float32) * weights).sum())
        return "explained", spread, spread, spread - error
    if isinstance(head, Labels):
        same = ((expected > 0) == (found > 0)).float().mean(-1)
        return "labels", count, count, float((same * weights).sum())
    return "same", count, count, float(((expected.argmax(-1) == found.argmax(-1)).float() * weights).sum())


def _surprise(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each token but the first, given those before it: (batch, seq - 1)."""
    flat = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


def _add(sums: dict[str, list[float]], name: str, *values: float) -> None:
    known = sums.setdefault(name, [0.0] * len(values))
    sums[name] = [old + new for old, new in zip(known, values, strict=True)]
