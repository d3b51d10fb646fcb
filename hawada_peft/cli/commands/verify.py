"""`hawada verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import FILE, Fold, Said, Slim

EXAMPLES = (
    "hawada verify ./slim",
    "hawada verify ./slim --base ./teacher --adapter ./adapter",
    "hawada verify ./slim --compile --onnx --json",
)


def run(
    slim: Slim,
    base: Annotated[str | None, typer.Option(help="Dense model: the slim one must be smaller.")] = None,
    adapter: Annotated[str | None, typer.Option(help="With --base: compare logits with the gated model.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of the export; the report's if left out.", **FILE)] = None,
    fold: Fold = True,
    compile: Annotated[bool, typer.Option("--compile", help="Also run it under torch.compile.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also export it to ONNX, and run that.")] = False,
) -> Said:
    """
    Reload a slim folder, and check that it is what it should be.

    It must be vanilla (loaded strictly through its Auto class, from safetensors files, without a field, tensor or line
    of code from here), of the sizes that its report says, and finite. Exit code 1 if it is not.
    """
    from ...shipping.verify import verify_slim
    from .plan import read_plan

    runtimes = [name for name, asked in (("compile", compile), ("onnx", onnx)) if asked]
    chosen = None if plan is None else read_plan(plan)
    found = verify_slim(slim, base=base, adapter=adapter, plan=chosen, fold=fold, runtimes=runtimes)
    return Said(str(found), found.to_dict(), ok=found.ok)
