"""What the demo measures: logits, quality, agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

BATCH = 64
"""Examples per forward pass where time does not matter."""


def logits_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    The model's logits in evaluation mode, computed `BATCH` examples at a time.

    Args:
        model: takes `inputs`, but for the labels.
        inputs: tensors of (examples, ...).

    Returns:
        (examples, ..., classes).
    """
    model.eval()
    parts = {name: tensor.split(BATCH) for name, tensor in inputs.items() if name != "labels"}
    with torch.inference_mode():
        return torch.cat(
            [model(**dict(zip(parts, part, strict=True))).logits for part in zip(*parts.values(), strict=True)]
        )


def agreement(logits: torch.Tensor, dense_logits: torch.Tensor) -> float:
    """Per cent of the positions where the largest logit is the same. Both: (examples, ..., classes)."""
    return 100 * (logits.argmax(-1) == dense_logits.argmax(-1)).double().mean().item()


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent of the images whose largest logit is the label's. logits: (images, classes), labels: (images,)."""
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def perplexity(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The exponential of the mean cross entropy of every token of a window but its first, given those before it.

    Args:
        logits: (windows, tokens, vocabulary).
        labels: (windows, tokens), the tokens themselves.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).exp().item()


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Run torch on one thread, and put the number back.

    At these sizes a second thread gains little on an idle machine; on a busy one the two wait for each other in every
    operation (measured on 2 cores that others used as well: 4.6 s on one thread, up to 114 s on two).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
