"""A slim checkpoint written tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..basis.bases import Bases, Change, change_of, heads_basis
from ..basis.basis import Basis, stream_basis, turn_of
from ..basis.heads.turn import head_turn
from ..errors import HawAdaError, InvalidPlanError, VerificationError
from ..files.checkpoint import Checkpoint
from ..files.pieces import Piece, stored_form, stored_pieces
from ..files.shards import write_shard
from ..files.spill import Spill
from ..gates.reading import gate_scores
from ..planning.plan import Plan
from ..progress import Progress, progress_bar
from ..refit.layerwise import Keep, in_memory
from ..refit.low_memory import refit_on_demand
from ..refit.on_demand import OnDemand
from ..refit.reconstruction import Reconstruction
from ..surgery.cutting import Cutting, towers_for
from ..surgery.fold import DEFAULT, Factors, factors_of, fold_tensor, load_gates, lora_of, merge_tensor
from ..surgery.slicing import slice_tensor
from ..surgery.slimming import slim
from ..vanilla.batches import Batch
from ..vanilla.family import locate, locate_all
from ..vanilla.resize import make_plain, untie

NO_PLAN = (
    "there is no plan: apply one to the adapter before it is saved "
    "(`model.apply_plan(model.plan(keep_ratio=0.5))`), or pass one as `plan`"
)


class _Export:
    """
    The dense and the slim model without weights, and how a tensor of one becomes one of the other.

    Args:
        checkpoint: the dense model.
        adapter, plan, basis, fold: as in `slim_checkpoint`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: str | os.PathLike[str] | None,
        plan: Plan | None,
        *,
        fold: bool,
        basis: Basis | Bases | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._factors: dict[str, Factors] = {}
        self._lora: dict[str, Any] = {}
        self._turn: Change | None = None
        self._stacks: dict[str, torch.Tensor] = {}
        self._refitted: Mapping[str, torch.Tensor] = {}
        given, factor = Bases.of(basis), None
        stream = given.stream if plan is not None and plan.rotated else None
        heads = given.heads
        self.dense = checkpoint.skeleton
        if adapter is not None:
            gated = load_gates(self.dense, adapter)
            for layout in locate_all(gated.get_base_model()):
                gate_scores(gated.get_base_model(), layout, [DEFAULT])  # refuses broken gates
            if plan is None:
                plan = gated.applied_plan()
            else:
                gated.apply_plan(None)  # another plan's closed units must not be folded away
            self._factors = factors_of(gated) if fold else {}
            self._lora = lora_of(gated)
            base = gated.get_base_model()
            if plan is not None:
                layout = locate(base)
                stream, factor = stream_basis(base, layout, [DEFAULT], plan, fold=fold, given=given.stream)
                heads = heads_basis(base, layout, [DEFAULT], plan, given.heads)
            self.dense = cast(PreTrainedModel, gated.unload())
            untie(self.dense)
        make_plain(self.dense)
        if plan is None:
            raise InvalidPlanError(NO_PLAN)
        self.plan = plan
        towers = towers_for(self.dense, plan)
        for layout, part in towers:
            part.check_base(layout.full)
        self._cutting: Cutting | None = None
        self.slim = self.dense
        turn = None
        if stream is not None:
            kept = None if plan.hidden is None else torch.tensor(plan.hidden)
            turn = turn_of(self.dense, towers[0][0], stream, kept, factor, self._whole)
        self._turn = change_of(turn, head_turn(self.dense, plan, heads))
        if not plan.keeps_all or self._turn is not None:
            self.slim = slim(self.dense, plan, turn=self._turn)
            self._cutting = Cutting(towers)

    def refit(
        self, calibration: Iterable[Batch], folder: Path, device: str | None, progress: Progress | None
    ) -> Reconstruction:
        """
        Refit the slim model's output projections to the dense model, both layer by layer from the files.

        Args:
            calibration: batches.
            folder: on a disk that has room for what memory has not; left as it is.
            device: where layers are computed; the CPU if left out.
            progress: makes a progress bar.

        Raises:
            InvalidPlanError, HawAdaError, BadDataError, UnsupportedModelError: as `refit_on_demand`.
        """
        batches, teacher = list(calibration), Checkpoint(self._checkpoint.folder)
        spill, where = Spill(folder), torch.device(device or "cpu")
        keep: Keep = (
            spill if where.type == "cpu" else in_memory
        )  # an accelerator works on what it has in its own memory
        options: dict[str, Any] = {"keep": spill, "device": where}
        with (
            OnDemand(teacher.skeleton, locate(teacher.skeleton), teacher.whole, **options) as dense,
            OnDemand(self.slim, locate(self.slim), self._read, **options) as slim,
        ):
            turned = None if self._turn is None else self._turn.write
            result = refit_on_demand(dense, slim, self.plan, batches, keep=keep, coordinates=turned, progress=progress)
        self._refitted = slim.changed
        return result

    def write(self, folder: Path, max_shard_size: int | str, progress: Progress | None) -> int:
        """
        Write all files that `save_pretrained` writes, the same.

        Returns:
            The bytes of all tensors.
        """
        self.slim.save_pretrained(folder, state_dict={})  # the configs
        pieces, like = stored_pieces(self.slim), stored_form(self.slim)
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
                write_shard(folder / file, {key: like[key] for key in keys}, partial(self._watched, pieces, bar))
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": self.slim.num_parameters(), **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        return total

    def _watched(self, pieces: dict[str, Piece], bar: Any, key: str) -> Iterator[torch.Tensor]:
        piece = pieces[key]
        for part in self._parts(piece.name) if piece.entry is None else [piece.of(self._stack(piece.name))]:
            if part.is_floating_point() and not part.isfinite().all():
                raise VerificationError(f"{key} would hold NaN or infinity: nothing is written")
            yield part
            bar.update(part.nbytes)

    def _stack(self, name: str) -> torch.Tensor:
        """A slim tensor that the files hold in pieces. The last two are kept: pieces of both alternate in a file."""
        if name not in self._stacks:
            self._stacks = dict([*self._stacks.items()][-1:])
            self._stacks[name] = self._read(name)
        return self._stacks[name]

    def _read(self, name: str) -> torch.Tensor:
        """A whole slim tensor."""
        return torch.cat(list(self._parts(name)))

    def _parts(self, name: str) -> Iterator[torch.Tensor]:
        """A slim tensor by its name in the slim model, in parts along its first dimension."""
        if name in self._refitted:
            yield self._refitted[name]
            return
        source, keep = name, {}
        if self._cutting is not None:
            source, keep = self._cutting.source(name), self._cutting.rows(name)
        if self._turn is None or not self._turn.touches(source):
            yield from self._dense_parts(source, keep)
            return
        turned = self._turn.tensor(source, self._whole)
        for dim, rows in keep.items():
            turned = slice_tensor(turned, dim, rows)
        yield turned

    def _whole(self, name: str) -> torch.Tensor:
        """A dense tensor with its LoRA and its gates in it."""
        return torch.cat(list(self._dense_parts(name, {})))

    def _dense_parts(self, source: str, keep: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
        """What stays of a dense tensor, in parts along its first dimension."""
        owner, _, which = source.rpartition(".")
        module, factors, lora = self.dense.get_submodule(owner), self._factors.get(owner), self._lora.get(owner)
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
