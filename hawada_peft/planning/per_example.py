"""Each example's own gradients of the loss by the gates, by one forward and one backward pass of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
)

from ..errors import RowsError
from ..gates.kinds import SigmoidGate
from ..gates.rows import theta_per_row
from ..vanilla.batches import Batch, main_input, masked_mean, on_device, position_mask, rows_of, without_labels
from ..vanilla.heads import Head, head_of, is_bare
from ..vanilla.outputs import get_student_logits

LossOfLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits (rows, ..., classes) and labels (rows, ...): ()."""

LossOfRow = Callable[[torch.Tensor, int], torch.Tensor]
"""Of the logits of one row, (1, ..., classes), and its place in the batch: the row's own loss, ()."""


def example_gradients(
    model: nn.Module, gates: Sequence[SigmoidGate], batch: Batch, generator: torch.Generator
) -> Iterator[Sequence[torch.Tensor]]:
    """
    The gradients of each example's own loss by the gates' thetas.

    The loss is the model's own where the batch has labels; otherwise targets are drawn from its predictions. Every row
    of the batch gets thetas of its own (`theta_per_row`), so one backward pass gives all gradients. Where the batch
    cannot be taken apart that way, it goes example by example: where its tensors differ in their first axes, the input
    of a gated module has another first axis, or the loss is not one of transformers' losses on the logits of language
    models and classifiers.

    A batch for which an accelerator's memory does not suffice is halved: its activations are all kept for the backward
    pass, as transformers leaves out gradient checkpointing in evaluation mode.

    Args:
        model: a gated model, in evaluation mode.
        gates: some of its gates.
        batch: keyword arguments of its forward pass; taken to the gates' device.
        generator: for the draws, on the CPU.

    Yields:
        For some of the examples at a time, until all have been, for each gate: (examples, ...), with theta's axes.
    """
    device = gates[0].theta.device
    batch = without_labels(batch, device) if is_bare(model) else on_device(batch, device)
    batch = {name: value for name, value in batch.items() if value is not None}
    sizes = {len(value) for value in batch.values() if _has_rows(value)}
    rows = len(main_input(model.get_base_model() if isinstance(model, PeftModel) else model, batch))
    together, fits, drawn = None, True, generator.get_state()
    if rows > 0 and len(sizes) == 1:
        try:
            together = _together(model, gates, batch, rows, generator)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            fits = False
    if together is not None:
        yield together
    elif not fits:
        generator.set_state(drawn)
        for half in _parts(batch, rows, (rows + 1) // 2):
            yield from example_gradients(model, gates, half, generator)
    else:
        thetas = [gate.theta for gate in gates]
        for example in _parts(batch, rows, 1):
            loss = _loss(model, example, generator)
            yield [each[None] for each in torch.autograd.grad(loss, thetas, materialize_grads=True)]


def _together(
    model: nn.Module, gates: Sequence[SigmoidGate], batch: Batch, rows: int, generator: torch.Generator
) -> Sequence[torch.Tensor] | None:
    """The gradients of all rows, or None where the batch cannot be taken apart. Nothing has been drawn then."""
    with theta_per_row(gates, rows) as thetas:
        try:
            found = _forward(model, batch, generator)
        except RowsError:
            return None
        if found is None or len(found[0]) != rows:
            return None
        logits, loss = found
        # Row by row as far as the logits: float32 copies of them would be the largest tensors.
        by_logits = torch.empty_like(logits)
        for row in range(rows):
            one = logits[row : row + 1].detach().requires_grad_()
            (by_logits[row : row + 1],) = torch.autograd.grad(loss(one, row), one)
        # 0 of what the logits do not depend on, as a pooling head beside the hidden states.
        return torch.autograd.grad(logits, thetas, by_logits, materialize_grads=True)


def _forward(model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, LossOfRow] | None:
    """A batch's logits, and a row's loss by its logits; None if that is not known."""
    if "labels" not in batch:
        logits = get_student_logits(model, batch)
        mask, head = position_mask(batch, logits.shape[:-1]), head_of(model, logits)
        return logits, lambda one, row: _loss_of_draw(one, None if mask is None else mask[row], generator, head)
    loss, labels = _loss_function(model), batch["labels"]
    if loss is None:
        return None
    output = model(**batch)
    logits = output["logits"]
    if labels.shape not in (logits.shape[:-1], logits.shape):
        return None
    with torch.no_grad():  # a model may add to the loss of its logits, or have another one
        if not torch.allclose(loss(logits, labels), output["loss"], equal_nan=True):
            return None
    return logits, lambda one, row: loss(one, labels[row : row + 1])


def _loss_function(model: nn.Module) -> LossOfLogits | None:
    """What transformers has for the model's class, if it takes logits and labels alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return None
    function = LOSS_MAPPING.get(base.loss_type)
    if function in (ForCausalLMLoss, ForMaskedLMLoss):
        return lambda logits, labels: function(logits, labels, logits.shape[-1])
    if function is ForSequenceClassificationLoss:
        return lambda logits, labels: function(labels, logits, base.config)
    return None


def _loss(model: nn.Module, example: Batch, generator: torch.Generator) -> torch.Tensor:
    """Of a batch of one."""
    if "labels" in example:
        return model(**example)["loss"]
    logits = get_student_logits(model, example)
    return _loss_of_draw(logits, position_mask(example, logits.shape[:-1]), generator, head_of(model, logits))


def _loss_of_draw(
    logits: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator, head: Head
) -> torch.Tensor:
    """The negative log-likelihood of targets drawn by one example's logits."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    targets = head.draw(flat.detach(), generator)  # one example after the other: the same in every batching
    return masked_mean(head.surprise(flat, targets), None if mask is None else mask.flatten())


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _parts(batch: Batch, rows: int, size: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch, in batches of at most `size`."""
    for start in range(0, rows, size):
        yield rows_of(batch, slice(start, start + size), rows)
