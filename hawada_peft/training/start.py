"""How much the loss depends on each gate, and gates that start from it.

References:
    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), equation 8, for squared gradients of
    gates at 1; Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (2022), for the empirical Fisher
    of masks of heads and FFN channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from peft import PeftModel
from torch import nn

from ..errors import HawAdaError
from ..gates.adapter import UNITS
from ..gates.attach import collect_gates
from ..gates.kinds import SigmoidGate
from ..gates.stream_basis import BasisGate
from ..planning.importance import gate_importance
from ..search.masked import MaskedQuality
from ..vanilla.outputs import Batch
from ..vanilla.shape import Shape

SPREAD = 0.5
"""Half the range over which a start by importance spreads theta / T around the common start."""


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
        stream = gates[name]
        if isinstance(stream, BasisGate):  # the basis says in which order
            importance = stream.ranked(importance, trained=False)
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
