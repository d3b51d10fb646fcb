"""From gates to a plan: which units stay at a given shape, and which shape the gates ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.base import BLOCK, LAYER, UNITS, GateAdapter
from ..adapters.gates import ChannelGate, HeadGate, SigmoidGate
from ..adapters.huggingface.family import FFN, HEADS, HIDDEN, Layout
from ..adapters.huggingface.placement import hidden_gate
from ..adapters.huggingface.shape import Shape
from ..errors import BrokenGatesError, InvalidPlanError
from .plan import Plan

LAYERS = "layers"
"""The axis of depth, beside those of width."""

PER_GROUP = "heads_per_group"
"""Query heads per KV group, beside the names of `Shape`."""

OPEN = 0.5
"""A unit whose gate is below this is one that the gates ask to close."""

ALIGNMENT = "keeps the dense size's alignment"
"""Why a size that is chosen for the user keeps a power of two."""

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
    """

    heads: Scores
    channels: Scores
    layers: Scores
    group_size: int = 1
    hidden: torch.Tensor | None = None
    hidden_group: int = 1


def gate_scores(model: nn.Module, layout: Layout, adapter_names: Sequence[str]) -> UnitScores:
    """
    Read the scores off the gates of a model.

    Raises:
        BrokenGatesError: if a gate is NaN.
    """
    heads, channels, layers, sizes = [], [], [], {1}
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        attention = _gates(model.get_submodule(layout.attention_out(layer)), adapter_names)
        ffn = _gates(model.get_submodule(layout.ffn_out(layer)), adapter_names)
        heads.append(_product(attention[UNITS]))
        channels.append(_product(ffn[UNITS]))
        sizes |= {gate.group_size for gate in ffn[UNITS] if isinstance(gate, ChannelGate)}
        whole = attention[LAYER] or ffn[LAYER]
        if not whole and attention[BLOCK] and ffn[BLOCK]:
            whole = attention[BLOCK] + ffn[BLOCK]
        layers.append(_product(whole))
    stream = [gate for name in adapter_names if (gate := hidden_gate(model, layout, name)) is not None]
    return UnitScores(
        heads=tuple(heads),
        channels=tuple(channels),
        layers=tuple(layers),
        group_size=math.lcm(*sizes),
        hidden=_product(stream),
        hidden_group=math.lcm(*(gate.group_size for gate in stream)),
    )


def _gates(module: nn.Module, adapter_names: Sequence[str]) -> dict[str, list[SigmoidGate]]:
    found: dict[str, list[SigmoidGate]] = {UNITS: [], BLOCK: [], LAYER: []}
    if isinstance(module, GateAdapter):
        for name in adapter_names:
            for slot, gate in module.gates(name).items():
                found[slot].append(gate)
    return found


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


def rank(layout: Layout, scores: UnitScores, shape: Shape) -> Plan:
    """
    The plan of a given shape that keeps what scores highest.

    Layers by their score; in each kept layer the KV groups by the sum of their heads' scores, then the best heads of
    each kept group, and the best channels; the best channels of the residual stream. Of equals the first stay.

    Args:
        layout: the dense model's row and sizes.
        scores: of its units.
        shape: the sizes wanted, complete and legal.

    Raises:
        InvalidPlanError: if something is to be cut that has no gates.
    """
    dense, wanted = layout.dense.sizes(), shape.sizes()
    per_group, keep_per_group = layout.dense.heads_per_group, shape.heads_per_group
    if wanted["intermediate_size"] % scores.group_size:
        raise InvalidPlanError(
            f"intermediate_size must be a multiple of the gates' group_size {scores.group_size}, got "
            f"{wanted['intermediate_size']}"
        )
    dense_shape, hidden = layout.dense, None
    if shape.hidden_size not in (None, layout.hidden_size):
        dense_shape, hidden = layout.full, _top_hidden(scores, shape.hidden_size or 0)
    layers = list(range(dense["num_hidden_layers"]))
    if len(layers) > wanted["num_hidden_layers"]:
        depth = torch.cat([_required(score, LAYERS, layer).reshape(1) for layer, score in enumerate(scores.layers)])
        layers = _top(depth, wanted["num_hidden_layers"])
    heads, channels = [], []
    for layer in layers:
        if wanted["num_attention_heads"] < dense["num_attention_heads"]:
            table = _required(scores.heads[layer], HEADS, layer).reshape(-1, per_group)
            groups = _top(table.sum(1), wanted["num_key_value_heads"])
            heads.append(tuple(g * per_group + h for g in groups for h in _top(table[g], keep_per_group)))
        else:
            heads.append(tuple(range(dense["num_attention_heads"])))
        if wanted["intermediate_size"] < dense["intermediate_size"]:
            values = _required(scores.channels[layer], FFN, layer)
            channels.append(tuple(_top(values, wanted["intermediate_size"])))
        else:
            channels.append(tuple(range(dense["intermediate_size"])))
    return Plan(dense=dense_shape, layers=tuple(layers), heads=tuple(heads), channels=tuple(channels), hidden=hidden)


