"""What comes out of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .batches import Batch, on_device, without_labels
from .heads import prediction_of
from .mode import evaluating


def get_student_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    The gated model's logits.

    Args:
        model: a PEFT model, or a wrapper around one (as for data-parallel training).
        batch: keyword arguments of its forward pass; labels are left out.

    Returns:
        (batch, ..., classes), as `prediction_of` says; last hidden states for a model without a head.

    Raises:
        UnsupportedModelError: if the model gives nothing that can be compared.
    """
    return prediction_of(model(**without_labels(batch)), model)


def outputs_of(model: nn.Module, inputs: Batch) -> dict[str, torch.Tensor]:
    """
    All that a model computes, in evaluation mode; the mode is put back. Inputs are taken to the model's device.

    Returns:
        The floating tensors of its output by their names there, those of a tuple as `"feature_maps.0"`. Caches are no
        tensors, and left out.

    Raises:
        UnsupportedModelError: if there are none.
    """
    with evaluating(model), torch.no_grad():
        output = model(**on_device(inputs, next(model.parameters()).device))
    found = floats_of(output)
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} gives {sorted(output)}, none of it floating tensors")
    return found


def floats_of(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The floating tensors of a model's output; see `outputs_of`."""
    found: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if isinstance(value, tuple | list):
            found |= {f"{name}.{index}": part for index, part in enumerate(value) if _floating(part)}
        elif _floating(value):
            found[name] = value
    return found


def output_of(model: nn.Module, inputs: Batch) -> torch.Tensor:
    """
    What the model predicts (`prediction_of`) in evaluation mode; the mode is put back. Inputs are taken to the model's
    device.
    """
    with evaluating(model), torch.no_grad():
        return prediction_of(model(**on_device(inputs, next(model.parameters()).device)), model)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
