"""What goes into a model and what comes out: example inputs, logits, the positions that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError

Batch = Mapping[str, Any]


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
    for name in ("logits", "last_hidden_state"):
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
        `pixel_values` of (2, channels, height, width) or `input_ids` of (2, 16).
    """
    generator = torch.Generator().manual_seed(0)
    device, config = model.device, model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    tokens = torch.randint(config.get_text_config().vocab_size, (2, 16), generator=generator)
    return {"input_ids": tokens.to(device)}


def output_of(model: nn.Module, inputs: Batch) -> torch.Tensor:
    """
    The model's logits (else last hidden states, else last feature map) in evaluation mode; the mode is put back.
    Inputs are taken to the model's device.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            output = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    finally:
        model.train(training)
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return output[name]
    return output["feature_maps"][-1]


def position_mask(batch: Batch, positions: torch.Size) -> torch.Tensor | None:
    """Where a batch holds tokens and not padding: (batch, seq), bool; None where positions are not tokens."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == positions else None
