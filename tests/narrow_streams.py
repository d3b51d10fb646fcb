"""Plans that narrow the residual stream, for the rows of the table."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, VISION_ROW, scattered_plan
from peft import PeftModel
from torch import nn

from hawada_peft import Plan, Shape
from hawada_peft.vanilla.family import locate

ALL = (*EVERYTHING, "hidden")
HIDDEN = {"llama": 40, "llama-bare": 40, "llama-mha": 40, "qwen3": 45, "dinov2": 32}
"""Sizes that are legal with the rows' slim shapes; 44 elsewhere."""

two_rows = pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])


def size_of(name: str) -> int:
    return HIDDEN.get(name, 44)


def hidden_plan(model: nn.Module, shape: Shape, size: int | None = None) -> Plan:
    """A scattered plan that keeps some channels of the residual stream, drawn at random."""
    layout = locate(model.get_base_model() if isinstance(model, PeftModel) else model)
    kept = random.Random(5).sample(range(layout.hidden_size), size or shape.hidden_size)
    return replace(
        scattered_plan(model, replace(shape, hidden_size=None)),
        dense=replace(layout.dense, hidden_size=layout.hidden_size),
        hidden=tuple(sorted(kept)),
    )


def narrow(outputs: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Hidden states of the channels that stay; logits as they are."""
    wide = outputs.shape[-1] == plan.dense.hidden_size
    return outputs[..., list(plan.hidden)] if wide else outputs
