"""From a gated model to a slim one: all or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..vanilla.outputs import Batch


@dataclass(frozen=True)
class Reference:
    """
    What the gated model computed under its plan: what the slim model has to compute before it is refitted or trained.

    Args:
        inputs: keyword arguments of the forward pass.
        logits: (batch, ..., classes); as `output_of` gives them.
    """

    inputs: Batch
    logits: torch.Tensor
