"""Checkpoints of trainings: whether everything is there that a training goes on from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME as ADAPTER_FILE
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from ..errors import CheckpointError

logger = logging.getLogger(__name__)


def checkpoint_of(resume_from_checkpoint: Any, args: TrainingArguments) -> Path:
    """
    The folder that a training is to go on from.

    Args:
        resume_from_checkpoint: as in `Trainer.train`: the folder, or `True` for the last one in the output folder.
        args: of the training that goes on.

    Raises:
        CheckpointError: if there is none.
    """
    if resume_from_checkpoint is True:
        last = get_last_checkpoint(args.output_dir)
        if last is None:
            raise CheckpointError(f"there is no checkpoint in {args.output_dir} to resume: start without it")
        return Path(last)
    if not isinstance(resume_from_checkpoint, str | os.PathLike):
        raise CheckpointError(f"resume_from_checkpoint must be a folder, or True, got {resume_from_checkpoint!r}")
    return Path(resume_from_checkpoint)


def check_complete(folder: Path, args: TrainingArguments, adapters: Iterable[Path] = ()) -> None:
    """
    Check that a checkpoint holds the files that `Trainer` takes its state from, which it does without in silence.

    Args:
        folder: the checkpoint.
        args: of the training that goes on.
        adapters: the folders of its adapters.

    Raises:
        CheckpointError: naming those that are missing, empty or cut.
    """
    random = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    randoms = sorted(path.name for path in folder.glob("rng_state*.pth"))
    if randoms and random not in randoms:
        logger.warning("%s was saved by %d process(es): random numbers go on anew", folder, len(randoms))
        random = randoms[0]
    names = [OPTIMIZER_NAME, SCHEDULER_NAME, random, TRAINER_STATE_NAME, *([SCALER_NAME] if args.fp16 else [])]
    missing = [name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing}, so that training would not go on as it was: name a complete checkpoint, saved "
            "without `save_only_model`, or start anew from its weights"
        )
    configs = [adapter / ADAPTER_FILE for adapter in adapters] + list(folder.glob(CONFIG_NAME))
    broken = [path for path in (folder / TRAINER_STATE_NAME, *configs) if not _holds_object(path)]
    broken += [path for path in folder.glob("*.safetensors") if not _opens(path)]
    broken += [folder / name for name in names if name != TRAINER_STATE_NAME and not is_zipfile(folder / name)]
    if broken:
        raise CheckpointError(f"{', '.join(map(str, broken))}: missing or damaged. Name another checkpoint")


def _holds_object(path: Path) -> bool:
    try:
        return path.is_file() and isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def check_tensors(folder: Path, model: PeftModel, name: str) -> None:
    """
    Check that a saved adapter holds every tensor that the adapter of a model has.

    Args:
        folder: of the adapter.
        model: with the adapter.
        name: its name in the model.

    Raises:
        CheckpointError: naming the file, and what it lacks.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint of adapter {name!r}")
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    state: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing = sorted(set(state) - found)
    if missing:
        raise CheckpointError(f"{path} lacks {missing[:4]} ({len(missing)} of {len(state)} tensors)")


def adapter_folder(checkpoint: Path, name: str) -> Path:
    """Where PEFT saves an adapter within a folder."""
    return checkpoint if name == "default" else checkpoint / name


@contextmanager
def keeping_trainable(model: Any) -> Iterator[None]:
    """What requires gradients afterwards is what did before: PEFT's `set_adapter` switches all of an adapter on."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, parameter.requires_grad))
