"""From gates to a plan: which units stay at a given shape, and which shape the gates ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import InvalidPlanError
from ..gates.reading import UnitScores
from ..vanilla.family import Layout
from ..vanilla.legality import depth_of
from ..vanilla.shape import EXPERTS, FFN, HEADS, LAYERS, Shape
from .further import SIZES as FURTHER
from .further import Further
from .plan import Plan


def rank(layout: Layout, scores: UnitScores, shape: Shape) -> Plan:
    """
    The plan of a given shape that keeps what scores highest.

    Layers by their score; in each kept layer the KV groups by the sum of their heads' scores, then the best heads of
    each kept group, and the best channels, and so at each module beside the ends of the layers; the best channels of
    the residual stream. What must be the same in several layers goes by the sum of its scores. Of equals the first
    stay.

    Args:
        layout: the dense model's row and sizes.
        scores: of its units.
        shape: the sizes wanted, complete and legal.

    Raises:
        InvalidPlanError: if something is to be cut that has no gates.
    """
    scores = _pooled(layout, scores)
    dense, wanted = layout.dense.sizes(), shape.sizes()
    per_group, keep_per_group = layout.dense.heads_per_group, shape.heads_per_group
    if wanted["intermediate_size"] % scores.group_size:
        raise InvalidPlanError(
            f"intermediate_size must be a multiple of the gates' group_size {scores.group_size}, got "
            f"{wanted['intermediate_size']}"
        )
    dense_shape, hidden = layout.dense, None
    if shape.hidden_size not in (None, layout.hidden_size):
        dense_shape = replace(dense_shape, hidden_size=layout.hidden_size)
        hidden = _top_hidden(scores, shape.hidden_size or 0)
    features = None if shape.head_dim == layout.head_dim else shape.head_dim
    if features is not None:
        if not scores.in_heads:
            raise InvalidPlanError(
                "cannot choose what to cut inside of heads: the adapter has no bases in them. Make it with "
                "HawAdaConfig(narrow_heads=True), or let `find_plan` choose the size"
            )
        dense_shape = replace(dense_shape, head_dim=layout.head_dim)
    layers = list(range(dense["num_hidden_layers"]))
    if len(layers) > wanted["num_hidden_layers"]:
        pinned = depth_of(layout).pinned
        stays = torch.full((1,), torch.inf, dtype=torch.float64)
        depth = [
            stays if layer in pinned else _required(score, LAYERS, layer).reshape(1)
            for layer, score in enumerate(scores.layers)
        ]
        layers = _top_layers(torch.cat(depth), wanted["num_hidden_layers"], layout.stages, sorted(pinned))
    heads, channels = [], []
    experts = None
    if shape.num_experts not in (None, layout.num_experts):
        dense_shape = replace(dense_shape, num_experts=layout.num_experts)
        gated = scores.experts or (None,) * dense["num_hidden_layers"]
        wishes = [_required(gated[layer], EXPERTS, layer) for layer in layers]
        experts = tuple(tuple(_top(wish, shape.num_experts or 0)) for wish in wishes)

    def best_heads(values: torch.Tensor) -> tuple[int, ...]:
        table = values.reshape(-1, per_group)
        groups = _top(table.sum(1), wanted["num_key_value_heads"])
        return tuple(g * per_group + h for g in groups for h in _top(table[g], keep_per_group))

    for layer in layers:
        # A layer of another kind has none of these units, and says the first ones.
        if layout.attention_out(layer) and wanted["num_attention_heads"] < dense["num_attention_heads"]:
            heads.append(best_heads(_required(scores.heads[layer], HEADS, layer)))
        else:
            first = range(wanted["num_key_value_heads"])
            heads.append(tuple(g * per_group + h for g in first for h in range(keep_per_group)))
        if layout.ffn_out(layer) and wanted["intermediate_size"] < dense["intermediate_size"]:
            values = _required(scores.channels[layer], FFN, layer)
            channels.append(tuple(_top(values, wanted["intermediate_size"])))
        else:
            channels.append(tuple(range(wanted["intermediate_size"])))
    further = []
    for axis, names in layout.further.items():
        for name in names if wanted[FURTHER[axis]] < dense[FURTHER[axis]] else ():
            inside = layout.within(name)
            if inside is None or inside[0] in layers:
                values = _required(scores.further.get(name), axis, name)
                kept = best_heads(values) if axis == HEADS else tuple(_top(values, wanted["intermediate_size"]))
                further.append(Further(axis, name, kept))
    return Plan(
        dense=dense_shape,
        layers=tuple(layers),
        heads=tuple(heads),
        channels=tuple(channels),
        hidden=hidden,
        experts=experts,
        further=tuple(further),
        rotated=scores.rotated and hidden is not None,
        head_dim=features,
        tower=layout.tower,
    )


def _pooled(layout: Layout, scores: UnitScores) -> UnitScores:
    """The scores with their sum at all modules that must keep the same units."""
    by_layer = {HEADS: list(scores.heads), FFN: list(scores.channels)}
    further = dict(scores.further)
    for axis, groups in ({} if layout.facts is None else layout.facts.alike).items():
        for group in groups:
            places = [(name, layout.position(name)) for name in group]
            values = [further.get(name) if at is None else by_layer[axis][at[0]] for name, at in places]
            known = [value for value in values if value is not None]
            total = torch.stack(known).sum(0) if known else None
            for name, at in places:
                if at is None:
                    further[name] = total
                else:
                    by_layer[axis][at[0]] = total
    return replace(scores, heads=tuple(by_layer[HEADS]), channels=tuple(by_layer[FFN]), further=further)


def _top_layers(
    depth: torch.Tensor, count: int, stages: Sequence[tuple[int, int]], pinned: Sequence[int]
) -> list[int]:
    """The best layers; those that must stay, of a backbone the best one before each stage, then the best others."""
    needed = sorted({*pinned, *(start + _top(depth[start:end], 1)[0] for start, end in stages)})
    others = depth.clone()
    others[needed] = -torch.inf
    return sorted([*needed, *_top(others, count - len(needed))])


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


def _required(score: torch.Tensor | None, axis: str, where: int | str) -> torch.Tensor:
    if score is None:
        where = f"layer {where}" if isinstance(where, int) else where
        raise InvalidPlanError(
            f"cannot choose what to cut: {where} has no gates on {axis}. Add {axis!r} to the config's `gates`, "
            "and gate every layer (no `layers_to_transform`, no `exclude_modules`)."
        )
    return score


def _top(values: torch.Tensor, count: int) -> list[int]:
    return sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist())
