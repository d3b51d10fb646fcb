"""How much the loss depends on each gate, and gates that start from it.

References:
    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), equation 8, for squared gradients of
    gates at 1; Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (2022), for the empirical Fisher
    of masks of heads and FFN channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from ..adapters.attach import collect_gates
from ..adapters.base import UNITS
from ..adapters.gates import SigmoidGate
from ..adapters.huggingface.shape import Shape
from ..errors import HawAdaError
from ..export.plan import Plan
from ..export.quality import MaskedQuality
from .distill import Batch
from .example_gradients import example_gradients

SPREAD = 0.5
"""Half the range over which a start by importance spreads theta / T around the common start."""


def gate_importance(model: nn.Module, batches: Iterable[Batch], plan: Plan | None = None) -> dict[str, torch.Tensor]:
    """
    The empirical Fisher information of every active gate at its start: the mean over examples of the squared
    gradient of the loss.

    Where a batch has labels the loss is the model's own; otherwise targets are drawn from the model's own predictions
    (the true Fisher).

    Args:
        model: a gated model in any mode; its gates are put back afterwards.
        batches: keyword arguments of its forward pass. One gradient is taken per example: squares of a batch's mean
            gradient rank far worse. A batch takes one forward and one backward pass, and the memory of a training step
            with it. Example by example it is done where a batch cannot be taken apart: where its tensors differ in
            their first axes, a gated module's input has another first axis than the batch, or the model's loss is not
            one of transformers' losses on the logits of language models and classifiers.
        plan: what it closes stays closed meanwhile, whatever its legality: importance in the model without it.

    Returns:
        By the names of `collect_gates`: a tensor of the gate's shape, float64, on the CPU.

    Raises:
        HawAdaError: if there are no batches or no trainable gates.
    """
    gates = {name: gate for name, gate in collect_gates(model).items() if gate.theta.requires_grad}
    if not gates:
        raise HawAdaError("the model has no trainable gates; is an adapter active, and not in inference mode?")
    thetas = [gate.theta for gate in gates.values()]
    before = [theta.detach().clone() for theta in thetas]
    plans = [(gate.kept, gate.hard_in_training) for gate in gates.values()]
    totals = [torch.zeros(theta.shape, dtype=torch.float64) for theta in thetas]
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays
    training, count = model.training, 0
    model.eval()
    try:
        for gate in gates.values():
            gate.set_plan(None)
            nn.init.constant_(gate.theta, gate.start.theta)
        if plan is not None:
            cast(Any, model).set_masks(plan)
        for batch in batches:
            for gradients in example_gradients(model, list(gates.values()), batch, generator):
                count += len(gradients[0])
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient.double().square().sum(0).cpu()
    finally:
        model.train(training)
        for theta, value, gate, (kept, hard) in zip(thetas, before, gates.values(), plans, strict=True):
            theta.data.copy_(value)
            gate.set_plan(kept, in_training=hard)
    if count == 0:
        raise HawAdaError("no calibration batches were given; pass at least one")
    return {name: total / count for name, total in zip(gates, totals, strict=True)}


def init_gates(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: str = "fisher",
    *,
    shape: Shape | None = None,
    spread: float = SPREAD,
) -> None:
    """
    Start the gates in the order of their importance, close to where they start anyway.

    Heads and channels are ordered within their module, channels of the residual stream among each other, gates on
    blocks and layers over the whole model. The least important gate of n gets `theta = start - spread * T`, the most
    important `start + spread * T`, evenly in between.

    Args:
        model: a gated model.
        batches: calibration batches, as in `gate_importance`.
        criterion: `"fisher"`.
        shape: the shape that is aimed at. If it has fewer layers, those to go are found by dropping one after the
            other and measuring the loss (`MaskedQuality`), and everything else is ordered by its importance without
            them. A squared gradient says little about something as large as a layer.
        spread: see above.

    Raises:
        HawAdaError: on another criterion, or as `gate_importance`.
    """
    if criterion != "fisher":
        raise HawAdaError(f"criterion must be 'fisher', got {criterion!r}")
    batches = list(batches)
    gates = collect_gates(model)
    without, places = None, {}
    if shape is not None and shape.num_hidden_layers is not None:
        quality, layers = MaskedQuality(cast(PeftModel, model), batches), shape.num_hidden_layers
        if layers < quality.layout.dense.sizes()["num_hidden_layers"]:
            without, places = quality.without_layers(layers), _places(quality, layers)
    pooled: dict[str, list[tuple[SigmoidGate, torch.Tensor]]] = {}
    for name, importance in gate_importance(model, batches, without).items():
        slot, adapter = name.split(".")[-2:]
        if id(gates[name]) in places:
            importance = torch.full_like(importance, places[id(gates[name])])
        pooled.setdefault(name if slot == UNITS else f"{slot}.{adapter}", []).append((gates[name], importance))
    with torch.no_grad():
        for members in pooled.values():
            flat = torch.cat([importance.flatten() for _, importance in members])
            order = torch.empty(len(flat), dtype=torch.float64)
            order[flat.argsort(stable=True)] = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
            if len(flat) == 1:
                order.zero_()
            for (gate, _), part in zip(members, order.split([gate.units for gate, _ in members]), strict=True):
                offset = spread * gate.start.temperature * part.reshape(gate.theta.shape)
                gate.theta.copy_(gate.start.theta + offset)


def _places(quality: MaskedQuality, layers: int) -> dict[int, float]:
    """For the gates on whole blocks of the dropped layers, by their identity: below any importance, in that order."""
    order = quality.drop_order(layers)
    return {
        id(gate): float(place - len(order)) for place, layer in enumerate(order) for gate in quality.depth_gates(layer)
    }
