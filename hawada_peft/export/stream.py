"""
Slim a checkpoint folder straight into a slim folder, tensor by tensor: the dense model is never in memory.

The same steps as in memory, on a model without weights; then every slim tensor is read, merged with its LoRA, folded,
sliced and written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..adapters.huggingface.family import locate
from ..errors import HawAdaError, InvalidPlanError
from ..progress import Progress, progress_bar
from .axes import SliceRule, find_axes
from .checkpoint import Checkpoint, stored_names
from .facts import ExportFacts
from .fold import DEFAULT, Factors, factors_of, fold_tensor, load_gates, lora_of, merge_tensor
from .folder import new_folder
from .hub import checked_report, write_card
from .plan import Plan
from .rank import gate_scores
from .reconstruct import Reconstruction
from .shards import write_shard
from .skeleton import auto_class_of
from .slicing import slice_tensor
from .slim import rows_of, slim, source_of
from .verify import Verification, example_inputs, output_of, verify_files, verify_slim

logger = logging.getLogger(__name__)

NO_PLAN = (
    "there is no plan: apply one to the adapter before it is saved "
    "(`model.apply_plan(model.plan(keep_ratio=0.5))`), or pass one as `plan`"
)
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


class _Export:
    """
    The dense and the slim model without weights, and how a tensor of one becomes one of the other.

    Args:
        checkpoint: the dense model.
        adapter, plan, fold: as in `slim_checkpoint`.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: str | os.PathLike[str] | None, plan: Plan | None, *, fold: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._factors: dict[str, Factors] = {}
        self._lora: dict[str, Any] = {}
        self.dense = checkpoint.skeleton
        if adapter is not None:
            gated = load_gates(self.dense, adapter)
            gate_scores(gated.get_base_model(), locate(gated.get_base_model()), [DEFAULT])  # refuses broken gates
            if plan is None:
                plan = gated.applied_plan()
            else:
                gated.apply_plan(None)  # another plan's closed units must not be folded away
            self._factors = factors_of(gated) if fold else {}
            self._lora = lora_of(gated)
            self.dense = cast(PreTrainedModel, gated.unload())
        if plan is None:
            raise InvalidPlanError(NO_PLAN)
        self.plan = plan
        self._layout = locate(self.dense)
        plan.check_base(self._layout.full)
        self._rules: dict[str, tuple[SliceRule, ...]] = {}
        self.slim = self.dense
        if not plan.keeps_all:
            self.slim = slim(self.dense, plan)
            self._rules = find_axes(self.dense, self._layout, hidden=plan.hidden is not None)

    def write(self, folder: Path, max_shard_size: int | str, progress: Progress | None) -> int:
        """
        Write all files that `save_pretrained` writes, the same.

        Returns:
            The bytes of all tensors.
        """
        self.slim.save_pretrained(folder, state_dict={})  # the configs
        names, state = stored_names(self.slim), self.slim.state_dict()
        like = {key: state[name] for key, name in names.items()}
        try:
            split = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
        except ValueError as error:
            raise HawAdaError(f"max_shard_size={max_shard_size!r}: {error}") from error
        total = sum(tensor.nbytes for tensor in like.values())
        free = shutil.disk_usage(folder).free
        if free < total:
            raise OSError(f"the slim model needs {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}")
        with progress_bar(progress, total=total, desc="slimming", unit="B", unit_scale=True, leave=False) as bar:
            for file, keys in split.filename_to_tensors.items():
                write_shard(folder / file, {key: like[key] for key in keys}, partial(self._watched, names, bar))
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": self.slim.num_parameters(), **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        return total

    def _watched(self, names: dict[str, str], bar: Any, key: str) -> Iterator[torch.Tensor]:
        for part in self._parts(names[key]):
            yield part
            bar.update(part.nbytes)

    def _parts(self, name: str) -> Iterator[torch.Tensor]:
        """A slim tensor by its name in the slim model, in parts along its first dimension."""
        source, layer, short = source_of(name, self._layout, self.plan)
        owner, _, which = source.rpartition(".")
        module, factors, lora = self.dense.get_submodule(owner), self._factors.get(owner), self._lora.get(owner)
        keep = {rule.dim: rows_of(rule, self._layout, self.plan, layer) for rule in self._rules.get(short, ())}
        own = self.dense.get_parameter_or_buffer(source)
        if not own.is_meta:  # trained with the gates: modules_to_save
            parts = iter([own.data])
        elif lora is not None and (which == "weight" or lora.lora_bias[DEFAULT]):
            parts = iter([self._merged(owner, which, lora)])
        elif factors is None or (isinstance(module, nn.Linear) and which == "weight"):
            parts = self._checkpoint.parts(source, keep.pop(0, None))
        else:  # other factors may lie along the first dimension
            parts = self._checkpoint.parts(source, size=None)
        for part in parts:
            if factors is not None:
                part = fold_tensor(module, which, part, factors)
            for dim, rows in keep.items():
                part = slice_tensor(part, dim, rows)
            yield part

    def _merged(self, owner: str, which: str, lora: Any) -> torch.Tensor:
        """A whole parameter of a dense module with its LoRA."""
        needed = (
            [which] if not lora.lora_bias[DEFAULT] else [name for name, _ in lora.get_base_layer().named_parameters()]
        )
        tensors = {name: torch.cat(list(self._checkpoint.parts(f"{owner}.{name}"))) for name in needed}
        return merge_tensor(lora, which, tensors)


def reference_logits(
    base: Path, adapter: str | os.PathLike[str] | None, plan: Plan, *, fold: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The logits that a slim model must compute, from the dense model in memory, and their inputs.

    Args:
        base: the dense model's folder.
        adapter, plan, fold: as in `slim_checkpoint`.
    """
    skeleton = Checkpoint(base).skeleton
    dense = auto_class_of(skeleton).from_pretrained(base, dtype="auto")
    inputs = example_inputs(dense)
    if adapter is None:
        return output_of(slim(dense, plan), inputs), inputs
    gated = PeftModel.from_pretrained(dense, os.fspath(adapter))
    if not fold:
        return output_of(gated.merge_and_unload(plan=plan, fold=False), inputs), inputs
    gated.apply_plan(plan)
    return output_of(gated, inputs), inputs
