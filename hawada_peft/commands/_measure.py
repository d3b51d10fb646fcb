"""`hawada measure` as a call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..progress import Progress
from ..search.timed import measure_table, regime_of
from ..vanilla.loading import load_skeleton
from ..vanilla.shape import Shape
from ._regime import RegimeOptions, checked_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class MeasureResult:
    """
    What was measured.

    Args:
        table (`LatencyTable`): the costs of the model's sizes; its `to_dict` is this one's.
    """

    table: LatencyTable

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the whole table, which `LatencyTable.from_dict` reads."""
        return self.table.to_dict()

    def _examples(self) -> Iterator[tuple[str, Shape]]:
        sizes = self.table.dense.sizes()
        layers, ffn = sizes["num_hidden_layers"], sizes["intermediate_size"]
        for kept in dict.fromkeys(max(1, layers * part // 4) for part in (3, 2)):
            yield f"{kept} of {layers} layers", Shape(num_hidden_layers=kept)
        yield f"FFN {ffn // 2} of {ffn}", Shape(intermediate_size=ffn // 2)

    def __str__(self) -> str:
        table = self.table
        lines = [str(table), f"FFN sizes in multiples of {table.multiple} are not slower than larger ones"]
        for text, shape in self._examples():
            ms = table.estimate(shape.complete(table.dense))
            lines.append(f"  {text:24} {ms:9.3f} ms  {table.dense_ms / ms:5.2f}x  (estimated)")
        return "\n".join(lines)


def measure(
    model: str | os.PathLike[str],
    *,
    effort: Effort | None = None,
    progress: Progress | None = None,
    **regime: Unpack[RegimeOptions],
) -> MeasureResult:
    """
    Measure a latency table of a model's shapes on this machine. No weights are loaded.

    The table is kept in the user's cache folder; a second call reads it from there.

    Args:
        model: folder or id of the dense model.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        regime: `mode`, `batch_size`, `seq_len`, `image_size`, `dtype`, `backend`, `device`: see `RegimeOptions`. The
            device is the CPU if left out.

    Raises:
        InvalidRegimeError: if the conditions contradict themselves, or the model cannot run that way.
        UnsupportedModelError: if the model has no family row.
    """
    regime["device"] = checked_device(regime.get("device"))
    asked = LatencyBudget(speedup=1.0, **regime)
    skeleton = load_skeleton(os.fspath(model))
    return MeasureResult(measure_table(skeleton, regime_of(skeleton, asked), effort=effort, progress=progress))
