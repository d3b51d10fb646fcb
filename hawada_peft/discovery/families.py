"""
From what was found of a class to rows: the parts of a model that can be slimmed, each with its family.

Long because each kind of axis is looked for, and said, in its own way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ..vanilla import shape as sizes
from ..vanilla.family import FINDERS, Family, Known, Part
from ..vanilla.modules import gateable, norm_offset
from ..vanilla.shape import SliceRule
from .anatomy import (
    EXPERTS,
    FFN,
    HEADS,
    HIDDEN,
    INPUT,
    NORM,
    OTHER,
    PARAMETER,
    Anatomy,
    Axis,
    Place,
    Rows,
    Stack,
    expand,
)
from .inspected import inspect

USUAL = "num_attention_heads"
"""What transformers calls the number of heads."""

EXPERTS_ALONE = "gates on experts are placed by written rows alone, and there is none for this model type"
OTHER_KIND = "there are no gates on widths of this kind"
NOT_BY_NORMS = "gates on it sit on norms, and not everything reads it through norms of the layers of one stack"
NO_LAYERS = "there are no layers that hold its units"
WHOLE_GROUPS = "heads that share keys and values go all at once, and there are gates on single heads only"
ONE_OF_SEVERAL = "{} are gated, and a plan has one such size"

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
    ends = {sizes.HEADS: family.attention_out, sizes.FFN: family.ffn_out}
    for axis, end in ends.items():
        names = [f"{part.stack}.{layer}.{end}" for layer in known.layers.get(axis, ())]
        if not all(gateable(model.get_submodule(name)) for name in (*names, *known.further.get(axis, ()))):
            ends[axis] = ""  # weights that are stacked in another way
    family = replace(family, attention_out=ends[sizes.HEADS], ffn_out=ends[sizes.FFN])
    count = len(known.branches)
    if not any(end and len(known.layers[axis]) == count for axis, end in ends.items()):
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

    Left out is what no gate of a row can close; `reach` says what that is.

    Args:
        anatomy: what was found of the model's class and config.
    """
    names = _names([stack.path for stack in anatomy.stacks])
    scopes = [_scope(stack.field) for stack in anatomy.stacks]
    parts = []
    left: dict[str, list[str]] = {}
    for axis, why in ungated(anatomy).items():
        left.setdefault(anatomy.axis(axis).kind, []).append(f"{axis}: {why}")
    for stack, name, scope in zip(anatomy.stacks, names, scopes, strict=True):
        alone = scope and scopes.count(scope) == 1
        family, known = _row(stack, _choose(stack, anatomy), scope)
        known = replace(known, ungated={kind: "; ".join(each) for kind, each in left.items()})
        parts.append(Part(scope if alone else name, scope, stack.path, family, known))
    return parts


def ungated(anatomy: Anatomy) -> dict[str, str]:
    """
    The widths that are proved, and that `get_peft_model` puts no gates on where no row is written, with the reasons.

    Args:
        anatomy: what was found of the model's class and config.
    """
    chosen = [_choose(stack, anatomy) for stack in anatomy.stacks]
    seen = [seen for each in chosen for seen in (each.ffn, each.heads, each.groups)]
    names = [each.axis.name for each in seen if each is not None]
    gated = dict.fromkeys(names + [each.stream.name for each in chosen if each.stream is not None])
    found: dict[str, str] = {}
    for axis in anatomy.axes:
        if axis.name in gated or axis.follows:
            continue
        views = [reach(axis, stack) for stack in anatomy.stacks]
        near = [each for each in views if isinstance(each, Seen)]
        why = [each for each in views if isinstance(each, str)]
        taken = [each for each in gated if anatomy.axis(each).kind == axis.kind]
        found[axis.name] = (
            EXPERTS_ALONE
            if axis.kind == EXPERTS
            else OTHER_KIND
            if axis.kind == OTHER
            else NOT_BY_NORMS
            if axis.kind == HIDDEN
            else WHOLE_GROUPS
            if axis.kind == HEADS and _in_groups(axis) and not taken
            else ONE_OF_SEVERAL.format(" and ".join(taken))
            if near
            else why[0]
            if why
            else NO_LAYERS
        )
    return found


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


