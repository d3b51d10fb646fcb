"""
The gates of a model, read: scores, expected sizes, the gate on the residual stream.

Long because each fold over the gates is named, and says what it counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import PeftModel
from torch import nn

from ..errors import BrokenGatesError
from ..vanilla.family import Layout
from ..vanilla.shape import BY_NAME, EXPERTS, FFN, HEADS, HIDDEN, LAYERS
from .adapter import BLOCK, EXPERT_UNITS, HIDDEN_UNITS, LAYER, UNITS, GateAdapter
from .attach import collect_gates
from .bases import HeadMap
from .kinds import BlockGate, ChannelGate, HeadGate, HiddenGate, SigmoidGate

SLOTS = {HIDDEN_UNITS: HIDDEN, BLOCK: LAYERS, LAYER: LAYERS, EXPERT_UNITS: EXPERTS}
"""The axis of what is gated in a slot of an adapter; `UNITS` are of the module that it wraps."""


@dataclass(frozen=True)
class LayerGates:
    """
    The gates of one layer, of one or several adapters, each once. Whatever is known of a layer by its gates is a fold
    over this.

    Args:
        heads: on its query heads.
        ffn: on its FFN channels.
        whole: those whose product says whether the layer stays: the one that all its blocks share, and those on each
            of them where all have one.
        experts: on its routed experts.
    """

    heads: tuple[SigmoidGate, ...]
    ffn: tuple[SigmoidGate, ...]
    whole: tuple[SigmoidGate, ...]
    experts: tuple[SigmoidGate, ...] = ()

    @property
    def by_axis(self) -> dict[str, tuple[SigmoidGate, ...]]:
        """The same by the names of axes."""
        return {HEADS: self.heads, FFN: self.ffn, LAYERS: self.whole, EXPERTS: self.experts}


def layers_of(model: nn.Module, layout: Layout, adapter_names: Sequence[str]) -> list[LayerGates]:
    """
    The gates of every layer of the dense model.

    Args:
        model: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_names: whose gates.
    """
    found = []
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        heads: list[SigmoidGate] = []
        ffn: list[SigmoidGate] = []
        whole: list[SigmoidGate] = []
        ends = adapter_at(model, layout.attention_out(layer)), adapter_at(model, layout.ffn_out(layer))
        experts: list[SigmoidGate] = []
        inside = adapters_in(model, layout, layer)
        for name in adapter_names:
            here, there = ({} if end is None else end.gates(name) for end in ends)
            heads += [here[UNITS]] if UNITS in here else []
            ffn += [there[UNITS]] if UNITS in there else []
            whole += [*whole_gates(inside, name, LAYER), *whole_gates(inside, name, BLOCK)]
            experts += [gates[EXPERT_UNITS] for each in inside if EXPERT_UNITS in (gates := each.gates(name))]
        found.append(LayerGates(tuple(heads), tuple(ffn), tuple(whole), tuple(experts)))
    return found


def further_gates(model: nn.Module, layout: Layout, adapter_names: Sequence[str]) -> dict[str, list[SigmoidGate]]:
    """The gates at the modules that hold units beside the ends of the layers (`Layout.further`), by their names."""
    found: dict[str, list[SigmoidGate]] = {}
    for name in (name for names in layout.further.values() for name in names):
        adapter = adapter_at(model, name)
        gates = [] if adapter is None else [adapter.gates(each).get(UNITS) for each in adapter_names]
        found[name] = [gate for gate in gates if gate is not None]
    return found


def adapter_at(model: nn.Module, name: str) -> GateAdapter | None:
    """The adapter of a name; None if it is empty, or another module's."""
    module = model.get_submodule(name) if name else None
    return module if isinstance(module, GateAdapter) else None


def adapters_in(model: nn.Module, layout: Layout, layer: int) -> list[GateAdapter]:
    """The adapters inside of a layer, in the order of its modules."""
    inside = model.get_submodule(f"{layout.stack}.{layer}")
    return [module for module in inside.modules() if isinstance(module, GateAdapter)]


