"""What a gated checkpoint computes, layer by layer, for a folder to be compared with."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel

from ..files.checkpoint import Checkpoint
from ..planning.plan import Plan
from ..surgery.slimming import slim
from ..vanilla.outputs import example_inputs, output_of
from ..vanilla.skeleton import auto_class_of


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