@dataclass(frozen=True)
class Seen:
    """
    An axis as seen from a list of layers: closed at one module of each, and at further ones, each with its own units.

    Args:
        axis: of heads or FFN channels.
        home: what the module in the layers is called, with the list's name and `*`.
    """

    axis: Axis
    home: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The config's numbers that set it."""
        return tuple(number.field for number in self.axis.numbers)

    @property
    def layers(self) -> set[int]:
        """The layers that have it."""
        return {layer for place in self.axis.places if place.module == self.home for layer in place.layers}

    @property
    def further(self) -> tuple[str, ...]:
        """The other modules, in full."""
        places = [place for place in self.axis.places if place.module != self.home]
        return tuple(dict.fromkeys(module for place in places for module in _modules(place)))

    @property
    def alike(self) -> tuple[tuple[str, ...], ...]:
        """Modules at which the same units must stay."""
        return tuple(tuple(_modules(place)) for place in self.axis.places) if self.axis.alike else ()


def reach(axis: Axis, stack: Stack) -> Seen | str:
    """
    An axis as seen from a list of layers; instead, why no row of that list can gate it.

    Args:
        axis: of heads, FFN channels or others.
        stack: the list.
    """
    before = f"{stack.path}.*."
    inside = [place for place in axis.places if place.parameter.startswith(before)]
    if not inside:
        return f"nothing in {stack.path} reads it"
    if any(place.module == f"{stack.path}.*" for place in inside):
        return f"a layer of {stack.path} is one module, and not a list of those that could hold gates"
    if axis.tied:
        return "the same units would have to stay at every place"
    if strange := [place.parameter for place in axis.places if not _gated_at(place)]:
        return f"there are no gates for units that are closed at {strange[0]}"
    if narrow := [place for place in axis.places if place.units != axis.units]:
        return (
            f"its number sets widths of several sizes, {narrow[0].units} at {narrow[0].module} of at most {axis.units}"
        )
    modules = dict.fromkeys(place.module for place in inside)
    seen = max((Seen(axis, module) for module in modules), key=lambda each: len(each.layers))
    fields = [field.removeprefix(f"{_scope(stack.field)}.") for field in Seen(axis, "").fields]
    if any("." in field and not field.rpartition(".")[2].isdigit() for field in fields):
        return f"its number is in another config than those of {stack.path}"
    if spread := [rows.parameter for rows in axis.rows if not _whose(axis, rows)]:
        return f"{spread[0]} holds units of several layers"
    return seen


def _gated_at(place: Place) -> bool:
    """Whether an adapter can close units there: at inputs, and in the last weights of stacked experts."""
    return place.how == INPUT or (place.how == PARAMETER and place.parameter.endswith(".down_proj"))


def _modules(place: Place) -> Iterator[str]:
    return expand(place.module, place.layers)


def _whose(axis: Axis, rows: Rows) -> dict[str, str]:
    """For each parameter the module whose units it holds, by their full names; empty if these are several."""
    place = axis.places[rows.place]
    if not rows.layers and len(place.layers) > 1 and not axis.alike:
        return {}
    layers = [layer if layer in place.layers else next(iter(place.layers), 0) for layer in rows.layers or (0,)]
    return {name: place.module.replace("*", str(layer), 1) for name, layer in zip(rows.names(), layers, strict=True)}


