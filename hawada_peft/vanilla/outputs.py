"""What goes into a model and what comes out: example inputs, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

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


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Inputs of the kind that a model takes, drawn at random but always the same.

    Returns:
        `pixel_values` of (2, channels, height, width) or `input_ids` of (2, 16); one row where a head classifies
        sequences and no token is padding, by which it would find the end of each row.
    """
    generator = torch.Generator().manual_seed(0)
    device, config = model.device, model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    text = config.get_text_config()
    alone = text.pad_token_id is None and type(model).__name__ in CLASSIFIERS.values()
    tokens = torch.randint(text.vocab_size, (2, 16), generator=generator)
    return {"input_ids": tokens[: 1 if alone else 2].to(device)}


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
