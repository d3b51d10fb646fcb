"""
From what was found of a class to rows: the parts of a model that can be slimmed, each with its family.

Long because each kind of axis is looked for, and said, in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..vanilla import shape as sizes
from ..vanilla.family import FINDERS, Family, Known, Part
from ..vanilla.modules import gateable, norm_offset
from ..vanilla.shape import SliceRule
from .anatomy import FFN, HEADS, HIDDEN, INPUT, NORM, Anatomy, Axis, Place, Rows, Stack
from .inspected import inspect

Rules = dict[str, tuple[SliceRule, ...]]


def find_parts(model: PreTrainedModel) -> list[Part]:
    """
    The parts of a model that can be slimmed, with the rows that were found for them.

    Raises:
        UnsupportedModelError: as `inspect`.
    """
    return [_gated(model, part) for part in parts_of(inspect(model))]


def _gated(model: PreTrainedModel, part: Part) -> Part:
    """A part whose layers blend where a branch ends in a module that no gate can sit on, as stacked experts."""

    def carries(layer: int, name: str) -> bool:
        module = model.get_submodule(f"{part.stack}.{layer}.{name}")
        return gateable(module) or norm_offset(module) is not None

    family, known = part.family, part.known
    if known is None:
        return part
    if not (family.attention_out or family.ffn_out):
        family = replace(family, blend_home=_home(model, part))
    every = enumerate(known.branches)
    branches = tuple(names if all(carries(layer, name) for name in names) else () for layer, names in every)
    return replace(part, family=family, known=replace(known, branches=branches))


def _home(model: PreTrainedModel, part: Part) -> str:
    """The last module that every layer has, and that a gate can be put on; empty if there is none."""
    layers = cast(Iterable[nn.Module], model.get_submodule(part.stack))
    names = [[name for name, module in layer.named_modules() if name and gateable(module)] for layer in layers]
    return next((name for name in reversed(names[0]) if all(name in each for each in names)), "")


def parts_of(anatomy: Anatomy) -> list[Part]:
    """
    The lists of layers of a model, each with a row that says where its heads, FFN channels and layers are gated.

    What no row can say is left out: units that are closed at several places of a layer, outside of the layers, on
    parameters instead of inputs, or that must be the same everywhere.

    Args:
        anatomy: what was found of the model's class and config.
    """
    names = _names([stack.path for stack in anatomy.stacks])
    scopes = [_scope(stack.field) for stack in anatomy.stacks]
    parts = []
    for stack, name, scope in zip(anatomy.stacks, names, scopes, strict=True):
        own = [axis for axis in anatomy.axes if _inside(axis, stack)]
        alone = scope and scopes.count(scope) == 1
        family, known = _row(stack, own, scope, anatomy)
        parts.append(Part(scope if alone else name, scope, stack.path, family, known))
    return parts


def _scope(field: str) -> str:
    """The config that a field is in; it may be an entry of a list there."""
    before, _, last = field.rpartition(".")
    return _scope(before) if last.isdigit() else before


def _names(paths: Sequence[str]) -> list[str]:
    """What tells lists of layers apart: their names without what all have in common; empty where there is one."""
    if len(paths) < 2:
        return [""] * len(paths)
    split = [path.split(".") for path in paths]
    start, end = _common(split), _common([parts[::-1] for parts in split])
    return [".".join(parts[start : max(start + 1, len(parts) - end)]) for parts in split]


def _common(names: Sequence[Sequence[str]]) -> int:
    """How many first parts are the same in all."""
    return next((i for i, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1), min(map(len, names)))


def _inside(axis: Axis, stack: Stack) -> bool:
    """Whether an axis has sizes of its own, and a row can say where its units are closed."""
    if axis.follows or not axis.numbers:
        return False
    return axis.kind == HIDDEN or (not axis.tied and _placed(axis, stack))


def _placed(axis: Axis, stack: Stack) -> bool:
    """Whether units are closed at one input in each of some layers of a stack, each with its own, and nowhere else."""
    before = f"{stack.path}.*."
    layers = [layer for place in axis.places for layer in place.layers]
    return (
        all(place.how == INPUT and place.parameter.startswith(before) for place in axis.places)
        and len({place.module for place in axis.places}) == 1
        and len(set(layers)) == len(layers)
        and all(rows.parameter.startswith(before) for rows in axis.rows)
    )


def _row(stack: Stack, axes: Sequence[Axis], scope: str, anatomy: Anatomy) -> tuple[Family, Known]:
    def field(path: str) -> str:
        return path.removeprefix(f"{scope}.") if scope else path

    def end(place: Place) -> str:
        return place.module.removeprefix(f"{stack.path}.*.")

    ffn = _largest([axis for axis in axes if axis.kind == FFN and len(axis.numbers) == 1])
    stream, follower = _stream(stack, axes, anatomy)
    heads, groups = _heads(axes) if follower is None else (follower, None)
    rules: Rules = {}
    legal: dict[str, range | tuple[int, ...]] = {}
    family = Family(
        layers=stack.path,
        attention_out="",
        ffn_out="",
        heads_field="",
        head_dim_field="",
        ffn_field="",
        hidden_field="",
        layers_field=field(stack.field),
        layer_lists=tuple(map(field, stack.lists)),
        layer_counts=tuple(map(field, stack.also)),
        layer_indices=tuple(map(field, stack.indices)),
        layer_stages=tuple(map(field, stack.stages)),
        leading=tuple(map(field, stack.leading)),
        removed=tuple(map(field, stack.removed)),
    )
    if ffn is not None:
        number = ffn.numbers[0]
        whole = number.value == ffn.units
        family = replace(
            family,
            ffn_out=end(ffn.places[0]),
            ffn_field=field(number.field),
            ffn_channels=0 if whole else ffn.units / number.value,
        )
        legal[sizes.FFN] = ffn.sizes
        _add(rules, stack, {sizes.FFN: ffn.rows})
    if heads is not None:
        query, kv = (heads.name, "") if heads is follower else _counted(heads, groups)
        written = dict(heads.written)
        family = replace(
            family,
            attention_out=end(heads.places[0]),
            heads_field=field(query),
            kv_heads_field=field(kv) if kv else "",
            head_dim_field=field(next(iter(written), "")),
        )
        both = {sizes.HEADS: heads.rows} | ({sizes.KV_GROUPS: groups.rows} if groups is not None else {})
        legal |= {sizes.HEADS: heads.sizes, sizes.KV_GROUPS: (groups or heads).sizes}
        _add(rules, stack, both)
    if stream is not None:
        inner, outer = _norms(stream, stack)
        alone = follower is None
        family = replace(
            family,
            hidden_field=field(stream.numbers[0].field),
            hidden_norms=tuple(map(end, inner)),
            final_norm=outer[0].module if alone else "",
            outer_norms=() if alone else tuple(place.module for place in outer),
            stream_readers=tuple(place.module for place in _readers(stream, stack)),
            heads_follow=not alone,
        )
        legal[sizes.HIDDEN] = stream.sizes
        _add(rules, stack, {sizes.HIDDEN: stream.rows})
    for each in stack.per_layer:
        rule = SliceRule(each.dim, (sizes.LAYERS,), each.width)
        rules[f".{each.parameter}"] = (*rules.get(f".{each.parameter}", ()), rule)
    cut = {sizes.FFN: ffn, sizes.HEADS: heads}
    return family, Known(
        rules,
        legal,
        {axis: frozenset(_layers(each)) for axis, each in cut.items() if each is not None},
        # Discovery names them from the last to the first.
        tuple(names[::-1] for names in stack.branches),
        {each.layer: each.reason for each in stack.pinned},
        {each.parameter: (each.dim, each.width) for each in stack.per_layer},
    )


def _largest(axes: Sequence[Axis]) -> Axis | None:
    """The one that most layers have, of these the widest."""
    return max(axes, key=lambda axis: (len(_layers(axis)), axis.units), default=None)


def _layers(axis: Axis) -> set[int]:
    return {layer for place in axis.places for layer in place.layers}


def _heads(axes: Sequence[Axis]) -> tuple[Axis | None, Axis | None]:
    """The axis of query heads, and that of KV groups where they are two."""
    found = [axis for axis in axes if axis.kind == HEADS]
    grouped = [axis for axis in found if axis.groups]
    query = _largest(grouped)
    if query is None:
        return _largest([axis for axis in found if len(axis.numbers) <= 2]), None
    place = query.places[0].module
    whole = [
        axis for axis in found if axis is not query and axis.units == query.groups and axis.places[0].module == place
    ]
    return (query, whole[0]) if whole else (None, None)


def _counted(heads: Axis, groups: Axis | None) -> tuple[str, str]:
    """The config fields with the numbers of query heads and of KV groups; the second is empty if there is none."""
    if groups is not None:
        query = heads.numbers[0].field
        others = [number.field for number in groups.numbers if number.field != query]
        return query, next(iter(others), "")
    fields = [number.field for number in heads.numbers]
    plain = [field for field in fields if "key_value" not in field and "kv" not in field] or fields
    return plain[0], next((field for field in fields if field != plain[0]), "")


def _stream(stack: Stack, axes: Sequence[Axis], anatomy: Anatomy) -> tuple[Axis | None, Axis | None]:
    """
    The residual stream, where what reads it in the layers of the one stack does so through norms, and nothing reads it
    by raw weights; and the heads that follow it, if any do.
    """
    found = [axis for axis in axes if axis.kind == HIDDEN]
    if len(anatomy.stacks) != 1 or len(found) != 1:
        return None, None
    stream = found[0]
    followers = [each for each in anatomy.axes if each.follows == stream.name]
    every = tuple(range(stack.count))
    inner, outer = _norms(stream, stack)
    if not outer or not inner or any(place.layers != every for place in inner):
        return None, None
    if not followers:
        return (stream, None) if len(outer) == 1 and len(stream.numbers) == 1 else (None, None)
    heads = followers[0]
    bound = len(followers) == 1 and len(stream.numbers) == 2 and heads.kind == HEADS and _placed(heads, stack)
    plain = all(place.how in (INPUT, NORM) and place.units == stream.units for place in stream.places)
    return (stream, heads) if bound and plain else (None, None)


def _readers(stream: Axis, stack: Stack) -> list[Place]:
    """The modules outside of the layers whose inputs are the channels of the stream."""
    inputs = [place for place in stream.places if place.how == INPUT and place.units == stream.units]
    return [place for place in inputs if not place.parameter.startswith(f"{stack.path}.*.") and not place.layers]


def _norms(stream: Axis, stack: Stack) -> tuple[list[Place], list[Place]]:
    """The norms that read the stream in the layers, and those outside of them."""
    norms = [place for place in stream.places if place.how == NORM]
    inner = [place for place in norms if place.parameter.startswith(f"{stack.path}.*.")]
    return inner, [place for place in norms if place not in inner]


def _add(rules: Rules, stack: Stack, rows: Mapping[str, Sequence[Rows]]) -> None:
    """Add how parameters are made of the units of axes that share some of them."""
    before = f"{stack.path}.*."
    found: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    for axis, each in rows.items():
        for row in each:
            inside = row.parameter.startswith(before)
            short = row.parameter.removeprefix(before) if inside else f".{row.parameter}"
            found.setdefault((short, row.dim), {})[axis] = tuple(row.units())
    for (name, dim), units in found.items():
        rules[name] = (*rules.get(name, ()), SliceRule(dim, tuple(units), 0, tuple(units.values())))


FINDERS.append(find_parts)
