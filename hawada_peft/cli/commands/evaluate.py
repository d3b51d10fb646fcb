"""`hawada evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...progress import Progress
from ..data import DATA, check_data
from ..options import DEVICE, ClockCommand, Effort, Level, Said, Slim
from ..tables import table

if TYPE_CHECKING:
    from pathlib import Path

    from ...evaluation.evaluate import Evaluation
    from ...latency.regime import Regime

EXAMPLES = (
    "hawada evaluate ./slim --base ./teacher --data text.txt",
    "hawada evaluate ./slim --base ./teacher --data held_out.jsonl --seq-len 256 --batch-size 8 --json",
    "hawada evaluate ./slim --base ./vit --data ./photos --no-latency",
)


def run(
    slim: Slim,
    progress: Progress | None,
    base: Annotated[str, typer.Option(help="Folder or id of the dense model.", show_default=False)],
    data: Annotated[str, typer.Option(help=DATA, show_default=False)],
    examples: Annotated[int, typer.Option(min=1, help="Examples at most: the last ones of the data.")] = 64,
    latency: Annotated[bool, typer.Option(help="Time both models, in turns.")] = True,
    effort: Level = Effort.normal,
    clock_command: ClockCommand = None,
    **regime: Any,
) -> Said:
    """
    Compare a slim model with its dense one.

    Perplexity or accuracy or the cosine of embeddings, how often both say the same, and the latency of both in turns:
    under the conditions of the search if none are given. What was found goes into its card and report. Examples that
    the slim model was calibrated on are left out.
    """
    from ...evaluation.evaluate import evaluate_slim
    from ...shipping.report import read_report
    from ...vanilla.loading import checked_device
    from ..shared import effort_of, read_last_batches

    device = checked_device(regime["device"])
    report = read_report(slim) or {}
    timed = _regime(slim, report, regime) if latency else None
    length = regime["seq_len"] or (timed.length if timed is not None else None)
    batches = read_last_batches(data, base, seq_len=length, examples=examples, used=report.get("calibration"))
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    tokens = f" of {len(batches[0]['input_ids'][0])} tokens" if "input_ids" in batches[0] else ""
    found = evaluate_slim(
        slim,
        base,
        batches,
        data=f"{count} held-out examples{tokens}",
        regime=timed,
        device=device,
        effort=effort_of(effort, clock_command=clock_command),
        progress=progress,
    )
    further = (f"hawada report {slim}", f"hawada push {slim} NAME/MODEL")
    return Said(_text(found), found.to_dict(), next=further)


def check(slim: Path, base: str, data: str) -> None:
    """Refuse what is not there."""
    from ...sources import check_source

    check_data(data)
    check_source(str(slim))
    check_source(base)


def _regime(slim: Path, report: dict[str, Any], given: dict[str, Any]) -> Regime:
    """What was asked for; or how the search or an earlier evaluation timed."""
    from ...latency.budget import LatencyBudget
    from ...latency.regime import Conditions, Regime
    from ...search.timed import regime_of
    from ...vanilla.loading import load_skeleton

    known = (report.get("latency") or report.get("search") or {}).get("regime")
    if known is not None and Conditions(**given) == Conditions(device=DEVICE):
        return Regime.from_dict(known)
    return regime_of(load_skeleton(str(slim)), LatencyBudget(speedup=1.0, **given))


def _text(found: Evaluation) -> str:
    rows = [
        (each.name, f"{each.dense:.4g}", f"{each.slim:.4g}", f"{each.slim / each.dense:.2f}x" if each.dense else "")
        for each in found.quality
    ]
    lines = []
    if found.latency is not None:
        dense, slim = found.latency["dense"], found.latency["slim"]
        faster = f"{dense.median_ms / slim.median_ms:.2f}x faster"
        rows.append(("latency, ms", f"{dense.median_ms:.3f}", f"{slim.median_ms:.3f}", faster))
        lines.append(f"timed in turns: {slim.regime}, {slim.device_name}")
    before, after = found.dense_parameters, found.slim_parameters
    rows.append(("parameters", f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    lines.append(f"on {found.quality[0].data}; written into {found.folder / 'README.md'} and its report")
    return "\n".join([table(["", "dense", "slim", ""], rows), *lines])
