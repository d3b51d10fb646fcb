"""The gates of a family's positions, and a plan's masks on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ..errors import InvalidPlanError
from ..vanilla.family import FFN, HEADS, HIDDEN, Layout, find_module, hidden_home
from ..vanilla.modules import feature_dim, feature_sizes
from .adapter import BLOCK, HIDDEN_UNITS, LAYER, UNITS, GateAdapter
from .concrete import AttentionHeadAdapter, ChannelAdapter
from .hidden import HiddenAdapter, norm_sizes
from .kinds import BlockGate, ChannelGate, GateStart, HeadGate, HiddenGate, SigmoidGate
from .reading import hidden_gate
from .stream_basis import BasisGate

Masks = list[tuple[SigmoidGate, torch.Tensor | None]]

NO_BASIS = (
    "the plan keeps directions of a basis of the residual stream, and the adapter gates its channels: apply it to the "
    "adapter that it was made with (HawAdaConfig(rotate=True))"
)

NO_CHANNELS = (
    "the plan keeps channels of the residual stream, and the adapter gates directions of a basis: make one with "
    "`model.plan`"
)


class Kept(Protocol):
    """What masks need of a plan."""

    @property
    def hidden(self) -> tuple[int, ...] | None:
        """The kept channels of the residual stream; None if all are."""

    @property
    def rotated(self) -> bool:
        """Whether these are directions of a basis."""

    def kept(self, axis: str, layer: int) -> tuple[int, ...] | None:
        """The kept units of a layer on `"heads"` or `"ffn"`; None if the layer goes."""


def gates_at(
    layout: Layout | None,
    name: str,
    module: nn.Module,
    *,
    kinds: Collection[str],
    group_size: int,
    start: GateStart,
    centred: bool | None = None,
) -> tuple[type[GateAdapter], dict[str, SigmoidGate]]:
    """
    What a module is gated by.

    Args:
        layout: the model's row and sizes; None if modules were named instead: their input features are gated then.
        name: the module's dotted name.
        module: it, or the adapter that it is in.
        kinds, group_size, start: as in `family_gates`; `"hidden"` too.
        centred: as in `stream_gate`.

    Returns:
        The adapter's class, and slot to new gate.
    """
    position = None if layout is None else layout.position(name)
    if layout is None or position is None:
        inner = module.get_base_layer() if isinstance(module, GateAdapter) else module
        size, dim = feature_sizes(module)[0], feature_dim(inner)
        return ChannelAdapter, {UNITS: ChannelGate(size, group_size, dim=dim, start=start, relative=True)}
    if position[1] == HIDDEN:
        if name != hidden_home(layout):
            return HiddenAdapter, {}
        return HiddenAdapter, {HIDDEN_UNITS: stream_gate(layout, centred=centred, group_size=group_size, start=start)}
    features = feature_sizes(module)[0]
    gates = family_gates(layout, position[1], features, kinds=kinds, group_size=group_size, start=start)
    return AttentionHeadAdapter if position[1] == HEADS else ChannelAdapter, gates


def other_end(model: nn.Module, layout: Layout | None, name: str) -> GateAdapter | None:
    """The adapter at the other end of a module's layer, where the gate that both share may live; None without one."""
    position = None if layout is None else layout.position(name)
    if layout is None or position is None or position[1] == HIDDEN:
        return None
    layer, axis = position
    other = model.get_submodule(layout.ffn_out(layer) if axis == HEADS else layout.attention_out(layer))
    return other if isinstance(other, GateAdapter) else None


def share_hidden(model: nn.Module, layout: Layout) -> None:
    """Have all norms that read the residual stream use the gate in the first of them."""
    norms = [model.get_submodule(name) for name in layout.norms]
    wrapped = [norm for norm in norms if isinstance(norm, HiddenAdapter)]
    for adapter in wrapped[1:]:
        adapter.share_hidden_gate(wrapped[0])
    for site, norm in enumerate(norms):
        if isinstance(norm, HiddenAdapter):
            norm.site = site


def check_norms(model: nn.Module, layout: Layout) -> None:
    """
    Check that the family's row names norms of this model that can carry the gate on the residual stream.

    Raises:
        UnsupportedModelError: if not.
    """
    hidden_home(layout)
    for name in layout.norms:
        module = find_module(model, name, layout.model_type)
        if not isinstance(module, GateAdapter):
            norm_sizes(module)


