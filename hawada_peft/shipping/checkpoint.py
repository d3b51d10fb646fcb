"""
Slim a checkpoint folder straight into a slim folder, tensor by tensor: the dense model is never in memory.

The same steps as in memory, on a model without weights; then every slim tensor is read, merged with its LoRA, folded,
sliced and written.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from ..files.checkpoint import Checkpoint
from ..files.folder import new_folder
from ..files.verify import Verification, verify_files, verify_slim
from ..planning.plan import Plan
from ..progress import Progress
from ..refit.reconstruction import Reconstruction
from .facts import ExportFacts
from .reference import reference_logits
from .stream import _Export
from .write import checked_report, write_card

logger = logging.getLogger(__name__)

NOTHING_ELSE = ExportFacts()
"""Nothing is known about the export beside its base and its plan."""


@dataclass(frozen=True)
class SlimCheckpoint:
    """
    What `slim_checkpoint` or `slim_calibrated` wrote.

    Args:
        folder (`Path`): the slim model.
        plan (`Plan`): what stayed.
        parameters (`int`): of the slim model.
        dense_parameters (`int`): of the dense model.
        weight_bytes (`int`): in the slim tensors.
        verification (`Verification`, *optional*): what was measured; by `slim_checkpoint` with `verify="full"`.
        reconstruction (`Reconstruction`, *optional*): what that did; of `slim_calibrated`, if anything was cut.
    """

    folder: Path
    plan: Plan
    parameters: int
    dense_parameters: int
    weight_bytes: int
    verification: Verification | None = None
    reconstruction: Reconstruction | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder),
            "shape": self.plan.shape.to_dict(),
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "weight_bytes": self.weight_bytes,
            "verification": None if self.verification is None else asdict(self.verification),
            "reconstruction": None if self.reconstruction is None else asdict(self.reconstruction),
        }

    def __str__(self) -> str:
        lines = [
            str(self.plan),
            f"{self.parameters:,} of {self.dense_parameters:,} parameters stay: {self.weight_bytes / 1e6:.1f} MB in "
            f"{self.folder}",
        ]
        if self.verification is not None:
            found = self.verification
            lines.append(f"verified: logits differ by at most {found.max_difference:.2g} of {found.scale:.3g}")
        if self.reconstruction is not None:
            lines.append(f"reconstruction: {self.reconstruction}")
        if self.plan.keeps_all:
            lines.append("the plan cuts nothing")
        return "\n".join(lines)


def slim_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    fold: bool = True,
    max_shard_size: int | str = "50GB",
    verify: str = "files",
    card: ExportFacts | None = NOTHING_ELSE,
    progress: Progress | None = None,
) -> SlimCheckpoint:
    """
    Slim a checkpoint of any size: from safetensors files to safetensors files, tensor by tensor.

    The output has the same bytes as the export in memory, `merge_and_unload` of the model that
    `from_pretrained(base, dtype="auto")` loads, then `save_pretrained`. A few MiB of weights are in memory at a time,
    or one tensor where gates sit on other modules than Linear, or where LoRA is below the gates. Tokenizer, processor
    and licence files of the base are copied along; a `README.md` and a `hawada_report.json` are added. The output
    folder appears complete and verified, or not at all, also when the process is killed.

    Args:
        base: folder or Hub id of the dense model, with safetensors files.
        adapter: folder or Hub id of the gates; `None` for plain slicing by `plan`.
        output: the new folder; must not exist yet, or be empty.
        plan (`Plan`, *optional*): what to keep, instead of the plan that was applied to the adapter.
        fold (`bool`): `False` leaves the gates' soft values out and only removes.
        max_shard_size (`int` or `str`): bytes per file at most, or as `"5GB"`.
        verify (`str`): `"files"` checks that the folder's config loads through its Auto class and that its files hold
            exactly that model's tensors. `"full"` also loads both models, one after the other, and compares their
            logits as `verify_slim` does.
        card (`ExportFacts`, *optional*): what else is known about the export, for the model card and the report; base
            and plan are filled in. `None` writes neither.
        progress (*optional*): makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `SlimCheckpoint`: what was written.

    Raises:
        FileExistsError: if the output folder holds something.
        UnsupportedModelError: if the checkpoint is not in plain safetensors files as transformers names them, or LoRA
            is on a module with more than a weight and a bias.
        InvalidPlanError: if there is no plan.
        IncompatibleBaseError, IllegalShapeError, BrokenGatesError: as `merge_and_unload`.
        VerificationError: if the output is not what it should be.
        HawAdaError: if the facts contradict the model.
    """
    if verify not in ("files", "full"):
        raise HawAdaError(f"verify must be 'files' or 'full', got {verify!r}")
    checkpoint = Checkpoint(base)
    export = _Export(checkpoint, adapter, plan, fold=fold)
    if card is not None:
        card = replace(card, base=card.base or base, plan=card.plan or export.plan)
        checked_report(export.slim, card)  # before anything is written
    with new_folder(output) as folder:
        weight_bytes = export.write(folder, max_shard_size, progress)
        checkpoint.copy_companions(folder)
        verify_files(folder, export.slim)
        verification = None
        if verify == "full":
            logits, inputs = reference_logits(checkpoint.folder, adapter, export.plan, fold=fold)
            verification = verify_slim(folder, logits, inputs)
        if card is not None:
            write_card(folder, card, verification)
    logger.info("%s: %s", output, export.plan)
    return SlimCheckpoint(
        folder=Path(output),
        plan=export.plan,
        parameters=export.slim.num_parameters(),
        dense_parameters=export.dense.num_parameters(),
        weight_bytes=weight_bytes,
        verification=verification,
    )