def _row(stack: Stack, chosen: Chosen, scope: str) -> tuple[Family, Known]:
    def field(path: str) -> str:
        return path.removeprefix(f"{scope}.") if scope else path

    def end(module: str) -> str:
        return module.removeprefix(f"{stack.path}.*.")

    ffn, heads, groups = chosen.ffn, chosen.heads, chosen.groups
    stream, follower = chosen.stream, chosen.follower
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
        number = ffn.axis.numbers[0]
        whole = number.value == ffn.axis.units
        family = replace(
            family,
            ffn_out=end(ffn.home),
            ffn_field=field(number.field),
            ffn_channels=0 if whole else ffn.axis.units / number.value,
        )
        legal[sizes.FFN] = ffn.axis.sizes
        _add(rules, stack, {sizes.FFN: ffn})
    if heads is not None:
        query, kv = (heads.axis.name, "") if follower is not None else _counted(heads, groups)
        written = dict(heads.axis.written)
        family = replace(
            family,
            attention_out=end(heads.home),
            heads_field=field(query),
            kv_heads_field=field(kv) if kv else "",
            head_dim_field=field(next(iter(written), "")),
        )
        both = {sizes.HEADS: heads} | ({sizes.KV_GROUPS: groups} if groups is not None else {})
        legal |= {sizes.HEADS: heads.axis.sizes, sizes.KV_GROUPS: (groups or heads).axis.sizes}
        _add(rules, stack, both)
    if stream is not None:
        inner, outer = _norms(stream, stack)
        alone = follower is None
        family = replace(
            family,
            hidden_field=field(stream.numbers[0].field),
            hidden_norms=tuple(end(place.module) for place in inner),
            final_norm=outer[0].module if alone else "",
            outer_norms=() if alone else tuple(place.module for place in outer),
            stream_readers=tuple(place.module for place in _readers(stream, stack)),
            heads_follow=not alone,
        )
        legal[sizes.HIDDEN] = stream.sizes
        _add(rules, stack, {sizes.HIDDEN: stream})
    for each in stack.per_layer:
        rule = SliceRule(each.dim, (sizes.LAYERS,), each.width)
        rules[f".{each.parameter}"] = (*rules.get(f".{each.parameter}", ()), rule)
    cut = {axis: seen for axis, seen in ((sizes.FFN, ffn), (sizes.HEADS, heads)) if seen is not None}
    return family, Known(
        rules,
        legal,
        {axis: frozenset(seen.layers) for axis, seen in cut.items()},
        # Discovery names them from the last to the first.
        tuple(names[::-1] for names in stack.branches),
        {each.layer: each.reason for each in stack.pinned},
        {each.parameter: (each.dim, each.width) for each in stack.per_layer},
        {axis: seen.further for axis, seen in cut.items() if seen.further},
        {axis: seen.alike for axis, seen in cut.items() if seen.alike},
    )


@dataclass(frozen=True)
class Chosen:
    """The axes that a row is about; `follower`: of heads that go with the stream, and are its heads."""

    ffn: Seen | None
    heads: Seen | None
    groups: Seen | None
    stream: Axis | None
    follower: Seen | None


def _choose(stack: Stack, anatomy: Anatomy) -> Chosen:
    """Of the axes of a list of layers those that a row is about: one of FFN channels, one of heads with its groups."""
    found = [reach(axis, stack) for axis in anatomy.axes if axis.numbers and not axis.follows]
    seen = [each for each in found if isinstance(each, Seen)]
    ffn = _largest([each for each in seen if each.axis.kind == FFN and len(each.axis.numbers) == 1])
    stream, follower = _stream(stack, anatomy)
    heads, groups = _heads(seen) if follower is None else (follower, None)
    return Chosen(ffn, heads, groups, stream, follower)


def _largest(axes: Sequence[Seen]) -> Seen | None:
    """The one that most layers have, of these the widest."""
    return max(axes, key=lambda each: (len(each.layers), each.axis.units), default=None)


