"""The demo's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """
    What was found out about one form of one model.

    Args:
        task, title: of the model.
        form: `"dense"`, `"masked"` (the dense weights with gates closed by the plan) or `"slim"`.
        parameters: in memory.
        layers, heads, kv_heads, ffn: sizes; for the masked form, what its plan leaves open.
        latency_ms: median of a forward pass; None for the masked form, which is not meant to be fast.
        budget, regime, device, rounds: what was asked for; how it was timed, on what, how often.
        quality, quality_name: on the held-out examples, and what it is.
        examples, held_out: how many those are, and what.
        agreement: per cent of the predictions (largest logits) that are the dense model's.
        difference: largest absolute difference of logits to the masked form, on the held-out examples; slim form only.
    """

    task: str
    title: str
    form: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    latency_ms: float | None
    budget: str
    regime: str
    device: str
    rounds: int
    quality: float
    quality_name: str
    examples: int
    held_out: str
    agreement: float
    difference: float | None


COLUMNS = ("", "parameters", "layers", "heads", "KV", "FFN", "latency", "speedup", "quality", "agrees", "difference")

NOTES = """\
dense       the trained teacher
masked      the same weights behind trained gates, those outside the plan closed
slim        what merge_and_unload made of it, saved, and reloaded with Auto*.from_pretrained
latency     median of {rounds} passes, dense and slim in turns, on {device}
agrees      predictions (largest logits) that are the dense model's
difference  largest absolute difference of held-out logits, masked before saving, slim reloaded"""


def render(rows: Sequence[Row]) -> str:
    """
    One aligned plain-text table of less than 100 columns, with notes on what the numbers are.

    Args:
        rows: as `run_demo` gives them: per task dense, masked, slim.
    """
    dense = {row.task: row for row in rows if row.form == "dense"}
    cells = {task: [_cells(row, first) for row in rows if row.task == task] for task, first in dense.items()}
    lines = [COLUMNS, *(line for block in cells.values() for line in block)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [_aligned(COLUMNS, widths), rule]
    for task, first in dense.items():
        text += [_heading(first), *(_aligned(line, widths) for line in cells[task]), rule]
    sample = next(iter(dense.values()))
    return "\n".join([*text, NOTES.format(rounds=sample.rounds, device=sample.device)])


def _heading(row: Row) -> str:
    return f"{row.title}, asked for {row.budget} ({row.regime})\n{row.quality_name} on {row.examples} {row.held_out}"


def _cells(row: Row, dense: Row) -> tuple[str, ...]:
    latency = speedup = "-"
    if row.latency_ms is not None and dense.latency_ms is not None:
        latency, speedup = f"{row.latency_ms:.1f} ms", f"{dense.latency_ms / row.latency_ms:.2f}x"
    return (
        row.form,
        f"{row.parameters:,}",
        str(row.layers),
        str(row.heads),
        str(row.kv_heads),
        str(row.ffn),
        latency,
        speedup,
        f"{row.quality:.1f}",
        f"{row.agreement:.1f} %",
        "-" if row.difference is None else f"{row.difference:.1e}",
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([f"{first.strip():<{widths[0]}}", *others]).rstrip()
