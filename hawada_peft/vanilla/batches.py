"""Batches of examples: what of them goes into a model, their rows, their padding, whether a model can take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import BadDataError

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward pass: tensors, and whatever else it takes."""

LABELS = frozenset({"labels", "label_ids", "start_positions", "end_positions"})
"""What only a loss of the model's own asks for."""


def without_labels(batch: Batch, device: torch.device | str | None = None) -> dict[str, Any]:
    """A batch's arguments but its labels, the tensors on a device; arguments that are no tensors stay as they are."""
    there = {name: value for name, value in batch.items() if name not in LABELS}
    return there if device is None else on_device(there, device)


def on_device(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def main_input(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    What a batch's examples are made of: the model's main input, else its embeddings, else the first tensor.

    Raises:
        BadDataError: if the batch has no tensor with an axis.
    """
    name = getattr(model, "main_input_name", "")
    named = [batch.get(each) for each in (name, "inputs_embeds")]
    for value in (*named, *batch.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return value
    raise BadDataError(f"a batch holds no tensor with rows, only {sorted(batch)}")


def rows_of(batch: Batch, rows: slice, total: int) -> dict[str, Any]:
    """Some of a batch's examples; tensors whose first axis is not `total` long, and what is no tensor, are kept."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == total else value
        for name, value in batch.items()
    }


def has_rows(batch: Batch, total: int) -> bool:
    """Whether all of a batch's tensors have one entry for each of its examples, so that it can be taken apart."""
    return {len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim} == {total}


def position_mask(batch: Batch, positions: torch.Size) -> torch.Tensor | None:
    """
    Where a batch holds tokens and not padding: (batch, seq), bool; of the last ones alone where `logits_to_keep` says
    so; None where positions are not tokens.
    """
    mask, last = batch.get("attention_mask"), batch.get("logits_to_keep")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and isinstance(last, int) and last > 0:
        mask = mask[:, -last:]
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == positions else None


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean where the mask is nonzero; 0 where it is zero everywhere."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def check_batch(model: nn.Module, batch: Batch, *, labels: bool = False) -> None:
    """
    Refuse data that a model cannot take, before any work is done with it.

    Args:
        model: the model, or a PEFT model around it; of one that is not of transformers the inputs are not known.
        batch: keyword arguments of its forward pass.
        labels: whether its labels, if there are any, will be used.

    Raises:
        BadDataError: listing everything that is wrong: inputs of another modality, no examples, token ids outside the
            vocabulary, NaN or infinity, a mask of another length or of nothing but padding, texts of one token for a
            loss on the next one.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(batch, Mapping):
        raise BadDataError(
            f"a batch must be a mapping of the model's arguments, such as {{'input_ids': ...}}, got a "
            f"{type(batch).__name__}"
        )
    if not isinstance(base, PreTrainedModel):
        return
    name = base.main_input_name
    found = next((each for each in (name, "inputs_embeds") if isinstance(batch.get(each), torch.Tensor)), None)
    if found is None:
        raise BadDataError(
            f"a batch must hold {name!r} as a tensor for {type(base).__name__}, got {_described(batch)}"
        )
    inputs = batch[found]
    if not inputs.numel():
        raise BadDataError(f"a batch holds no examples: {found!r} has shape {tuple(inputs.shape)}")
    problems = []
    if found == "input_ids":
        problems += _token_problems(base, inputs)
    problems += [
        f"{each!r} holds NaN or infinity: check how the data is read and normalised"
        for each, value in batch.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not _finite(value, each)
    ]
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and found in ("input_ids", "inputs_embeds"):
        if mask.shape != inputs.shape[:2]:
            problems.append(
                f"'attention_mask' has shape {tuple(mask.shape)}, and must have that of the tokens in {found!r}, "
                f"{tuple(inputs.shape[:2])}"
            )
        elif not mask.any():
            problems.append("'attention_mask' is zero everywhere: no token counts")
    if labels:
        problems += _label_problems(base, batch.get("labels"), len(inputs))
    if problems:
        raise BadDataError("\n".join(problems))


def _finite(value: torch.Tensor, name: str) -> bool:
    """Additive masks hold -infinity on purpose."""
    return "mask" in name or bool(value.isfinite().all())


def _token_problems(model: PreTrainedModel, tokens: torch.Tensor) -> list[str]:
    if tokens.is_floating_point() or tokens.ndim != 2:
        return [
            f"'input_ids' must be integers of shape (batch, tokens), got {tokens.dtype} of shape {tuple(tokens.shape)}"
        ]
    size, low, high = _vocabulary(model), int(tokens.min()), int(tokens.max())
    if low >= 0 and high < size:
        return []
    return [
        f"'input_ids' holds token ids from {low} to {high}, and the model has embeddings for 0 to {size - 1}: use the "
        "tokenizer that belongs to it, or resize its embeddings before the gates are placed"
    ]


def _vocabulary(model: PreTrainedModel) -> int:
    """Token ids that a model has embeddings for."""
    try:
        return len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    except NotImplementedError:  # transformers' for models of several towers
        return cast(int, model.config.get_text_config().vocab_size)


def _label_problems(model: PreTrainedModel, labels: Any, rows: int) -> list[str]:
    if not isinstance(labels, torch.Tensor):
        return []
    if labels.ndim == 0 or len(labels) != rows:
        return [f"'labels' has shape {tuple(labels.shape)} for {rows} examples"]
    if LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and labels.ndim == 2 and labels.shape[1] < 2:
        return ["the texts have one token: there is no next one to predict; give longer ones, or leave 'labels' out"]
    return []


def _described(batch: Batch) -> str:
    shapes = {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        for name, value in batch.items()
    }
    return f"{shapes}" if shapes else "nothing"
