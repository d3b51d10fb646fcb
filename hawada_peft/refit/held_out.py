"""Which calibration batches are fitted to, and which are held out to judge by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..errors import HawAdaError
from ..processes import Reduce
from ..vanilla.batches import Batch, check_batch, has_rows, main_input, rows_of, without_labels

HELD_OUT = 0.125
"""The part of the calibration batches that nothing is fitted to."""


def split(
    calibration: Iterable[Batch], slim: PreTrainedModel, device: torch.device, held_out: float, reduce: Reduce
) -> tuple[list[Batch], list[Batch]]:
    """
    The batches to fit and those to hold out, on the device, without labels. Where there are so few batches that one is
    more than that part of them, the last rows of the last one are held out.
    """
    batches: list[Batch] = []
    for batch in calibration:
        check_batch(slim, batch)
        batches.append(without_labels(batch, device))
    period = max(2, round(1 / held_out))
    if len(batches) == 1 or (0 < len(batches) < period and has_rows(batches[-1], len(main_input(slim, batches[-1])))):
        rows = [len(main_input(slim, batch)) for batch in batches]
        last, total = batches.pop(), rows[-1]
        cut = max(0, total - max(1, round(held_out * sum(rows))))
        parts = [part for part in (slice(cut), slice(cut, total)) if part.stop > (part.start or 0)]
        batches += [rows_of(last, part, total) for part in parts]
    held = [batch for index, batch in enumerate(batches) if index % period == period - 1] or batches[-1:]
    fitted = [batch for batch in batches if all(batch is not other for other in held)]
    counts = torch.tensor([len(fitted), len(held), not batches], device=device)
    if min(reduce(counts)[:2].tolist()) == 0 or counts[2]:
        raise HawAdaError(
            f"{len(batches)} calibration batch(es) here; reconstruction needs at least one on every rank, and two "
            "rows in all: some to fit and some to hold out"
        )
    return fitted, held
