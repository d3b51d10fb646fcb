"""The file that a checkpoint of gate training has beside the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..basis.attach import attach_directions, attach_in_heads
from ..distil.checkpoints import adapter_folder
from ..errors import CheckpointError
from ..planning.plan import Plan
from ..vanilla.shape import HIDDEN

STATE_FILE = "hawada_state.json"
"""Beside the adapter in a checkpoint: the goal, the approached plan, the history, the search."""


def read_state(folder: Path) -> dict[str, Any]:
    """
    Read `STATE_FILE`.

    Raises:
        CheckpointError: if it is missing or holds something else.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint is not one of this trainer, or not complete")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    known = isinstance(state, dict) and all(isinstance(state.get(name), dict) for name in ("goal", "phases"))
    history = state.get("history", []) if known else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path} holds no 'goal', 'phases' and 'history': it is not of this trainer")
    return dict(state)


def restore_plan(model: Any, checkpoint: Path) -> None:
    """Apply a checkpoint's plan: PEFT loads the weights of an adapter that exists already, but not its config."""
    (name,) = model.active_adapters
    config = PeftConfig.from_pretrained(str(adapter_folder(checkpoint, name)))
    plan = None if config.plan is None else Plan.from_dict(config.plan)
    model.apply_plan(plan, in_training=config.plan_in_training)


def restore_gates(model: Any, checkpoint: Path) -> None:
    """
    Put gates on directions of the residual stream in, and bases inside of heads, if a search has put them into the
    checkpoint's adapter.
    """
    (name,) = model.active_adapters
    config = PeftConfig.from_pretrained(str(adapter_folder(checkpoint, name)))
    if config.rotate and HIDDEN not in model.peft_config[name].gates:
        attach_directions(model, name)
    if config.narrow_heads and not model.peft_config[name].narrow_heads:
        attach_in_heads(model, name)
