"""
From a checkpoint folder to a slim folder: tensor by tensor, or in memory where projections are refitted.

Where memory does not hold the models, they are refitted layer by layer.

Tensor by tensor the dense model is never in memory: the same steps on a model without weights; then every slim tensor
is read, merged with its LoRA, folded, sliced and written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from ..basis.attach import give_bases
from ..basis.bases import Bases
from ..basis.basis import Basis
from ..config import HawAdaConfig
from ..discovery.inputs import example_inputs
from ..errors import HawAdaError, InvalidPlanError
from ..files.checkpoint import Checkpoint
from ..files.folder import check_free, new_folder
from ..files.verify import verify_files
from ..planning.plan import Plan
from ..progress import Progress
from ..surgery.fold import gates_config
from ..vanilla.loading import load_model, processor_of
from .facts import ExportFacts, calibration_facts
from .save import Slimmed, save_slim
from .stream import NO_PLAN, _Export
from .verify import reference_outputs, verify_slim
from .write import checked_report, write_card

logger = logging.getLogger(__name__)

NOTHING_ELSE = ExportFacts()
"""Nothing is known about the export beside its base and its plan."""

SHARD = "50GB"
"""Of a weight file at most, as transformers has it."""


def slim_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    basis: Basis | Bases | None = None,
    fold: bool = True,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    low_memory: bool = False,
    device: str | None = None,
    max_shard_size: int | str | None = None,
    verify: str | None = None,
    card: ExportFacts | None = NOTHING_ELSE,
    progress: Progress | None = None,
) -> Slimmed:
    """
    Slim a checkpoint of any size: from safetensors files to safetensors files, tensor by tensor.

    The output has the same bytes as the export in memory, `merge_and_unload` of the model that
    `from_pretrained(base, dtype="auto")` loads, then `save_pretrained`. A few MiB of weights are in memory at a time,
    or one tensor where gates sit on other modules than Linear, or where LoRA is below the gates. Tokenizer, processor
    and licence files of the base are copied along; a `README.md` and a `hawada_report.json` are added. The output
    folder appears complete and verified, or not at all, also when the process is killed.

    With `calibration` the slim model's output projections are refitted to the dense one (`reconstruct`): both models
    are loaded, unless `low_memory` says to go through them layer by layer, straight from the files
    (`refit_on_demand`). The weights are then the same up to rounding. In memory are one layer of each model, or a
    layer, the embeddings and the head of one, and the moments of one projection; hidden states are kept beside the
    output folder meanwhile, in files without a name.

    Args:
        base: folder or Hub id of the dense model, with safetensors files.
        adapter: folder or Hub id of the gates; `None` for plain slicing by `plan`. What else its file holds (LoRA,
            modules to save, embeddings) goes into the weights as well.
        output: the new folder; must not exist yet, or be empty.
        plan (`Plan`, *optional*): what to keep, instead of the plan that was applied to the adapter.
        basis (`Basis` or `Bases`, *optional*): that the plan keeps directions of, where the adapter does not have it.
        fold (`bool`): `False` leaves the gates' soft values out and only removes.
        calibration (*optional*): batches, keyword arguments of the forward pass, each (examples, ...).
        low_memory (`bool`): refit layer by layer, without loading either model. Needs `calibration`, and a model of
            one stack of layers that pass on hidden states and nothing else.
        device (`str`, *optional*): where to refit; the CPU if left out. Needs `calibration`.
        max_shard_size (`int` or `str`, *optional*): bytes per file at most, or as `"5GB"`; `"50GB"` if left out. Not
            with models that are loaded.
        verify (`str`, *optional*): `"files"` (if left out) checks that the folder's config loads through its Auto
            class, that its files hold exactly that model's tensors, and that these are finite. `"full"` also loads
            both models, one after the other, and compares their outputs as `verify_slim` does; not after a
            refit. Not with models that are loaded to refit, whose outputs are always compared.
        card (`ExportFacts`, *optional*): what else is known about the export, for the model card and the report; base,
            plan, reconstruction and calibration data are filled in. `None` writes neither.
        progress (*optional*): makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `Slimmed`: what was written, with its `folder`. Both models are on the meta device, without weights, if it was
        written tensor by tensor.

    Raises:
        FileExistsError: if the output folder holds something, or is a link.
        UnsupportedModelError: if the checkpoint is not in plain safetensors files as transformers names them, or LoRA
            is on a module with more than a weight and a bias.
        InvalidPlanError: if there is no plan.
        IncompatibleBaseError, IllegalShapeError, BrokenGatesError: as `merge_and_unload`.
        VerificationError: if the output is not what it should be.
        HawAdaError: if options do not fit together, the facts contradict the model, or the adapter's file does not
            hold exactly what is the adapter's; as `reconstruct`.
    """
    if verify not in (None, "files", "full"):
        raise HawAdaError(f"verify must be 'files' or 'full', got {verify!r}")
    check_free(output)  # before the work
    if calibration is not None and not low_memory:
        _refuse(
            {"max_shard_size": max_shard_size, "verify": verify},
            "is for slimming from files, and calibration slims in memory, where outputs are always compared and "
            "transformers cuts the files: leave one of them out, or add low_memory",
        )
        return _in_memory(
            base, adapter, output, plan, basis, calibration, fold=fold, device=device, card=card, bars=progress
        )
    if calibration is None:
        _refuse({"device": device, "low_memory": low_memory or None}, "needs calibration: give it as well")
    elif verify == "full":
        raise HawAdaError(
            "verify='full' compares with the plain slim model, and calibration changes it: leave one of them out"
        )
    checkpoint = Checkpoint(base)
    export = _Export(checkpoint, adapter, plan, fold=fold, basis=basis)
    if card is not None:
        card = replace(card, base=card.base or base, plan=card.plan or export.plan)
        checked_report(export.slim, card)  # before anything is written
    reconstruction = None
    with new_folder(output) as folder:
        if calibration is not None and not export.plan.keeps_all:
            batches = list(calibration)
            reconstruction = export.refit(batches, folder, device, progress)
            if card is not None:
                facts = card.calibration or calibration_facts(batches)
                card = replace(card, reconstruction=card.reconstruction or reconstruction, calibration=facts)
        export.write(folder, max_shard_size or SHARD, progress)
        checkpoint.copy_companions(folder)
        verify_files(folder, export.slim)
        verification = None
        if verify == "full":
            expected, inputs = reference_outputs(checkpoint.folder, adapter, export.plan, fold=fold, basis=basis)
            verification = verify_slim(folder, reference=expected, inputs=inputs).require()
        if card is not None:
            write_card(folder, card, verification)
    logger.info("%s: %s", output, export.plan)
    return Slimmed(
        model=export.slim,
        plan=export.plan,
        dense=export.dense,
        folder=Path(output),
        verification=verification,
        reconstruction=reconstruction,
    )


def _in_memory(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    plan: Plan | None,
    basis: Basis | Bases | None,
    calibration: Iterable[Mapping[str, torch.Tensor]],
    *,
    fold: bool,
    device: str | None,
    card: ExportFacts | None,
    bars: Progress | None,
) -> Slimmed:
    applied = None if adapter is None else gates_config(adapter).to_dict()["plan"]
    chosen = Plan.from_dict(applied) if plan is None and applied is not None else plan
    if chosen is None:
        raise InvalidPlanError(NO_PLAN)
    batches = list(calibration)
    dense = load_model(os.fspath(base), device or "cpu")
    gated: Any
    if adapter is None:  # gates that are not trained say nothing
        gated, fold = get_peft_model(dense, HawAdaConfig(gates=("heads", "ffn", "layers"))), False
    else:
        gated = PeftModel.from_pretrained(dense, os.fspath(adapter))
    give_bases(gated, chosen, Bases.of(basis))
    slimmed: Slimmed = gated.slim(progressbar=bars is not None, plan=plan, fold=fold, calibration=batches)
    if slimmed.dense is None:
        slimmed = replace(slimmed, dense=Checkpoint(base).skeleton)
    small = slimmed.model
    if card is not None:
        card = replace(
            card,
            base=card.base or base,
            plan=card.plan or chosen,
            reconstruction=card.reconstruction or slimmed.reconstruction,
            calibration=card.calibration or slimmed.calibration or calibration_facts(batches),
        )
    verification = save_slim(small, output, inputs=example_inputs(small), processor=processor_of(base), card=card)
    return replace(slimmed, folder=Path(output), verification=verification)


def _refuse(given: Mapping[str, object], why: str) -> None:
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise HawAdaError(f"{', '.join(named)} {why}")
