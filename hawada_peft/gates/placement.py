"""
The gates of a family's positions, and a plan's masks on them.

Long because units, whole layers and the stream are placed and masked by the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ..errors import InvalidPlanError, UnsupportedModelError
from ..vanilla.family import Layout, find_module, hidden_home
from ..vanilla.legality import depth_of
from ..vanilla.modules import channels_dim, feature_dim, feature_sizes
from ..vanilla.shape import EXPERTS, FFN, HEADS, HIDDEN, KV_GROUPS
from .adapter import BLOCK, EXPERT_UNITS, HIDDEN_UNITS, LAYER, UNITS, GateAdapter
from .bases import BasisGate, HeadMap
from .branches import branches_at, branches_of
from .concrete import (
    AttentionHeadAdapter,
    BlockAdapter,
    ChannelAdapter,
    ExpertsAdapter,
    QueryAdapter,
    RouterAdapter,
)
from .hidden import HiddenAdapter, UnitNormAdapter, norm_sizes
from .kinds import BlendGate, BlockGate, ChannelGate, ExpertGate, GateStart, HeadGate, HiddenGate, SigmoidGate
from .reading import adapter_at, adapters_in, head_maps, hidden_gate, whole_gates

BLOCKS, LAYERS = "blocks", "layers"
"""Gates on what a block adds to the stream, and on a layer."""

Masks = list[tuple[SigmoidGate, torch.Tensor | None]]

NO_BASIS = (
    "the plan keeps directions of a basis of the residual stream, and the adapter has none: apply it to the adapter "
    "that it was made with (HawAdaConfig(rotate=True))"
)

NO_CHANNELS = (
    "the plan keeps channels of the residual stream, and the adapter gates directions of a basis: make one with "
    "`model.plan`"
)


NO_MAPS = (
    "the plan keeps features of a basis inside of each head, and the adapter has none: apply it to the adapter that "
    "it was made with (HawAdaConfig(narrow_heads=True))"
)


class Kept(Protocol):
    """What masks need of a plan."""

    @property
    def hidden(self) -> tuple[int, ...] | None:
        """The kept channels of the residual stream; None if all are."""

    @property
    def rotated(self) -> bool:
        """Whether these are directions of a basis."""

    @property
    def head_dim(self) -> int | None:
        """The kept features of every head; None if all are."""

    def at(self, axis: str, module: str) -> tuple[int, ...] | None:
        """The kept units on `"heads"` or `"ffn"` at a module beside the ends of the layers; None if all stay."""

    def kept(self, axis: str, layer: int) -> tuple[int, ...] | None:
        """The kept units of a layer on `"heads"`, `"ffn"` or `"experts"`; None if the layer goes, or all stay."""


def gates_at(
    layout: Layout | None,
    name: str,
    module: nn.Module,
    *,
    kinds: Collection[str],
    group_size: int,
    start: GateStart,
    centred: bool | None = None,
    norms: Collection[str] = (),
    queries: str = "",
) -> tuple[type[GateAdapter], dict[str, SigmoidGate]]:
    """
    What a module is gated by.

    Args:
        layout: the model's row and sizes; None if modules were named instead: their input features are gated then.
        name: the module's dotted name.
        module: it, or the adapter that it is in.
        kinds: what is gated: of `"heads"`, `"ffn"`, `"blocks"`, `"layers"`, `"hidden"`.
        group_size: channels per gate.
        start: how the gates start.
        centred: as in `stream_gate`.
        norms: the norms of a layer over units of it, relative to it.
        queries: what makes queries, relative to a layer, where heads are narrowed.

    Returns:
        The adapter's class, and slot to new gate.
    """
    position = None if layout is None else layout.position(name)
    inside = None if layout is None else layout.within(name)
    further = "" if layout is None else layout.further_axis(name)
    whole = {} if layout is None or inside is None else _whole(layout, *inside, kinds=kinds, start=start)
    if inside is not None and inside[1] in norms:
        return UnitNormAdapter, {}
    if inside is not None and queries and inside[1] == queries:
        return QueryAdapter, {}
    if layout is not None and further:
        position = (-1, further)
    if layout is not None and position is None:
        return BlockAdapter, whole  # none of a layer that must stay, where others have a gate at this name
    if layout is None or position is None:
        inner = module.get_base_layer() if isinstance(module, GateAdapter) else module
        size, dim = feature_sizes(module)[0], feature_dim(inner)
        return ChannelAdapter, {UNITS: ChannelGate(size, group_size, dim=dim, start=start, relative=True)}
    axis = position[1]
    if axis == EXPERTS:
        return RouterAdapter, {EXPERT_UNITS: ExpertGate(layout.num_experts or 1, start=start, relative=True)}
    if axis == HIDDEN and whole:  # a norm behind a block
        if HIDDEN in kinds:
            raise UnsupportedModelError(
                f"{name} of {layout.model_class.__name__} norms what a block adds to the stream, and can hold "
                "the gate of the layer or that of the stream: leave 'hidden', or 'blocks' and 'layers', out of `gates`"
            )
        return BlockAdapter, whole
    if axis == HIDDEN:
        if name != hidden_home(layout):
            return HiddenAdapter, {}
        return HiddenAdapter, {HIDDEN_UNITS: stream_gate(layout, centred=centred, group_size=group_size, start=start)}
    features, inner = feature_sizes(module)[0], module.get_base_layer() if isinstance(module, GateAdapter) else module
    on_channels = ChannelAdapter if channels_dim(inner) is None else ExpertsAdapter
    if axis not in kinds:
        return AttentionHeadAdapter if axis == HEADS else on_channels, whole
    if axis == HEADS:
        heads = HeadGate(features // layout.head_dim, layout.head_dim, start=start, relative=True)
        return AttentionHeadAdapter, {UNITS: heads, **whole}
    return on_channels, {UNITS: ChannelGate(features, group_size, start=start, relative=True), **whole}


def _whole(
    layout: Layout, layer: int, name: str, *, kinds: Collection[str], start: GateStart
) -> dict[str, SigmoidGate]:
    """New gates on the whole of a layer that one of its modules carries: slot to gate."""
    if not {BLOCKS, LAYERS} & {*kinds} or layer in depth_of(layout).pinned:
        return {}
    branches = branches_at(layout, layer)
    if not branches:
        return {LAYER: BlendGate(start=start, relative=True)} if name == _blending(layout) else {}
    if name not in branches:
        return {}
    slots = [slot for slot, kind in ((BLOCK, BLOCKS), (LAYER, LAYERS)) if kind in kinds]
    return {slot: BlockGate(start=start, relative=True, parts=len(branches)) for slot in slots}


def whole_ends(layout: Layout, kinds: Collection[str]) -> set[str]:
    """
    The modules of a layer that carry gates on the whole of it.

    Raises:
        UnsupportedModelError: if blocks are to be gated where a block alone adds nothing to the stream; as
            `branches_of`.
    """
    if not {BLOCKS, LAYERS} & {*kinds}:
        return set()
    branches = branches_of(layout)
    if not branches and BLOCKS in kinds:
        raise UnsupportedModelError(
            f"the layers of model_type={layout.model_type!r} norm the sum of their input and of what a block adds, so "
            "that no factor on a block alone makes it smaller or closes it: leave 'blocks' out of the config's `gates`"
        )
    if not branches and not _blending(layout):
        raise UnsupportedModelError(
            f"the layers of {layout.model_class.__name__} norm their sum, and no module of theirs is known that could "
            "hold the gate of a layer: leave 'layers' out of the config's `gates`"
        )
    every = layout.known is None or all(layout.known.branches)
    return {*branches} if branches and every else {*branches, _blending(layout)} - {""}


def _blending(layout: Layout) -> str:
    """The module of a layer that holds a gate which blends the layer."""
    return layout.family.blend_home or layout.family.attention_out or layout.family.ffn_out


def router_of(layout: Layout) -> str:
    """
    What chooses experts, relative to a layer.

    Raises:
        UnsupportedModelError: if the family's row names none.
    """
    if not layout.family.router:
        raise UnsupportedModelError(
            f"gates on 'experts' are not known for model_type={layout.model_type!r}: its family row names no "
            "`router`. Leave 'experts' out of the config's `gates`."
        )
    return layout.family.router


def connect(model: nn.Module, layout: Layout, name: str, adapter: GateAdapter) -> None:
    """Have an adapter and the others in its layer use each other's layer gates, or blend the layer by its own."""
    inside = layout.within(name)
    if inside is None or isinstance(adapter, HiddenAdapter):
        return
    if any(isinstance(gate, BlendGate) for gate in getattr(adapter, LAYER, {}).values()):
        adapter.blend(model.get_submodule(f"{layout.stack}.{inside[0]}"))
        return
    for other in siblings(model, layout, name):
        if other is not adapter:
            adapter.share(LAYER, other)
            other.share(LAYER, adapter)


