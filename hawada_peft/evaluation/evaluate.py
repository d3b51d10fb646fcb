"""A slim folder beside its dense model: quality, agreement and latency, written into the folder's report and card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..latency.effort import Effort
from ..latency.measuring import measure_many
from ..latency.regime import Regime
from ..latency.runner import check_call
from ..latency.timing import Timing
from ..progress import Progress, progress_bar
from ..shipping.facts import QualityChange
from ..shipping.write import add_to_report
from ..vanilla.loading import load_model, load_skeleton
from .measures import qualities

QUALITY, LATENCY = "comparing outputs", "timing both in turns"
"""What the steps are shown as."""


@dataclass(frozen=True)
class Evaluation:
    """
    A slim model beside the dense one.

    Args:
        folder (`Path`): of the slim model.
        quality (`tuple[QualityChange, ...]`): agreement, and perplexity or accuracy.
        latency (`dict[str, Timing]`, *optional*): of `"dense"` and `"slim"`, in turns.
        dense_parameters (`int`): before.
        slim_parameters (`int`): after.
    """

    folder: Path
    quality: tuple[QualityChange, ...]
    latency: Mapping[str, Timing] | None
    dense_parameters: int
    slim_parameters: int

    @property
    def speedup(self) -> float | None:
        """How many times faster the slim model is; None if nothing was timed."""
        if self.latency is None:
            return None
        return self.latency["dense"].median_ms / self.latency["slim"].median_ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        timed = None if self.latency is None else {name: each.median_ms for name, each in self.latency.items()}
        return {
            "folder": str(self.folder),
            "quality": [asdict(change) for change in self.quality],
            "latency_ms": timed,
            "speedup": self.speedup,
            "regime": None if self.latency is None else self.latency["slim"].regime.to_dict(),
            "dense_parameters": self.dense_parameters,
            "slim_parameters": self.slim_parameters,
        }


def evaluate_slim(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    data: str,
    regime: Regime | None = None,
    device: str = "cpu",
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """
    Compare a slim folder with its dense model, and write what was found into its report and card.

    Args:
        folder: the slim model, as `save_slim` left it.
        base: folder or id of the dense model.
        batches: keyword arguments of the forward pass, each (examples, ...), which nothing was calibrated or trained
            on.
        data: what they are, for the report.
        regime: to time both models under, in turns; nothing is timed if left out.
        device: where outputs are compared.
        effort: how long is timed, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `Evaluation`: as it was written.

    Raises:
        BadDataError: if there are no batches.
        InvalidRegimeError: before any work, if the model cannot run that way.
        FileNotFoundError: if there is no such model.
    """
    folder = Path(folder)
    if regime is not None:
        check_call(load_skeleton(str(folder)), regime)
    dense, slim = (load_model(os.fspath(each), device) for each in (base, folder))
    with progress_bar(progress, total=len(batches), desc=QUALITY, unit="batch", leave=False) as bar:
        quality = tuple(qualities(dense, slim, batches, data, each=bar.update))
    timed: dict[str, Timing] | None = None
    if regime is not None:
        models = {
            name: cast(PreTrainedModel, nn.Module.to(model, regime.device, regime.torch_dtype))
            for name, model in (("dense", dense), ("slim", slim))
        }
        with progress_bar(progress, total=1, desc=LATENCY, unit="pair", leave=False):
            timed = measure_many(models, regime, effort=effort)
    add_to_report(folder, base=base, quality=quality, latency=timed)
    return Evaluation(folder, quality, timed, dense.num_parameters(), slim.num_parameters())
