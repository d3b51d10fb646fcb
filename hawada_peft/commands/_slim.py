"""`hawada slim` as a call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import HawAdaError
from ..planning.plan import Plan
from ..progress import Progress
from ..recipes.readers import batches_of, load_examples
from ..shipping.calibrated import slim_calibrated
from ..shipping.checkpoint import SlimCheckpoint, slim_checkpoint
from ._plan import BATCH, SEQ_LEN
from ._regime import checked_device


def slim(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    plan: str | os.PathLike[str] | None = None,
    fold: bool = True,
    max_shard_size: str | None = None,
    verify: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    examples: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> SlimCheckpoint:
    """
    Slim a checkpoint of any size straight from its files, tensor by tensor (`slim_checkpoint`).

    With `calibration` the model is loaded, and the slim one's output projections are refitted to it
    (`slim_calibrated`).

    Args:
        base: folder or id of the dense model.
        adapter: folder or id of the trained gates.
        output: folder for the slim model; must not exist yet, or be empty.
        plan: file of a plan to use instead of the one applied to the adapter.
        fold: fold the gates' soft values into the weights.
        max_shard_size: size of a weight file at most, as `"5GB"`; `"50GB"` if left out. Not with `calibration`.
        verify: `"files"` (if left out), or `"full"`: also load both models and compare logits. Not with `calibration`,
            where that is always done.
        calibration: file of examples to refit on, as for `plan`.
        examples: calibration examples at most; 64 if left out.
        seq_len: tokens per example of a text; 256 if left out.
        device: where to refit; the CPU if left out.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        HawAdaError: on options that the chosen way has no use for; as `slim_checkpoint` and `slim_calibrated`.
        FileExistsError: if the output folder holds something.
        VerificationError: if the output is not what it should be.
    """
    if calibration is None:
        _refuse({"examples": examples, "seq_len": seq_len, "device": device}, "needs calibration: give it as well")
    else:
        _refuse(
            {"max_shard_size": max_shard_size, "verify": verify},
            "is for slimming from files, and calibration slims in memory, where logits are always compared and "
            "transformers cuts the files: leave one of them out",
        )
    chosen = None if plan is None else read_plan(plan)
    if calibration is None:
        return slim_checkpoint(
            base,
            adapter,
            output,
            plan=chosen,
            fold=fold,
            max_shard_size=max_shard_size or "50GB",
            verify=verify or "files",
            progress=progress,
        )
    where = checked_device(device)
    found = load_examples(Path(calibration), os.fspath(base), length=seq_len or SEQ_LEN, count=examples or 64)
    return slim_calibrated(
        base,
        adapter,
        output,
        batches_of(found, BATCH),
        plan=chosen,
        fold=fold,
        device=where,
        progress=progress,
    )


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """
    A plan from its file.

    Raises:
        HawAdaError: if it holds none, with the file's name.
        OSError: if it cannot be read.
    """
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except (HawAdaError, UnicodeDecodeError) as error:
        raise HawAdaError(f"{os.fspath(path)} holds no plan: {error}") from None


def _refuse(given: Mapping[str, object], why: str) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise HawAdaError(f"{', '.join(named)} {why}")