def _top_hidden(scores: UnitScores, size: int) -> tuple[int, ...]:
    if scores.hidden is None:
        raise InvalidPlanError(
            "cannot choose what to cut: there are no gates on hidden, or not on every norm that reads the residual "
            "stream. Add 'hidden' to the config's `gates` (no `exclude_modules`)."
        )
    if size % scores.hidden_group:
        raise InvalidPlanError(
            f"hidden_size must be a multiple of the gates' group_size {scores.hidden_group}, got {size}"
        )
    return tuple(_top(scores.hidden, size))


def _required(score: torch.Tensor | None, axis: str, layer: int) -> torch.Tensor:
    if score is None:
        raise InvalidPlanError(
            f"cannot choose what to cut: layer {layer} has no gates on {axis}. Add {axis!r} to the config's `gates`, "
            "and gate every layer (no `layers_to_transform`, no `exclude_modules`)."
        )
    return score


def _top(values: torch.Tensor, count: int) -> list[int]:
    return sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist())


def ratio_shape(
    layout: Layout, keep_ratio: float | Mapping[str, float], legal_heads: Sequence[Shape], group_size: int
) -> Shape:
    """
    The legal shape nearest to a keep ratio; the hidden size is left to `legality.fit_hidden`.

    Heads: the nearest legal count; of equally near ones the larger, of equal counts that with more KV groups. FFN: the
    nearest multiple of `ffn_multiple`. Layers, hidden: the nearest count. At least one of each.

    Args:
        layout: the dense model's row and sizes.
        keep_ratio: kept over total, in (0, 1]: one number for heads and FFN, or one per axis (`"heads"`, `"ffn"`,
            `"layers"`, `"hidden"`).
        legal_heads: the (query heads, KV groups) to choose from.
        group_size: channels per gate.

    Raises:
        InvalidPlanError: on other axes or ratios.
    """
    asked, dense = ratio_sizes(layout, keep_ratio), layout.dense.sizes()
    target = asked.get("num_attention_heads", dense["num_attention_heads"])
    heads = min((shape.complete(layout.dense).sizes() for shape in legal_heads), key=lambda s: _distance(s, target))
    multiple = ffn_multiple(dense["intermediate_size"], layout, group_size)
    ffn = max(1, _round(asked.get("intermediate_size", dense["intermediate_size"]) / multiple)) * multiple
    hidden = asked.get("hidden_size", layout.hidden_size)
    return Shape(
        num_attention_heads=heads["num_attention_heads"],
        num_key_value_heads=heads["num_key_value_heads"],
        intermediate_size=min(ffn, dense["intermediate_size"]),
        num_hidden_layers=max(1, _round(asked.get("num_hidden_layers", dense["num_hidden_layers"]))),
        hidden_size=max(1, _round(hidden)) if hidden < layout.hidden_size else None,
    )


def ratio_sizes(layout: Layout, keep_ratio: float | Mapping[str, float]) -> dict[str, float]:
    """
    The sizes that a keep ratio asks for, not rounded, by the names of `Shape`; what it does not name is left out.

    Args, Raises: as in `ratio_shape`.
    """
    ratios = dict(keep_ratio) if isinstance(keep_ratio, Mapping) else {HEADS: keep_ratio, FFN: keep_ratio}
    allowed = (HEADS, FFN, LAYERS, HIDDEN)
    problems = [f"unknown axis {axis!r}; known are {list(allowed)}" for axis in ratios if axis not in allowed]
    problems += [
        f"keep_ratio of {axis} must be a number in (0, 1], got {ratio!r}"
        for axis, ratio in ratios.items()
        if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1
    ]
    if problems:
        raise InvalidPlanError("\n".join(problems))
    full = layout.full.to_dict()
    names = {
        HEADS: "num_attention_heads",
        FFN: "intermediate_size",
        LAYERS: "num_hidden_layers",
        HIDDEN: "hidden_size",
    }
    return {names[axis]: ratio * full[names[axis]] for axis, ratio in ratios.items()}


