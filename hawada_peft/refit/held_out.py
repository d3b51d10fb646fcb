"""Which calibration batches are fitted to, and which are held out to judge by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..errors import HawAdaError
from ..processes import Reduce
from ..vanilla.batches import Batch, check_batch, main_input, rows_of, without_labels

HELD_OUT = 0.125
"""The part of the calibration batches that nothing is fitted to."""


def split(
    calibration: Iterable[Batch], slim: PreTrainedModel, device: torch.device, held_out: float, reduce: Reduce
) -> tuple[list[Batch], list[Batch]]:
    """The batches to fit and those to hold out, on the device, without labels; the rows, if there is one batch."""
    batches: list[Batch] = []
    for batch in calibration:
        check_batch(slim, batch)
        batches.append(without_labels(batch, device))
    if len(batches) == 1:
        total = len(main_input(slim, batches[0]))
        cut = total - max(1, round(held_out * total))
        parts = [rows for rows in (slice(cut), slice(cut, total)) if rows.stop > (rows.start or 0)]
        batches = [rows_of(batches[0], rows, total) for rows in parts]
    period = max(2, round(1 / held_out))
    held = [batch for index, batch in enumerate(batches) if index % period == period - 1] or batches[-1:]
    fitted = [batch for batch in batches if all(batch is not other for other in held)]
    counts = torch.tensor([len(fitted), len(held), not batches], device=device)
    if min(reduce(counts)[:2].tolist()) == 0 or counts[2]:
        raise HawAdaError(
            f"{len(batches)} calibration batch(es) here; reconstruction needs at least one on every rank, and two "
            "rows in all: some to fit and some to hold out"
        )
    return fitted, held