def family_gates(
    layout: Layout, axis: str, features: int, *, kinds: Collection[str], group_size: int, start: GateStart
) -> dict[str, SigmoidGate]:
    """
    New gates for one end of a layer.

    Args:
        layout: the model's row and sizes.
        axis: `"heads"` at the attention's output projection, `"ffn"` at the FFN's.
        features: input features of the module there.
        kinds: what is gated: of `"heads"`, `"ffn"`, `"blocks"`, `"layers"`.
        group_size: channels per gate.
        start: how the gates start.

    Returns:
        Slot to gate.
    """
    gates: dict[str, SigmoidGate] = {}
    if axis in kinds and axis == HEADS:
        gates[UNITS] = HeadGate(features // layout.head_dim, layout.head_dim, start=start, relative=True)
    elif axis in kinds:
        gates[UNITS] = ChannelGate(features, group_size, start=start, relative=True)
    if "blocks" in kinds:
        gates[BLOCK] = BlockGate(start=start, relative=True)
    if "layers" in kinds:
        gates[LAYER] = BlockGate(start=start, relative=True)
    return gates


def stream_gate(layout: Layout, *, centred: bool | None, group_size: int, start: GateStart) -> HiddenGate:
    """
    A new gate on the residual stream.

    Args:
        layout: the model's row and sizes.
        centred: for one on directions of the stream, whether LayerNorms read it; None for one on its channels.
        group_size: neighbouring units per gate.
        start: how the gates start.
    """
    if centred is None:
        return HiddenGate(layout.hidden_size, group_size, start=start, relative=True)
    sites = len(layout.norms)
    return BasisGate(layout.hidden_size, group_size, sites=sites, centred=centred, start=start, relative=True)


def masks_of(gates: Mapping[str, SigmoidGate], kept: Sequence[int] | None, total: int, what: str) -> Masks:
    """
    What a plan makes of the gates at one end of a layer.

    Args:
        gates: slot to gate.
        kept: the units that stay; None if the whole layer goes.
        total: units at this end.
        what: the axis and layer, for messages.

    Returns:
        A mask for every gate; None leaves it open.

    Raises:
        InvalidPlanError: if there is no gate for what is to be closed, or one gate for units that stay and go.
    """
    whole = gates.get(LAYER, gates.get(BLOCK))
    if kept is None:
        if whole is None:
            raise InvalidPlanError(
                f"the plan drops the layer of {what}, which has no gates on `layers` or `blocks`; add 'layers' to the "
                "config's `gates`"
            )
        return [(gate, torch.zeros(1, dtype=torch.bool) if gate is whole else None) for gate in gates.values()]
    units = torch.zeros(total, dtype=torch.bool)
    units[list(kept)] = True
    masks: Masks = [(gate, None) for slot, gate in gates.items() if slot != UNITS]
    if UNITS not in gates:
        if not units.all():
            raise InvalidPlanError(
                f"the plan closes {what}, where there are no gates; add them to the config's `gates`"
            )
        return masks
    gate = gates[UNITS]
    grouped = units.reshape(gate.units, -1)
    if (grouped.any(1) != grouped.all(1)).any():
        raise InvalidPlanError(
            f"the plan splits groups of {total // gate.units} that share a gate in {what}; make it with `model.plan`, "
            "or use gates of group_size=1"
        )
    return [*masks, (gate, None if units.all() else grouped.all(1))]


def set_masks(
    model: nn.Module, layout: Layout, plan: Kept | None, adapter_name: str, *, in_training: bool = False
) -> None:
    """
    Close what a plan removes, whatever its legality.

    Args:
        model: the base model with adapters in it.
        layout: its family row and sizes.
        plan: what stays; None opens everything.
        adapter_name: whose gates.
        in_training: in training as well.

    Raises:
        InvalidPlanError: if it closes something without gates; no mask has been changed then.
    """
    sizes = layout.dense.sizes()
    masks: Masks = []
    for layer in range(sizes["num_hidden_layers"]):
        for axis, end, total in (
            (HEADS, layout.attention_out(layer), sizes["num_attention_heads"]),
            (FFN, layout.ffn_out(layer), sizes["intermediate_size"]),
        ):
            adapter = model.get_submodule(end)
            gates = adapter.gates(adapter_name) if isinstance(adapter, GateAdapter) else {}
            if plan is None:
                masks += [(gate, None) for gate in gates.values()]
            else:
                masks += masks_of(gates, plan.kept(axis, layer), total, f"{axis} in layer {layer}")
    stream = hidden_gate(model, layout, adapter_name)
    if stream is not None or (plan is not None and plan.hidden is not None):
        gates = {} if stream is None else {UNITS: stream}
        everything = tuple(range(layout.hidden_size))
        kept = everything if plan is None or plan.hidden is None else plan.hidden
        if plan is not None and plan.hidden is not None and stream is not None and plan.rotated != stream.in_basis:
            raise InvalidPlanError(NO_BASIS if plan.rotated else NO_CHANNELS)
        masks += masks_of(gates, kept, len(everything), "channels of the residual stream (gates on 'hidden')")
    for gate, mask in masks:
        gate.set_plan(mask, in_training=in_training and plan is not None)