def open_shape(layout: Layout, scores: UnitScores, legal_heads: Sequence[Shape]) -> Shape:
    """
    The smallest legal shape with room for every unit whose score is at least `OPEN`, in every layer that stays; the
    hidden size is left to `legality.fit_hidden`.

    Args:
        layout: the dense model's row and sizes.
        scores: of its units; what is not gated counts as open.
        legal_heads: the (query heads, KV groups) to choose from.
    """
    dense, opened = layout.dense.sizes(), open_units(layout, scores)
    groups, per_kept = opened["num_key_value_heads"], opened[PER_GROUP]
    complete = [shape.complete(layout.dense) for shape in legal_heads]
    roomy = [
        s.sizes() for s in complete if s.heads_per_group >= per_kept and s.sizes()["num_key_value_heads"] >= groups
    ]
    heads = min(roomy, key=lambda s: s["num_attention_heads"])
    multiple = ffn_multiple(dense["intermediate_size"], layout, scores.group_size)
    hidden = opened["hidden_size"]
    return Shape(
        num_attention_heads=heads["num_attention_heads"],
        num_key_value_heads=heads["num_key_value_heads"],
        intermediate_size=min(-(-opened["intermediate_size"] // multiple) * multiple, dense["intermediate_size"]),
        num_hidden_layers=opened["num_hidden_layers"],
        hidden_size=hidden if hidden < layout.hidden_size else None,
    )


def open_units(layout: Layout, scores: UnitScores) -> dict[str, int]:
    """
    What the gates leave open, by the names of `Shape`, in that layer of those that stay where it is most; `PER_GROUP`
    is the most query heads in one KV group. At least 1 of each.
    """
    dense, per_group = layout.dense.sizes(), layout.dense.heads_per_group
    depth = [1.0 if score is None else float(score) for score in scores.layers]
    layers = [layer for layer, score in enumerate(depth) if score >= OPEN] or [depth.index(max(depth))]
    most = dict.fromkeys(("num_attention_heads", "num_key_value_heads", PER_GROUP, "intermediate_size"), 1)
    for layer in layers:
        opened = _opened(scores.heads[layer], dense["num_attention_heads"]).reshape(-1, per_group)
        here = {
            "num_attention_heads": opened.sum(),
            "num_key_value_heads": opened.any(1).sum(),
            PER_GROUP: opened.sum(1).max(),
            "intermediate_size": _opened(scores.channels[layer], dense["intermediate_size"]).sum(),
        }
        most = {name: max(most[name], int(count)) for name, count in here.items()}
    hidden = max(1, int(_opened(scores.hidden, layout.hidden_size).sum()))
    return most | {"num_hidden_layers": len(layers), "hidden_size": hidden}


def ffn_multiple(dense_size: int, layout: Layout, group_size: int) -> int:
    """
    The step of FFN sizes that are chosen for the user.

    Misaligned sizes run slower than larger aligned ones, so a size keeps the power of two that divides the dense one,
    up to 64 and up to 1/16 of it. Families that state the size as a multiple of another field step by that field.
    """
    return math.lcm(*ffn_steps(dense_size, layout, group_size).values())


def ffn_steps(dense_size: int, layout: Layout, group_size: int) -> dict[str, int]:
    """What `ffn_multiple` is made of, by the reason."""
    unit = layout.family.ffn_unit
    return {ALIGNMENT: _aligned(dense_size), **size_steps(group_size, unit, layout.hidden_size if unit else 1)}


def size_steps(group_size: int, unit: str | None, unit_size: int) -> dict[str, int]:
    """What every FFN size is a multiple of, by the reason: the channels per gate, and the family's unit."""
    return {"channels per gate": group_size} | (
        {f"the config states it in units of {unit}": unit_size} if unit else {}
    )


def hidden_multiple(layout: Layout, group_size: int) -> int:
    """The step of hidden sizes that are chosen for the user: aligned as FFN sizes are."""
    return math.lcm(*hidden_steps(layout, group_size).values())


def hidden_steps(layout: Layout, group_size: int) -> dict[str, int]:
    """What `hidden_multiple` is made of, by the reason."""
    return {ALIGNMENT: _aligned(layout.hidden_size), "channels per gate": group_size}


def _aligned(dense_size: int) -> int:
    aligned = math.gcd(dense_size, 64)
    while aligned > 1 and aligned * 16 > dense_size:
        aligned //= 2
    return aligned


def _distance(sizes: Mapping[str, int], target: float) -> tuple[float, int, int]:
    heads = sizes["num_attention_heads"]
    return abs(heads - target), -heads, -sizes["num_key_value_heads"]


def _opened(score: torch.Tensor | None, units: int) -> torch.Tensor:
    return torch.ones(units, dtype=torch.bool) if score is None else score >= OPEN


def _round(value: float) -> int:
    return math.floor(value + 0.5)
