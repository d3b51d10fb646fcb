"""`hawada slim`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...progress import Progress
from ..data import check_data
from ..errors import say
from ..options import FILE, Fold, Model, Said, refuse, size

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
        str | None, typer.Option(help="Load the model, and refit on these examples: DATA as for `hawada plan`.")
    ] = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Refit layer by layer from the files, without loading the model.")
    ] = False,
    refit: Annotated[
        bool | None,
        typer.Option(
            help="Refit on the data that the plan was searched with, or slice the files alone; refitted if the search "
            "was, and left its file beside the plan.",
        ),
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Calibration examples at most; 64 if left out.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per example of a text; 256 if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to reconstruct: cpu (if left out), cuda, ...")] = None,
) -> Said:
    """
    Slim a checkpoint of any size straight from its files.

    Tensor by tensor: the dense model is never in memory. With --calibration it is, and the slim model's output
    projections are refitted to it; with a plan of `hawada plan`, whose search refitted, this is done on its data. With
    --low-memory as well neither model is loaded, however large: it takes longer, and gives the same weights.
    """
    from ...basis.stored import load_beside
    from ...shipping.checkpoint import slim_checkpoint
    from ...shipping.facts import ExportFacts
    from ...vanilla.loading import checked_device
    from ..shared import read_batches
    from .plan import read_plan, read_search

    *adapters, output = places
    adapter = adapters[0] if adapters else None
    search, searched = (None, {}) if plan is None else read_search(plan)
    files_alone = not low_memory and (max_shard_size is not None or verify is not None)
    if calibration is None and refit is not False and not files_alone:
        known = searched.get("refitted") and searched.get("model") == base and Path(searched["data"]).exists()
        if refit and not known:
            raise typer.BadParameter("--refit needs --calibration: no search with its data is beside the plan")
        if known:
            calibration, seq_len, examples = (searched[name] for name in ("data", "seq_len", "examples"))
            say(f"refitted on {calibration}, as the search did; --no-refit slices the files alone")
    if calibration is None:
        refuse(
            {"--device": device, "--low-memory": low_memory or None},
            "needs --calibration: nothing is refitted, as the plan's search and its data are not here",
        )
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
        basis=None if plan is None or chosen is None else load_beside(plan, chosen),
        fold=fold,
        calibration=batches,
        low_memory=low_memory,
        device=device if batches is not None else None,
        max_shard_size=max_shard_size,
        verify=verify,
        card=ExportFacts(search=search),
        progress=progress,
    )
    data = calibration or searched.get("data") or "DATA"
    further = (f"hawada evaluate {output} --base {base} --data {data}", f"hawada report {output}")
    return Said(str(made), made.to_dict(), next=further)


def check(
    base: str,
    places: list[str],
    plan: Path | None,
    calibration: str | None,
    refit: bool | None,
    low_memory: bool,
    **options: Any,
) -> None:
    """Refuse options that do not go together, and what is not there."""
    from ...files.folder import check_free
    from ...sources import ADAPTER_FILE, check_source

    *adapters, output = places
    if not adapters and plan is None:
        raise typer.BadParameter("without an ADAPTER a --plan is needed: it says what is kept")
    given = {f"--{name.replace('_', '-')}": each for name, each in options.items()}
    files = {name: given[name] for name in ("--max-shard-size", "--verify")}
    if calibration is None:
        needs = ("--examples", "--seq-len") if plan is not None else ("--examples", "--seq-len", "--device")
        refuse({name: given[name] for name in needs}, "needs --calibration")
        if plan is None or refit is False:
            refuse({"--low-memory": low_memory or None}, "needs --calibration: it says how projections are refitted")
        refuse(files if refit and not low_memory else {}, "does not go with --refit, which slims in memory")
    else:
        why = "which slims in memory, where outputs are always compared"
        refuse({} if low_memory else files, f"does not go with --calibration, {why}; add --low-memory")
        refuse({"--no-refit": None if refit is not False else refit}, "does not go with --calibration, which refits")
        check_data(calibration)
    check_source(base)
    for adapter in adapters:
        check_source(adapter, ADAPTER_FILE)
    check_free(output)