def _heads(seen: Sequence[Seen]) -> tuple[Seen | None, Seen | None]:
    """The axis of query heads, and that of KV groups where they are two."""
    found = [each for each in seen if each.axis.kind == HEADS]
    # Of two kinds of heads those of the usual name, whichever more layers have: also when some of these are gone.
    usual = {each.home for each in found if any(field.endswith(USUAL) for field in each.fields)}
    found = [each for each in found if each.home in usual or not usual]
    query = _largest([each for each in found if each.axis.groups])
    if query is None:
        return _largest([each for each in found if len(each.axis.numbers) <= 2 and not _in_groups(each.axis)]), None
    whole = [
        each
        for each in found
        if each is not query and each.axis.units == query.axis.groups and each.home == query.home
    ]
    return (query, whole[0]) if whole else (None, None)


def _in_groups(axis: Axis) -> bool:
    """Whether only heads that share keys and values go, all of a group at once."""
    return any(number.value > axis.units for number in axis.numbers)


def _counted(heads: Seen, groups: Seen | None) -> tuple[str, str]:
    """The config fields with the numbers of query heads and of KV groups; the second is empty if there is none."""
    if groups is not None:
        query = heads.fields[0]
        others = [field for field in groups.fields if field != query]
        return query, next(iter(others), "")
    fields = heads.fields
    plain = [field for field in fields if "key_value" not in field and "kv" not in field] or [*fields]
    return plain[0], next((field for field in fields if field != plain[0]), "")


def _stream(stack: Stack, anatomy: Anatomy) -> tuple[Axis | None, Seen | None]:
    """
    The residual stream, where what reads it in the layers of the one stack does so through norms, and nothing reads it
    by raw weights; and the heads that follow it, if any do.
    """
    found = [axis for axis in anatomy.axes if axis.kind == HIDDEN and axis.numbers and not axis.follows]
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
    heads = reach(followers[0], stack)
    bound = len(followers) == 1 and len(stream.numbers) == 2 and followers[0].kind == HEADS
    plain = all(place.how in (INPUT, NORM) and place.units == stream.units for place in stream.places)
    good = bound and plain and isinstance(heads, Seen) and not heads.further
    return (stream, heads) if good and isinstance(heads, Seen) else (None, None)


def _readers(stream: Axis, stack: Stack) -> list[Place]:
    """The modules outside of the layers whose inputs are the channels of the stream."""
    inputs = [place for place in stream.places if place.how == INPUT and place.units == stream.units]
    return [place for place in inputs if not place.parameter.startswith(f"{stack.path}.*.") and not place.layers]


def _norms(stream: Axis, stack: Stack) -> tuple[list[Place], list[Place]]:
    """The norms that read the stream in the layers, and those outside of them."""
    norms = [place for place in stream.places if place.how == NORM]
    inner = [place for place in norms if place.parameter.startswith(f"{stack.path}.*.")]
    return inner, [place for place in norms if place not in inner]


def _add(rules: Rules, stack: Stack, axes: Mapping[str, Seen | Axis]) -> None:
    """Add how parameters are made of the units of axes that share some of them."""
    before = f"{stack.path}.*."
    found: dict[tuple[str, int, str], dict[str, tuple[int, ...]]] = {}
    for name, seen in axes.items():
        axis = seen.axis if isinstance(seen, Seen) else seen
        several = Counter((row.parameter, row.dim) for row in axis.rows)
        for row in axis.rows:
            units = tuple(row.units())
            if several[row.parameter, row.dim] > 1:  # layers of several kinds
                for parameter in row.names():
                    found.setdefault((f".{parameter}", row.dim, ""), {})[name] = units
                continue
            if isinstance(seen, Seen) and axis.places[row.place].module != seen.home:
                for parameter, module in _whose(axis, row).items():
                    found.setdefault((f".{parameter}", row.dim, module), {})[name] = units
                continue
            inside = row.parameter.startswith(before)
            short = row.parameter.removeprefix(before) if inside else f".{row.parameter}"
            found.setdefault((short, row.dim, ""), {})[name] = units
    for (short, dim, place), by_axis in found.items():
        rule = SliceRule(dim, tuple(by_axis), 0, tuple(by_axis.values()), place)
        rules[short] = (*rules.get(short, ()), rule)


FINDERS.append(find_parts)
