"""A checkpoint whose layers are walked through, one in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..basis.moments import counted
from ..errors import HawAdaError
from ..files.checkpoint import Checkpoint
from ..files.spill import Spill
from ..refit.layerwise import Keep, Stream, in_memory
from ..refit.low_memory import start_stream
from ..refit.on_demand import OnDemand
from ..vanilla.batches import Batch, check_batch, without_labels
from ..vanilla.family import Layout, locate


@dataclass(frozen=True)
class Walk:
    """
    A dense model without weights, whose layers get theirs when they are called, and its calibration batches.

    Args:
        checkpoint: the model's files.
        layout: its family row and sizes.
        weights: lends the layers their weights.
        batches: keyword arguments of its forward pass without labels, on the device that weights come to.
        keep: where hidden states are kept.
    """

    checkpoint: Checkpoint
    layout: Layout
    weights: OnDemand
    batches: Sequence[Batch]
    keep: Keep

    def start(self) -> Stream:
        """The stream of all batches before the first layer."""
        return start_stream(self.weights, self.batches, self.keep)

    def up_to(self, positions: int, every: int = 1) -> tuple[Walk, Stream]:
        """
        The same with as few batches as hold so many positions, all if they are fewer; and their stream.

        Args:
            positions: that are no padding.
            every: one in so many batches is taken.
        """
        walk, total = replace(self, batches=self.batches[::every]), 0
        stream = walk.start()
        for count, (hidden, batch) in enumerate(zip(stream.hidden, walk.batches, strict=True), 1):
            total += len(counted(hidden, batch))
            if total >= positions:
                stream = replace(stream, hidden=stream.hidden[:count], calls=stream.calls[:count])
                return replace(walk, batches=walk.batches[:count]), stream
        return walk, stream


@contextmanager
def open_walk(
    base: str | os.PathLike[str],
    calibration: Iterable[Batch],
    *,
    device: str | None = None,
    spill: str | os.PathLike[str] | None = None,
) -> Iterator[Walk]:
    """
    A walk through a model's files, without gradients.

    Args:
        base, calibration, device, spill: as in `walk_checkpoint`.

    Raises:
        HawAdaError: if there are no batches.
        BadDataError: if a batch holds what the model cannot take.
        UnsupportedModelError: as `Checkpoint` and `OnDemand`.
    """
    checkpoint, where = Checkpoint(base), torch.device(device or "cpu")
    model, batches = checkpoint.skeleton, []
    for batch in calibration:
        check_batch(model, batch)
        batches.append(without_labels(batch, where))
    if not batches:
        raise HawAdaError("no calibration batches were given; pass at least one")
    layout = locate(model)
    # An accelerator works on what it has in its own memory.
    keep: Keep = in_memory if spill is None or where.type != "cpu" else Spill(Path(spill))
    with OnDemand(model, layout, checkpoint.whole, device=where) as weights, torch.no_grad():
        yield Walk(checkpoint, layout, weights, batches, keep)
