"""What every unit is worth to the model's predictions: Fisher information of the gates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from ..errors import HawAdaError
from ..gates.attach import collect_gates, masks_put_back
from ..processes import Reduce, of_this_rank, rank_of
from ..vanilla.batches import Batch, check_batch
from ..vanilla.mode import evaluating
from .per_example import example_gradients
from .plan import Plan


def gate_importance(
    model: nn.Module, batches: Iterable[Batch], plan: Plan | None = None, *, reduce: Reduce = of_this_rank
) -> dict[str, torch.Tensor]:
    """
    The empirical Fisher information of every active gate at its start: the mean over examples of the squared
    gradient of the loss.

    Where a batch has labels the loss is the model's own; otherwise targets are drawn from the model's own predictions
    (the true Fisher): a class, labels independent of each other, or normal numbers around the outputs of a model whose
    outputs are no distribution (`head_of`).

    Args:
        model: a gated model in any mode; its gates are put back afterwards.
        batches: keyword arguments of its forward pass. One gradient is taken per example: squares of a batch's mean
            gradient rank far worse. A batch takes one forward and one backward pass, and the memory of a training step
            with it. Example by example it is done where a batch cannot be taken apart: where its tensors differ in
            their first axes, a gated module's input has another first axis than the batch, or the model's loss is not
            one of transformers' losses on the logits of language models and classifiers.
        plan: what it closes stays closed meanwhile, whatever its legality: importance in the model without it.
        reduce: sums over ranks; each has batches of its own then (`all_reduced`).

    Returns:
        By the names of `collect_gates`: a tensor of the gate's shape, float64, on the CPU.

    Raises:
        HawAdaError: if there are no batches or no trainable gates.
        BadDataError: if a batch holds what the model cannot take.
    """
    gates = {name: gate for name, gate in collect_gates(model).items() if gate.theta.requires_grad}
    if not gates:
        raise HawAdaError("the model has no trainable gates; is an adapter active, and not in inference mode?")
    thetas = [gate.theta for gate in gates.values()]
    before = [theta.detach().clone() for theta in thetas]
    totals = [torch.zeros(theta.shape, dtype=torch.float64) for theta in thetas]
    generator = torch.Generator().manual_seed(rank_of(reduce))  # the caller's random state stays
    count = 0
    with evaluating(model), masks_put_back(model):
        try:
            for gate in gates.values():
                gate.set_plan(None)
                nn.init.constant_(gate.theta, gate.start.theta)
            if plan is not None:
                cast(Any, model).set_masks(plan)
            for batch in batches:
                check_batch(model, batch, labels=True)
                for gradients in example_gradients(model, list(gates.values()), batch, generator):
                    count += len(gradients[0])
                    for total, gradient in zip(totals, gradients, strict=True):
                        total += gradient.double().square().sum(0).cpu()
        finally:
            for theta, value in zip(thetas, before, strict=True):
                theta.data.copy_(value)
    sums = [torch.tensor(float(count), dtype=torch.float64), *totals]
    examples, *totals = (reduce(each.to(thetas[0].device)).cpu() for each in sums)
    if examples == 0:
        raise HawAdaError("no calibration batches were given; pass at least one")
    return {name: total / examples for name, total in zip(gates, totals, strict=True)}
