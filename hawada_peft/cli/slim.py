"""`hawada slim`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..progress import Progress
from .options import FILE, Fold, Model, Said, refuse, size

EXAMPLES = (
    "hawada slim ./teacher ./adapter ./slim",
    "hawada slim ./teacher ./slim --plan plan.json",
    "hawada slim meta-llama/Llama-3.1-8B ./adapter ./slim --max-shard-size 5GB",
    "hawada slim ./teacher ./adapter ./slim --calibration text.txt --json",
)


class Verify(str, Enum):
    """How much is checked."""

    files = "files"
    full = "full"


def _places(given: list[str]) -> list[str]:
    if len(given) > 2:
        raise typer.BadParameter(f"give an adapter and an output folder, or only the latter, got {given}")
    return given


def run(
    base: Model,
    progress: Progress | None,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[ADAPTER] OUTPUT",
            callback=_places,
            show_default=False,
            help="Folder or id of the trained gates, none with --plan; folder for the slim model, new or empty.",
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan to use instead of the one applied to the adapter.", **FILE),
    ] = None,
    fold: Fold = True,
    max_shard_size: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", help="Of a weight file at most, as 5GB or 500MB; 50GB if left out."),
    ] = None,
    verify: Annotated[
        Verify | None,
        typer.Option(help="What is looked at (files if left out); full also loads both models and compares logits."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, help="Load the model, and reconstruct on these examples: as for `hawada plan`."),
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Calibration examples at most; 64 if left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per example of a text; 256 if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to reconstruct: cpu (if left out), cuda, ...")] = None,
) -> Said:
    """
    Slim a checkpoint of any size straight from its files.

    Tensor by tensor: the dense model is never in memory. With --calibration it is, and the slim model's output
    projections are refitted to it.
    """
    from ..shipping.checkpoint import slim_checkpoint
    from ..vanilla.loading import checked_device
    from .plan import read_basis, read_plan
    from .shared import read_batches

    *adapters, output = places
    adapter = adapters[0] if adapters else None
    batches = None
    if calibration is not None:
        device = checked_device(device or "cpu")
        batches = read_batches(calibration, base, seq_len=seq_len, examples=examples)
    chosen = None if plan is None else read_plan(plan)
    made = slim_checkpoint(
        base,
        adapter,
        output,
        plan=chosen,
        basis=None if plan is None or chosen is None else read_basis(plan, chosen),
        fold=fold,
        calibration=batches,
        device=device,
        max_shard_size=max_shard_size,
        verify=verify,
        progress=progress,
    )
    return Said(str(made), made.to_dict())


def check(base: str, places: list[str], plan: Path | None, calibration: Path | None, **options: Any) -> None:
    """Refuse options that do not go together, and what is not there."""
    from ..files.folder import check_free
    from ..sources import ADAPTER_FILE, check_source

    *adapters, output = places
    if not adapters and plan is None:
        raise typer.BadParameter("without an ADAPTER a --plan is needed: it says what is kept")
    given = {f"--{name.replace('_', '-')}": each for name, each in options.items()}
    if calibration is None:
        refuse({name: given[name] for name in ("--examples", "--seq-len", "--device")}, "needs --calibration")
    else:
        refuse(
            {name: given[name] for name in ("--max-shard-size", "--verify")},
            "does not go with --calibration, which slims in memory, where outputs are always compared",
        )
    check_source(base)
    for adapter in adapters:
        check_source(adapter, ADAPTER_FILE)
    check_free(output)
