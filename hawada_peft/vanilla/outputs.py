"""What goes into a model and what comes out: example inputs, logits, the positions that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from ..errors import UnsupportedModelError

Batch = Mapping[str, Any]

MAIN = ("logits", "last_hidden_state")
"""Names of what a model is about, in transformers' outputs."""


def get_student_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    The gated model's logits.

    Args:
        model: a PEFT model, or a wrapper around one (as for data-parallel training).
        batch: keyword arguments of its forward pass; labels are left out.

    Returns:
        (batch, ..., classes); last hidden states for a model without a head.

    Raises:
        UnsupportedModelError: if the model gives neither.
    """
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    for name in MAIN:
        if name in output:
            return output[name]
    raise UnsupportedModelError(
        f"{type(model).__name__} gives {sorted(output)}; distillation needs `logits` or `last_hidden_state`"
    )


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean where the mask is nonzero; 0 where it is zero everywhere."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)


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
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            output = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    finally:
        model.train(training)
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
    """The model's logits, else last hidden states, else the last of its other outputs; as `outputs_of` gives them."""
    return main_output(outputs_of(model, inputs))


def main_output(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of what `outputs_of` gives: logits, else last hidden states, else the last."""
    return next((outputs[name] for name in MAIN if name in outputs), list(outputs.values())[-1])


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def position_mask(batch: Batch, positions: torch.Size) -> torch.Tensor | None:
    """Where a batch holds tokens and not padding: (batch, seq), bool; None where positions are not tokens."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == positions else None