def whole_gates(adapters: Sequence[GateAdapter], name: str, slot: str) -> list[BlockGate]:
    """
    The gates that close a whole layer.

    Args:
        adapters: those inside of the layer.
        name: whose gates.
        slot: `LAYER`: the one gate of the layer; `BLOCK`: those of its blocks, if each of them has one.
    """
    own = [modules[name] for adapter in adapters if name in (modules := getattr(adapter, slot, {}))]
    found = [gate for gate in own if isinstance(gate, BlockGate)]
    return found if slot == LAYER or (found and len(found) == found[0].parts) else []


@dataclass(frozen=True)
class ExpectedSizes:
    """
    The sizes that gates expect, per layer: sums of the probabilities that units stay. Differentiable.

    Args:
        heads, kv_groups, ffn: (layers,).
        layers: (layers,) the probability that each layer stays.
    """

    heads: torch.Tensor
    kv_groups: torch.Tensor
    ffn: torch.Tensor
    layers: torch.Tensor


def expected_sizes(model: nn.Module, layout: Layout, adapter_name: str) -> ExpectedSizes:
    """
    Read the expected sizes off a model's gates. What has no gates is dense. A KV group stays as likely as the
    likeliest of its heads, a layer as likely as the product of the gates on the whole of it.

    Args:
        model: the base model with adapters in it.
        layout: its family row and sizes.
        adapter_name: whose gates.
    """
    sizes = layout.dense.sizes()
    device = next(model.parameters()).device

    def stays(gates: Sequence[SigmoidGate], units: int = 1) -> torch.Tensor:
        product = torch.ones(units, device=device)
        for gate in gates:
            product = product * gate.open_probability().to(device)
        return product

    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for layer in layers_of(model, layout, [adapter_name]):
        heads = stays(layer.heads, sizes["num_attention_heads"])
        columns[0].append(heads.sum())
        columns[1].append(heads.reshape(-1, layout.dense.heads_per_group).amax(1).sum())
        columns[2].append(stays(layer.ffn).mean() * sizes["intermediate_size"])
        columns[3].append(stays(layer.whole).sum())
    return ExpectedSizes(*(torch.stack(column) for column in columns))


def open_probabilities(model: PeftModel, layout: Layout) -> dict[str, list[torch.Tensor]]:
    """
    How likely units stay, by the size that is a count of them: one tensor for each layer that has gates on it, and one
    for the residual stream. Of layers, whose gates are multiplied, one number each: (1,).

    Args:
        model: with one active adapter.
        layout: its family row and sizes.
    """
    (name,) = model.active_adapters
    base = model.get_base_model()
    found: dict[str, list[torch.Tensor]] = {}
    for layer in layers_of(base, layout, [name]):
        for axis, gates in layer.by_axis.items():
            if gates:
                values = [gate.open_probability() for gate in gates]
                found.setdefault(BY_NAME[axis].field, []).append(math.prod(values[1:], start=values[0]))
    for axis, names in layout.further.items():
        gated = further_gates(base, layout, [name])
        if beside := [gate.open_probability() for each in names for gate in gated[each]]:
            found.setdefault(BY_NAME[axis].field, []).extend(beside)
    if (stream := hidden_gate(base, layout, name)) is not None:
        found[BY_NAME[HIDDEN].field] = [stream.open_probability()]
    return found


def are_fresh(model: PeftModel) -> bool:
    """Whether every gate of the active adapters is at its start, so that the gates rank no unit before another."""
    gates = [gate for axis in axes_of(model).values() for gate in axis]
    return all(bool((gate.theta == gate.start.theta).all()) for gate in gates)


def axes_of(model: PeftModel) -> dict[str, list[SigmoidGate]]:
    """The active adapter's gates by the size that they gate."""
    axes: dict[str, list[SigmoidGate]] = {}
    for name, gate in collect_gates(model).items():
        slot, adapter = name.split(".")[-2:]
        if adapter in model.active_adapters:
            axis = (HEADS if isinstance(gate, HeadGate) else FFN) if slot == UNITS else SLOTS[slot]
            axes.setdefault(BY_NAME[axis].field, []).append(gate)
    return axes