def siblings(model: nn.Module, layout: Layout, name: str) -> list[GateAdapter]:
    """The adapters at the modules of the same layer that carry gates on the whole of it."""
    inside = layout.within(name)
    branches = branches_at(layout, inside[0]) if inside is not None else ()
    if inside is None or inside[1] not in branches:
        return []
    found = [model.get_submodule(f"{layout.stack}.{inside[0]}.{branch}") for branch in branches]
    return [module for module in found if isinstance(module, GateAdapter)]


def share_hidden(model: nn.Module, layout: Layout) -> None:
    """Have all norms that read the residual stream use the gate in the first of them."""
    norms = [model.get_submodule(name) for name in layout.norms]
    wrapped = [norm for norm in norms if isinstance(norm, HiddenAdapter)]
    for adapter in wrapped[1:]:
        adapter.share_hidden_gate(wrapped[0])
    for site, norm in enumerate(norms):
        if isinstance(norm, HiddenAdapter):
            norm.site = site


def share_units(model: nn.Module, layout: Layout, name: str) -> None:
    """Have an adapter use the gates on units of the first module that must keep the same ones."""
    group = layout.alike(name)
    home, adapter = adapter_at(model, next(iter(group), "")), adapter_at(model, name)
    if home is not None and adapter is not None and home is not adapter:
        adapter.share(UNITS, home)


