"""What goes into a model and what comes out: example inputs, logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

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
    What the model predicts (`prediction_of`) in evaluation mode; the mode is put back. Inputs are taken to the model's
    device.
    """
    with evaluating(model), torch.inference_mode():
        return prediction_of(model(**on_device(inputs, next(model.parameters()).device)), model)
