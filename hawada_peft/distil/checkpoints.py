"""Checkpoints of trainings: whether everything is there that a training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..errors import CheckpointError


def check_complete(folder: Path, args: TrainingArguments) -> None:
    """
    Check that a checkpoint holds the files that `Trainer` takes its state from, which it does without in silence.

    Args:
        folder: the checkpoint.
        args: of the training that goes on.

    Raises:
        CheckpointError: naming those that are missing or empty.
    """
    random = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    names = [OPTIMIZER_NAME, SCHEDULER_NAME, random, TRAINER_STATE_NAME, *([SCALER_NAME] if args.fp16 else [])]
    missing = [name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing}, so that training would not go on as it was: name a complete checkpoint, saved "
            "by as many processes and without `save_only_model`, or start anew from its weights"
        )


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