Scores = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class UnitScores:
    """
    How much each unit counts: the product of its gates, in [0, 1], float64, on the CPU. `None` where nothing is gated.

    Args:
        heads: per layer (query heads,).
        channels: per layer (FFN channels,).
        layers: per layer ().
        group_size: neighbouring channels that stay or go together.
        hidden: (channels of the residual stream,).
        hidden_group: neighbouring ones of these that stay or go together.
        rotated: these are directions of a basis, not channels.
        in_heads: there are bases inside of heads, of which the first features may stay.
        experts: per layer (experts,); empty if no layer has gates on them.
        further: (units,) of each module that holds units beside the ends of the layers, by its full dotted name.
    """

    heads: Scores
    channels: Scores
    layers: Scores
    group_size: int = 1
    hidden: torch.Tensor | None = None
    hidden_group: int = 1
    rotated: bool = False
    in_heads: bool = False
    experts: Scores = ()
    further: Mapping[str, torch.Tensor | None] = field(default_factory=dict)


def gate_scores(model: nn.Module, layout: Layout, adapter_names: Sequence[str]) -> UnitScores:
    """
    Read the scores off the gates of a model.

    Raises:
        BrokenGatesError: if a gate is NaN.
    """
    layers = layers_of(model, layout, adapter_names)
    further = further_gates(model, layout, adapter_names)
    ffn = [gate for gates in (*(layer.ffn for layer in layers), *further.values()) for gate in gates]
    sizes = [gate.group_size for gate in ffn if isinstance(gate, ChannelGate) and not isinstance(gate, HeadGate)]
    stream = [gate for name in adapter_names if (gate := hidden_gate(model, layout, name)) is not None]
    hidden = _product(stream)
    return UnitScores(
        heads=tuple(_product(layer.heads) for layer in layers),
        channels=tuple(_product(layer.ffn) for layer in layers),
        layers=tuple(_product(layer.whole) for layer in layers),
        group_size=math.lcm(*sizes),
        hidden=None if hidden is None else stream[0].ranked(hidden),
        hidden_group=math.lcm(*(gate.group_size for gate in stream)),
        rotated=any(gate.in_basis for gate in stream),
        in_heads=all(head_maps(model, layout, name) for name in adapter_names),
        experts=tuple(_product(layer.experts) for layer in layers) if any(layer.experts for layer in layers) else (),
        further={name: _product(gates) for name, gates in further.items()},
    )


def _product(gates: Sequence[SigmoidGate]) -> torch.Tensor | None:
    product: torch.Tensor | None = None
    for gate in gates:
        value = torch.sigmoid(gate.theta.detach().double().cpu() / gate.start.temperature)
        if torch.isnan(value).any():
            raise BrokenGatesError(
                "the gates hold NaN: training diverged. Load an earlier checkpoint, or lower the learning rate."
            )
        if isinstance(gate, ChannelGate) and not isinstance(gate, HeadGate):
            value = value.repeat_interleave(gate.group_size)
        product = value if product is None else product * value
    return product


def head_maps(model: nn.Module, layout: Layout, adapter_name: str) -> list[tuple[HeadMap, HeadMap]]:
    """
    The bases inside of heads of an adapter, of each layer that has some those of queries and of what heads give; empty
    if there are none.
    """
    found: list[tuple[HeadMap, HeadMap]] = []
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        inside = adapters_in(model, layout, layer)
        maps = [cast(HeadMap, each.head_maps[adapter_name]) for each in inside if adapter_name in each.head_maps]
        found += [(maps[0], maps[-1])] if maps else []
    return found


def hidden_gate(model: nn.Module, layout: Layout, adapter_name: str) -> HiddenGate | None:
    """The gate on the residual stream; None if there is none, or not all norms that read the stream share it."""
    found: HiddenGate | None = None
    for name in layout.norms:
        parent, _, child = name.rpartition(".")
        adapter = model.get_submodule(parent)._modules.get(child)
        gate = adapter.gates(adapter_name).get(HIDDEN_UNITS) if isinstance(adapter, GateAdapter) else None
        if not isinstance(gate, HiddenGate) or gate is not (found or gate):
            return None
        found = gate
    return found