def follow_units(model: nn.Module, layout: Layout, norms: Mapping[str, str]) -> None:
    """
    Have the norms over units of a layer know what a plan leaves of them.

    Args:
        model: the base model with adapters in it.
        layout: its family row and sizes.
        norms: their names relative to a layer, and the axes that their features belong to.
    """
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        for name, axis in norms.items():
            norm = model.get_submodule(f"{layout.stack}.{layer}.{name}")
            home = adapter_at(model, layout.ffn_out(layer) if axis == FFN else layout.attention_out(layer))
            if isinstance(norm, UnitNormAdapter) and home is not None:
                norm.follow(home, layout.dense.heads_per_group if axis == KV_GROUPS else 1)


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


def masks_of(gates: Mapping[str, SigmoidGate], kept: Sequence[int], total: int, what: str) -> Masks:
    """
    What a plan makes of the gates on units at one end of a layer that stays.

    Args:
        gates: slot to gate.
        kept: the units that stay.
        total: units at this end.
        what: the axis and layer, for messages.

    Returns:
        A mask for every gate; None leaves it open.

    Raises:
        InvalidPlanError: if there is no gate for what is to be closed, or one gate for units that stay and go.
    """
    units = torch.zeros(total, dtype=torch.bool)
    units[list(kept)] = True
    if UNITS not in gates:
        if not units.all():
            raise InvalidPlanError(
                f"the plan closes {what}, where there are no gates; add them to the config's `gates`"
            )
        return []
    gate = gates[UNITS]
    grouped = units.reshape(gate.units, -1)
    if (grouped.any(1) != grouped.all(1)).any():
        raise InvalidPlanError(
            f"the plan splits groups of {total // gate.units} that share a gate in {what}; make it with `model.plan`, "
            "or use gates of group_size=1"
        )
    return [(gate, None if units.all() else grouped.all(1))]


def _layer_masks(adapters: Sequence[GateAdapter], adapter_name: str, layer: int, *, stays: bool) -> Masks:
    """What a plan makes of the gates on a whole layer."""
    closing = whole_gates(adapters, adapter_name, LAYER) or whole_gates(adapters, adapter_name, BLOCK)
    if not stays and not closing:
        raise InvalidPlanError(
            f"the plan drops layer {layer}, which has no gates on `layers` or `blocks`; add 'layers' to the config's "
            "`gates`"
        )
    masks: Masks = []
    for adapter in adapters:
        for gate in adapter.gates(adapter_name).values():
            closed = not stays and any(gate is each for each in closing)
            opened = torch.full(gate.theta.shape, not closed) if closed or gate.binary else None
            masks.append((gate, opened))
    return masks


