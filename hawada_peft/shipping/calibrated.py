"""From a dense folder and saved gates to a slim folder, in memory: the way that reconstruction needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..files.folder import check_free
from ..planning.plan import Plan
from ..progress import Progress
from ..refit.reconstruction import Reconstruction
from ..surgery.fold import gates_config
from ..vanilla.loading import load_model, processor_of
from ..vanilla.outputs import example_inputs
from .checkpoint import NOTHING_ELSE, SlimCheckpoint
from .facts import ExportFacts, calibration_facts
from .save import save_slim
from .stream import NO_PLAN


def slim_calibrated(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    calibration: Iterable[Mapping[str, torch.Tensor]],
    *,
    plan: Plan | None = None,
    fold: bool = True,
    device: str = "cpu",
    card: ExportFacts | None = NOTHING_ELSE,
    progress: Progress | None = None,
) -> SlimCheckpoint:
    """
    Slim a checkpoint with reconstruction: `slim_checkpoint` for models that fit in memory.

    `merge_and_unload(calibration=...)` of what `from_pretrained(base, dtype="auto")` loads, then `save_slim`. The
    base's tokenizer or image processor is saved with it, if there is one.

    Args:
        base: folder or Hub id of the dense model.
        adapter: folder or Hub id of the gates.
        output: the new folder; must not exist yet, or be empty.
        calibration: batches, keyword arguments of the forward pass, each (examples, ...); see `reconstruct`.
        plan (`Plan`, *optional*): what to keep, instead of the plan that was applied to the adapter.
        fold (`bool`): `False` leaves the gates' soft values out and only removes.
        device (`str`): where the models are.
        card (`ExportFacts`, *optional*): what else is known about the export, for the model card and the report; base,
            plan, reconstruction and calibration data are filled in. `None` writes neither.
        progress (*optional*): `tqdm.tqdm` for progress bars; none are shown if left out.

    Returns:
        `SlimCheckpoint`: what was written; `reconstruction` is None if the plan cuts nothing.

    Raises:
        FileExistsError: if the output folder holds something.
        InvalidPlanError: if there is no plan.
        HawAdaError: if the adapter is none, or one of another type; if the facts contradict the model; as
            `reconstruct`.
        IncompatibleBaseError, IllegalShapeError, BrokenGatesError, UnsupportedModelError: as `merge_and_unload`.
        VerificationError: if the output is not what it should be.
    """
    check_free(output)  # before the work
    applied = gates_config(adapter).to_dict()["plan"]
    if plan is None and applied is None:
        raise InvalidPlanError(NO_PLAN)
    chosen = Plan.from_dict(applied) if plan is None else plan
    batches, reports = list(calibration), list[Reconstruction]()
    dense = load_model(os.fspath(base), device)
    dense_parameters = dense.num_parameters()
    gated: Any = PeftModel.from_pretrained(dense, os.fspath(adapter))
    options = {"calibration": batches, "on_reconstruction": reports.append}
    small = cast(PreTrainedModel, gated.merge_and_unload(progress is not None, plan=plan, fold=fold, **options))
    reconstruction = reports[0] if reports else None
    if card is not None:
        card = replace(
            card,
            base=card.base or base,
            plan=card.plan or chosen,
            reconstruction=card.reconstruction or reconstruction,
            calibration=card.calibration or calibration_facts(batches),
        )
    verification = save_slim(small, output, inputs=example_inputs(small), processor=processor_of(base), card=card)
    return SlimCheckpoint(
        folder=Path(output),
        plan=chosen,
        parameters=small.num_parameters(),
        dense_parameters=dense_parameters,
        weight_bytes=sum({tensor.data_ptr(): tensor.nbytes for tensor in small.state_dict().values()}.values()),
        verification=verification,
        reconstruction=reconstruction,
    )
