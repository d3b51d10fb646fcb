"""What a peer of the frontier bench is: prepared once on the work, then cut to as many sizes as the clock asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """
    What every contestant is given, the same for all.

    load: a fresh dense teacher, float32, on the training's device, in eval mode; it is the caller's to change.
    batches: calibration inputs with `labels` (text: the tokens themselves; images: classes), on that device.
    stream: training batches as above, endless, the same for every contestant of a seed.
    speedup: the budget, as dense latency over slim latency.
    steps: of training, at most: what a contestant uses is taken off its recovery.
    """

    load: Callable[[], PreTrainedModel]
    batches: list[Batch]
    stream: Iterator[Batch]
    speedup: float
    steps: int
    seed: int


@dataclass(frozen=True)
class Prepared:
    """
    A peer after it has seen the work.

    cut: takes a fresh dense teacher, which it may change, and an amount in [0, 1], and returns the pruned model, which
        is called as the teacher is. 0 removes nothing; more never removes less. A peer with few sizes (layers) rounds
        the amount to the nearest.
    steps: of training that it used.
    """

    cut: Callable[[PreTrainedModel, float], PreTrainedModel]
    steps: int = 0


@dataclass(frozen=True)
class Peer:
    """
    name: as in tables. source: paper and repository. adapted: what had to differ from it here, and why.
    kinds: of teachers that it can prune, `text` and `image`.
    """

    name: str
    source: str
    kinds: frozenset[str]
    prepare: Callable[[Work], Prepared]
    adapted: str = ""