def set_masks(
    model: nn.Module,
    towers: Sequence[tuple[Layout, Kept | None]],
    adapter_name: str,
    *,
    in_training: bool = False,
) -> None:
    """
    Close what plans remove, whatever their legality.

    Args:
        model: the base model with adapters in it.
        towers: of each tower its family row and sizes, and what stays; None opens everything.
        adapter_name: whose gates.
        in_training: in training as well.

    Raises:
        InvalidPlanError: if one closes something without gates; no mask has been changed then.
    """
    masks = [(_masks(model, layout, plan, adapter_name), plan is not None) for layout, plan in towers]
    sizes = [(_maps_of(model, layout, plan, adapter_name), plan) for layout, plan in towers]
    for each, closed in masks:
        for gate, mask in each:
            gate.set_plan(mask, in_training=in_training and closed)
    for maps, plan in sizes:
        for head_map in maps:
            head_map.kept = None if plan is None else plan.head_dim


def place_head_maps(model: nn.Module, layout: Layout, queries: str, adapter_name: str) -> None:
    """
    Put bases inside of heads where an adapter has none, the standard ones: what the model computes stays.

    Args:
        model: the base model with adapters at what makes queries, and behind heads.
        layout: its family row and sizes.
        queries: what makes queries, relative to a layer.
        adapter_name: whose.
    """
    heads = layout.dense.sizes()["num_attention_heads"]
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        for name in (f"{layout.stack}.{layer}.{queries}", layout.attention_out(layer)):
            adapter = adapter_at(model, name)
            if adapter is not None and adapter_name not in adapter.head_maps:
                adapter.set_head_map(adapter_name, HeadMap(heads, layout.head_dim))


def _maps_of(model: nn.Module, layout: Layout, plan: Kept | None, adapter_name: str) -> list[HeadMap]:
    maps = [each for pair in head_maps(model, layout, adapter_name) for each in pair]
    if not maps and plan is not None and plan.head_dim is not None:
        raise InvalidPlanError(NO_MAPS)
    return maps


def _masks(model: nn.Module, layout: Layout, plan: Kept | None, adapter_name: str) -> Masks:
    sizes = layout.dense.sizes()
    masks: Masks = []
    layers = range(sizes["num_hidden_layers"])
    for layer in layers:  # before any units: layers that stay may share the gates on them with one that goes
        adapters = adapters_in(model, layout, layer)
        if plan is None:
            masks += [(gate, None) for adapter in adapters for gate in adapter.gates(adapter_name).values()]
        else:
            stays = plan.kept(HEADS, layer) is not None
            masks += _layer_masks(adapters, adapter_name, layer, stays=stays)
    for layer in layers:
        if plan is None:
            break
        stays = plan.kept(HEADS, layer) is not None
        for axis, end, total in (
            (HEADS, layout.attention_out(layer), sizes["num_attention_heads"]),
            (FFN, layout.ffn_out(layer), sizes["intermediate_size"]),
        ):
            adapter = adapter_at(model, end)
            gates = {} if adapter is None else adapter.gates(adapter_name)
            if not end:
                continue
            if (kept := plan.kept(axis, layer)) is not None:
                masks += masks_of(gates, kept, total, f"{axis} in layer {layer}")
        if stays and (chosen := plan.kept(EXPERTS, layer)) is not None:
            router = model.get_submodule(f"{layout.stack}.{layer}.{layout.family.router}")
            gate = router.gates(adapter_name).get(EXPERT_UNITS) if isinstance(router, GateAdapter) else None
            here = {} if gate is None else {UNITS: gate}
            masks += masks_of(here, chosen, layout.num_experts or 0, f"{EXPERTS} in layer {layer}")
    counts = {HEADS: sizes["num_attention_heads"], FFN: sizes["intermediate_size"]}
    for axis, names in layout.further.items():
        for name in names:
            adapter = adapter_at(model, name)
            gates = {} if adapter is None else adapter.gates(adapter_name)
            chosen = None if plan is None else plan.at(axis, name)
            if chosen is not None or (plan is None and UNITS in gates):
                everything = tuple(range(counts[axis]))
                masks += masks_of(gates, everything if chosen is None else chosen, counts[axis], f"{axis} at {name}")
    stream = hidden_gate(model, layout, adapter_name)
    if stream is not None or (plan is not None and plan.hidden is not None):
        gates = {} if stream is None else {UNITS: stream}
        everything = tuple(range(layout.hidden_size))
        kept = everything if plan is None or plan.hidden is None else plan.hidden
        if plan is not None and plan.rotated and stream is None:
            raise InvalidPlanError(NO_BASIS)
        if plan is not None and plan.hidden is not None and stream is not None and plan.rotated != stream.in_basis:
            raise InvalidPlanError(NO_BASIS if plan.rotated else NO_CHANNELS)
        masks += masks_of(gates, kept, len(everything), "channels of the residual stream (gates on 'hidden')")
    return masks
