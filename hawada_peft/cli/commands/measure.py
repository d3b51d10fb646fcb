"""`hawada measure`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...progress import Progress
from ..options import ClockCommand, Effort, Fresh, Level, Model, Said

if TYPE_CHECKING:
    from ...latency.table import LatencyTable

EXAMPLES = (
    "hawada measure ./teacher --batch-size 8 --seq-len 256",
    "hawada measure meta-llama/Llama-3.2-1B --seq-len 1024 --dtype bfloat16 --device cuda",
    "hawada measure ./teacher --prompt-tokens 512 --output-tokens 128 --batch-size 4",
    "hawada measure ./teacher --seq-len 256 --clock-command 'python time_it.py {folder} {batch_size} {seq_len}'",
    "hawada measure ./vit --batch-size 64 --json > table.json",
)


def run(
    model: Model,
    progress: Progress | None,
    effort: Level = Effort.normal,
    fresh: Fresh = False,
    clock_command: ClockCommand = None,
    **regime: Any,
) -> Said:
    """Measure a latency table of a model's shapes on this machine. No weights are loaded."""
    from ...latency.budget import LatencyBudget
    from ...search.timed import measure_table, regime_of
    from ...vanilla.loading import checked_device, load_skeleton
    from ..shared import effort_of

    hard = effort_of(effort, fresh=fresh, clock_command=clock_command)
    checked_device(regime["device"])
    skeleton = load_skeleton(model)
    conditions = regime_of(skeleton, LatencyBudget(speedup=1.0, **regime))
    table = measure_table(skeleton, conditions, effort=hard, progress=progress)
    return Said("\n".join(_lines(table)), table.to_dict())


def check(model: str) -> None:
    """Refuse what is no model."""
    from ...sources import check_source

    check_source(model)


def _lines(table: LatencyTable) -> Iterator[str]:
    """The table, and what a few shapes would take."""
    from ...vanilla.shape import Shape

    yield str(table)
    yield f"FFN sizes in multiples of {table.multiple} are not slower than larger ones"
    sizes = table.dense.sizes()
    layers, ffn = sizes["num_hidden_layers"], sizes["intermediate_size"]
    shapes = {
        f"{kept} of {layers} layers": Shape(num_hidden_layers=kept)
        for kept in (max(1, layers * part // 4) for part in (3, 2))
    } | {f"FFN {ffn // 2} of {ffn}": Shape(intermediate_size=ffn // 2)}
    for text, shape in shapes.items():
        ms = table.estimate(shape.complete(table.dense))
        yield f"  {text:24} {ms:9.3f} ms  {table.dense_ms / ms:5.2f}x  (estimated)"
