"""What counts as a number, and as a latency table that was measured: for what people and files give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .table import LatencyTable

FAR = 2.0
"""A table's estimate of a shape that it has seen is off by this factor at most."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # whole, and beyond all floats
        return False


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least `least`, and no bool."""
    return isinstance(value, int) and is_number(value) and value >= least


def problems_of(table: LatencyTable) -> Iterator[str]:
    """
    What no measured table has: numbers that are none, times that are not above 0, sizes out of order, grids of other
    sizes than they belong to.

    Args:
        table: as it was read, of right field names.
    """
    single = ("fixed_ms", "layer_ms", "interaction_ms", "dense_ms", "scale", "offset_ms", "seconds")
    numbers: dict[str, Any] = {name: getattr(table, name) for name in single}
    numbers |= {f"ffn_ms[{index}]": value for index, value in enumerate(table.ffn_ms)}
    numbers |= {
        f"attention_ms[{row}][{column}]": value
        for row, values in enumerate(table.attention_ms)
        for column, value in enumerate(values)
    }
    numbers |= {f"realised[{index}].ms": point.ms for index, point in enumerate(table.realised)}
    numbers |= {f"errors.{name}": value for name, value in table.errors.items()}
    broken = [name for name, value in numbers.items() if not is_number(value)]
    broken += [
        name
        for name, value in numbers.items()
        if name not in broken
        and (value <= 0 if name == "dense_ms" or name.startswith("realised") else value < 0)
        and (name in ("dense_ms", "seconds") or name.startswith(("realised", "attention_ms", "errors")))
    ]
    if broken:
        yield "no finite numbers, or too small: " + ", ".join(f"{name} = {numbers[name]!r}" for name in broken[:4])
    sizes = {name: getattr(table, name) for name in ("kv_groups", "heads_per_group", "ffn_sizes")}
    for name, values in sizes.items():
        if not values or not all(is_whole(value, 0) for value in values) or any(a >= b for a, b in pairwise(values)):
            yield f"{name} must be rising whole numbers, got {values!r}"
    grid = [len(table.kv_groups), *{len(row) for row in table.attention_ms}]
    if len(table.attention_ms) != grid[0] or grid[1:] != [len(table.heads_per_group)]:
        yield "attention_ms must have a row per KV group and a column per number of heads in a group"
    if len(table.ffn_ms) != len(table.ffn_sizes):
        yield "ffn_ms must have a number per FFN size"
    if not is_whole(table.multiple, 1):
        yield f"multiple must be a whole number of at least 1, got {table.multiple!r}"
    texts = (table.device_name, table.measured_at, table.unsettled)
    if not all(isinstance(text, str) for text in texts):
        yield f"device_name, measured_at and unsettled must be text, got {texts!r}"


def disagreements(table: LatencyTable) -> Iterator[str]:
    """Shapes that the table has seen and estimates to be something else."""
    narrower = table.model.get("dense_hidden_size", table.model["hidden_size"]) != table.model["hidden_size"]
    seen = [(point.shape, point.ms) for point in table.realised]
    for shape, ms in seen or ([] if narrower else [(table.dense, table.dense_ms)]):
        estimate = table.estimate(shape)
        if not (math.isfinite(estimate) and ms / FAR < estimate < ms * FAR):
            yield f"{shape.to_dict()} took {ms!r} ms, and its costs add up to {estimate:.6g} ms"
