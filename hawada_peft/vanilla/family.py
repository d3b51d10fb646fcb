"""
Where a model family keeps its gates: a row of data per family, and the lookup of a row in a model.

Long because every field of a row and of a layout is explained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from ..errors import UnsupportedModelError
from .modules import feature_sizes
from .shape import EXPERTS, FFN, HEADS, HIDDEN, Shape, SliceRule
from .skeleton import build_empty
from .towers import Tower, config_at, towers_of, value_at

TOWERS = "_hawada_towers"
"""Attribute of a model: which of its towers are slimmed, each with what was found of it if it has no row."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Family:
    """
    One row of data: what cannot be asked of transformers about the models of one `model_type`.

    Which parameters must be sliced, and along which axes, is found by building the config twice (`export.axes`).

    Args:
        layers (`str`): the list of layers, relative to `model.base_model`.
        attention_out (`str`): the attention's output projection, relative to a layer: head gates sit on its input.
        ffn_out (`str`): the FFN's output projection, relative to a layer: channel gates sit on its input.
        kv_heads_field (`str`): the config field with the number of KV groups; empty if every head has its own.
        head_dim_field (`str`): the config field that fixes the size of a head; empty if attention ignores it, and so
            heads cannot be removed.
        ffn_field (`str`): the config field with the FFN size.
        heads_field (`str`): the config field with the number of query heads.
        layers_field (`str`): the config field with the number of layers.
        hidden_field (`str`): the config field with the size of the residual stream.
        ffn_unit (`str`): the config field that `ffn_field` is a multiple of; empty if it counts channels.
        ffn_channels (`float`): channels that 1 of `ffn_field` stands for, where it is a ratio; 0 if it counts them.
        layer_lists (`tuple[str, ...]`): config fields that hold one entry per layer.
        layer_counts (`tuple[str, ...]`): further config fields with the number of layers.
        layer_indices (`tuple[str, ...]`): config fields that list layers, counted from 0.
        layer_stages (`tuple[str, ...]`): config fields that list layers counted from 1; 0 is what goes into the first.
        leading (`tuple[str, ...]`): config fields that tell how many of the first layers are of a kind.
        removed (`tuple[str, ...]`): config fields that follow from others, left out of an edited config.
        pinned (`tuple[tuple[int, str], ...]`): layers that must stay although a model without them can be built, each
            with the reason.
        branches (`tuple[str, ...]`, *optional*): the modules of a layer whose outputs its gate multiplies, relative to
            it: what they give must be added to the residual stream as it is. Empty: there are none, as each layer
            norms its sum. Left out, they are found by running one layer (`gates.branches`).
        blend_home (`str`): the module of a layer that holds a gate which blends the layer, where the row names neither
            an attention's nor an FFN's output projection.
        router (`str`): what chooses the experts of a token, relative to a layer; empty if there are none. `ffn_out`
            are the experts then, stacked in raw weights, and FFN channels are those of every expert.
        experts_field (`str`): the config field with the number of experts.
        chosen_field (`str`): the config field with the number of experts per token.
        fused (`tuple[tuple[str, tuple[str, ...]], ...]`): modules, or raw weights (relative to a layer; with a dot
            before it, relative to the model) whose rows, or inputs from the residual stream, hold several things: the
            axes in their order. One axis alone means that everything of a unit is stored together.
        twin (`str`): the `model_type` of a class that computes the same from the same weights and allows more head
            counts; empty if there is none.
        twin_fields (`tuple[tuple[str, Any], ...]`): config fields that make it compute the same.
        hidden_norms (`tuple[str, ...]`): the norms of a layer, relative to it, through which everything there reads
            the residual stream. The gate on the stream sits on them; empty if it has no place, because something else
            reads the stream or depends on its size.
        final_norm (`str`): the norm after the layers, relative to `model.base_model`, for the same gate.
        outer_norms (`tuple[str, ...]`): further norms outside of the layers that make or read the stream, for the same
            gate, by their full dotted names.
        stream_readers (`tuple[str, ...]`): modules outside of the layers that read channels past these norms, as what
            reads a pooled vector, by their full dotted names.
        heads_follow (`bool`): the size of a head is derived from both, so that heads go with channels of the residual
            stream in proportion, and neither goes alone.
        stream_scales (`tuple[tuple[str, str], ...]`): vectors that multiply what a block adds to the residual stream,
            with the projection whose output they multiply (LayerScale); both relative to a layer.
    """

    layers: str
    attention_out: str
    ffn_out: str
    kv_heads_field: str = ""
    head_dim_field: str = "head_dim"
    ffn_field: str = "intermediate_size"
    ffn_unit: str = ""
    heads_field: str = "num_attention_heads"
    layers_field: str = "num_hidden_layers"
    hidden_field: str = "hidden_size"
    ffn_channels: float = 0
    layer_lists: tuple[str, ...] = ()
    layer_counts: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    layer_stages: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pinned: tuple[tuple[int, str], ...] = ()
    branches: tuple[str, ...] | None = None
    blend_home: str = ""
    router: str = ""
    experts_field: str = "num_experts"
    chosen_field: str = "num_experts_per_tok"
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    twin: str = ""
    twin_fields: tuple[tuple[str, Any], ...] = ()
    hidden_norms: tuple[str, ...] = ()
    final_norm: str = ""
    outer_norms: tuple[str, ...] = ()
    stream_readers: tuple[str, ...] = ()
    heads_follow: bool = False
    stream_scales: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {}
"""The rows, by `config.model_type`. `register_family` adds to it."""

TARGET_MODULES: dict[str, list[str]] = {}
"""PEFT's view of the rows: the names of the modules that are wrapped, by `config.model_type`."""


def register_family(model_type: str, family: Family) -> None:
    """
    Make one more family known, or replace its row.

    Args:
        model_type (`str`): as in `config.model_type`.
        family (`Family`): the row.
    """
    FAMILIES[model_type] = family
    TARGET_MODULES[model_type] = [family.attention_out, family.ffn_out]


@dataclass(frozen=True)
class Known:
    """
    What was found of the layers of one class and config, so that it needs not be asked again.

    Args:
        rules (`Mapping[str, tuple[SliceRule, ...]]`): how parameters are made of units, as `find_axes` gives them.
        sizes (`Mapping[str, Container[int]]`): the numbers of units that are built as asked, by the axis.
        layers (`Mapping[str, Container[int]]`): the layers that have units of an axis, by the axis.
        branches (`tuple[tuple[str, ...], ...]`): of every layer what `Family.branches` says of all.
        pinned (`Mapping[int, str]`): layers that must stay, each with the reason.
        per_layer (`Mapping[str, tuple[int, int]]`): tensors outside of the layers with a stretch for each of them:
            along which dimension, and how long a stretch is.
    """

    rules: Mapping[str, tuple[SliceRule, ...]]
    sizes: Mapping[str, Container[int]]
    layers: Mapping[str, Container[int]]
    branches: tuple[tuple[str, ...], ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    per_layer: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def left(self, layers: Sequence[int]) -> Known:
        """What is still known when some layers are left, of other sizes: where things are."""
        kept = {axis: {new for new, old in enumerate(layers) if old in some} for axis, some in self.layers.items()}
        return Known({}, {}, kept, tuple(self.branches[layer] for layer in layers))


@dataclass(frozen=True)
class Part:
    """
    A list of layers of a model for which a row was found and not written.

    Args:
        tower (`str`): what it is called among the others of the model; empty if it is the only one.
        scope (`str`): path of the config that its sizes are in; empty for the model's own.
        stack (`str`): its full dotted name.
        family (`Family`): the row; config fields of lists end in the place there, as `"depths.1"`.
        known (`Known`): what else was found.
    """

    tower: str
    scope: str
    stack: str
    family: Family
    known: Known | None = None


FINDERS: list[Callable[[PreTrainedModel], list[Part]]] = []
"""Who is asked for the parts of a model that has no row."""


@dataclass(frozen=True)
class Layout:
    """
    A family's row found in a model, with its class and config: all that decides which sizes it can have.

    Args:
        model_type (`str`): the row's key.
        family (`Family`): the row.
        stack (`str`): the list of layers, by its full dotted name.
        root (`str`): `model.base_model`, by its full dotted name; empty if it is the model.
        dense (`Shape`): the model's sizes, complete.
        head_dim (`int`): features per head.
        hidden_size (`int`): features of the residual stream.
        model_class (`type[PreTrainedModel]`): the model's class.
        config (`PreTrainedConfig`): its config.
        tower (`str`): what the layers are called, in a model of several towers: the path of their sub-config, as
            `"text_config"`, or part of the name of their list, as `"decoder"`.
        scope (`str`): path of the sub-config that the sizes are in; empty if it is the config.
        known (`Known`, *optional*): what was found with the row.
        num_experts (`int`, *optional*): routed experts of a layer; None if there are none.
    """

    model_type: str
    family: Family
    stack: str
    root: str
    dense: Shape
    head_dim: int
    hidden_size: int
    model_class: type[PreTrainedModel] = field(compare=False, repr=False)
    config: PreTrainedConfig = field(compare=False, repr=False)
    tower: str = ""
    scope: str = ""
    known: Known | None = field(default=None, compare=False, repr=False)
    num_experts: int | None = None

    def once(self, key: Any, find: Callable[[], Found]) -> Found:
        """What building this layout's class tells, found at the first call with a key, and kept."""
        kept = vars(self).setdefault("_found", {})  # no field: another layout starts with none of it
        if key not in kept:
            kept[key] = find()
        return cast(Found, kept[key])

    @property
    def facts(self) -> Known | None:
        """
        What was found with the row, of these sizes: found again where the model was cut.

        Raises:
            UnsupportedModelError: as the finders.
        """
        if self.known is None or self.known.rules or self.known.sizes:
            return self.known
        return self.once("facts", self._found_again)

    def _found_again(self) -> Known:
        parts = [part for find in FINDERS for part in find(build_empty(self.model_class, self.config))]
        found = [part.known for part in parts if part.stack == self.stack and part.known is not None]
        everything = range(self.dense.sizes()["num_hidden_layers"])
        return found[0] if found else cast(Known, self.known).left(everything)

    @property
    def tower_config(self) -> PreTrainedConfig:
        """The config that the sizes are in: the model's, or one inside it."""
        return config_at(self.config, self.scope)

    def attention_out(self, layer: int) -> str:
        """The dotted name of a layer's attention output projection; empty if none is known there."""
        return self._end(layer, HEADS, self.family.attention_out)

    def ffn_out(self, layer: int) -> str:
        """The dotted name of a layer's FFN output projection; empty if none is known there."""
        return self._end(layer, FFN, self.family.ffn_out)

    def _end(self, layer: int, axis: str, name: str) -> str:
        there = self.known is None or layer in self.known.layers.get(axis, ())
        return f"{self.stack}.{layer}.{name}" if name and there else ""

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """The dotted names of all norms that read the residual stream; the first of them holds the stream's gate."""
        if not self.family.hidden_norms or not self.norms_outside:
            return ()
        layers = range(self.dense.sizes()["num_hidden_layers"])
        inside = [f"{self.stack}.{layer}.{norm}" for layer in layers for norm in self.family.hidden_norms]
        outer = self.family.outer_norms
        return (*outer, *inside, *self.norms_outside[len(outer) :])

    @property
    def norms_outside(self) -> tuple[str, ...]:
        """Those of them that are in no layer, the one after the layers last."""
        last = self.family.final_norm
        return (*self.family.outer_norms, *([f"{self.root}.{last}" if self.root else last] if last else []))

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """
        The stretches of layers (first, behind the last) before each stage whose feature map a backbone gives: one of
        each has to stay. Empty for models that are no backbones.
        """
        config = self.tower_config
        if not isinstance(config, BackboneConfigMixin):
            return ()
        ends = sorted({index for index in config.out_indices if index > 0})
        return tuple(zip([0, *ends], ends, strict=False))

    @property
    def full(self) -> Shape:
        """The dense sizes with that of the residual stream, and the number of experts."""
        return replace(self.dense, hidden_size=self.hidden_size, num_experts=self.num_experts)

    def complete(self, shape: Shape) -> Shape:
        """Fill what was left out from the dense model; sizes that a shape need not state are left out if dense."""
        size = None if shape.hidden_size == self.hidden_size else shape.hidden_size
        experts = None if shape.num_experts == self.num_experts else shape.num_experts
        return replace(shape, hidden_size=size, num_experts=experts).complete(self.dense)

    def narrowed(self, hidden_size: int | None) -> Shape:
        """
        The dense sizes with another hidden size (None: the dense one); an FFN size that is a multiple of it is rounded
        down, and heads that follow it are as many as it has room for.
        """
        if hidden_size is None or hidden_size == self.hidden_size:
            return self.dense
        narrow = self.with_heads(replace(self.dense, hidden_size=hidden_size))
        if self.family.ffn_unit == "hidden_size":
            ffn = self.dense.sizes()["intermediate_size"]
            narrow = replace(narrow, intermediate_size=max(1, ffn // hidden_size) * hidden_size)
        return narrow

    def with_heads(self, shape: Shape) -> Shape:
        """A shape with the heads that its hidden size has room for, where heads follow that; otherwise as it is."""
        if not self.family.heads_follow:
            return shape
        heads = max(1, (shape.hidden_size or self.hidden_size) // self.head_dim)
        return replace(shape, num_attention_heads=heads, num_key_value_heads=heads)

    def position(self, name: str) -> tuple[int, str] | None:
        """
        The layer (-1: after the layers) and the axis (`"heads"`, `"ffn"`, `"experts"`, `"hidden"`) that are gated at a
        module; None if the row gates nothing there.
        """
        if self.norms and name in self.norms_outside:
            return -1, HIDDEN
        match = re.fullmatch(rf"{re.escape(self.stack)}\.(\d+)\.(.+)", name)
        axes = {self.family.attention_out: HEADS, self.family.ffn_out: FFN, self.family.router: EXPERTS}
        axes |= dict.fromkeys(self.family.hidden_norms, HIDDEN)
        if match is None or match[2] not in axes:
            return None
        return int(match[1]), axes[match[2]]

    def within(self, name: str) -> tuple[int, str] | None:
        """The layer that a module is in, and its name there; None if it is in none."""
        index, _, short = name.removeprefix(f"{self.stack}.").partition(".")
        return (int(index), short) if name.startswith(f"{self.stack}.") and index.isdigit() and short else None

    def base_sizes(self) -> dict[str, int | str]:
        """What a plan or an adapter for this model depends on, for JSON."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            **self.dense.sizes(),
            **({"tower": self.tower} if self.tower else {}),
            **({"num_experts": self.num_experts} if self.num_experts else {}),
        }


def locate(model: nn.Module, tower: str | None = None) -> Layout:
    """
    Find the row of a model and its sizes.

    Args:
        model: a transformers model.
        tower: path of the sub-config whose model is meant, as `"text_config"`, or empty for the model's own. Left out,
            it is what the model was gated or cut in before; else the model itself if it has a row; else the tower
            that has one and the most parameters in its layers.

    Raises:
        UnsupportedModelError: if there is no row for the model, or the model does not have the row's modules. The
            message says which names were looked for.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model, so the places of its gates are not known. "
            "Please specify `target_modules` in `peft_config` to gate the inputs of modules by name."
        )
    marked = _marked(model)
    wanted = next(iter(marked), None) if tower is None else tower
    held = marked.get(wanted)
    if held is not None:
        return _measured(model, held, "")
    towers = towers_of(model)
    known = [each for each in _rows_in(model, towers) if wanted in (None, each.path)]
    if not known:
        return _discovered(model, towers, wanted)
    chosen = known[0] if not known[0].path or len(known) == 1 else max(known, key=lambda each: _weight(model, each))
    family = FAMILIES[chosen.config.model_type]
    if chosen.path:
        # Of a row that is about whole models: who else reads the stream, and which class computes the same.
        family = replace(family, hidden_norms=(), final_norm="", stream_scales=(), twin="", twin_fields=())
    return _measured(model, Part(chosen.path, chosen.path, _stack(chosen), family), chosen.root)


def _stack(tower: Tower) -> str:
    """The list of layers of a tower with a row, by its full dotted name."""
    layers = FAMILIES[tower.config.model_type].layers
    return f"{tower.root}.{layers}" if tower.root else layers


def _rows_in(model: PreTrainedModel, towers: list[Tower]) -> list[Tower]:
    """The towers that have a row, but those with layers of several kinds, of which a row is about one."""
    return [each for each in towers if each.config.model_type in FAMILIES and _is_of_one_kind(model, each)]


def _is_of_one_kind(model: PreTrainedModel, tower: Tower) -> bool:
    """
    Whether all layers have the ends of the row, or none of them has one, as where the row is wrong. Layers without the
    experts of a row have another FFN: they are of another kind even where no layer has any.
    """
    family, stack = FAMILIES[tower.config.model_type], _stack(tower)
    try:
        layers = [{name for name, _ in layer.named_modules()} for layer in model.get_submodule(stack).children()]
    except AttributeError:
        return True  # the row is wrong, which is said where its modules are looked for
    attention, ffn, router = (
        sum(end in names for names in layers) for end in (family.attention_out, family.ffn_out, family.router)
    )
    some = range(1, len(layers))
    dense = bool(family.router) and ffn == router == 0
    return not (dense or attention in some or ffn in some or router in some)


def locate_stream(model: nn.Module, tower: str | None = None) -> Layout:
    """
    As `locate`, for a cut of the residual stream: where the row names no norms that read it, by what is found of the
    class, if that does.
    """
    layout = locate(model, tower)
    if layout.norms or layout.known is not None or not isinstance(model, PreTrainedModel):
        return layout
    parts = [part for find in FINDERS for part in find(model) if part.stack == layout.stack and not layout.tower]
    found = [_measured(model, part, "") for part in parts]
    return next((each for each in found if each.norms), layout)


def _discovered(model: PreTrainedModel, towers: list[Tower], wanted: str | None) -> Layout:
    """The layout of a model without a row, by what is found of it."""
    parts = [part for find in FINDERS for part in find(model)]
    chosen = [part for part in parts if wanted in (None, part.tower)]
    if not chosen:
        raise _no_row(model, towers, wanted)

    def weight(part: Part) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(part.stack).parameters())

    return _measured(model, max(chosen, key=weight), "")


def locate_all(model: nn.Module) -> tuple[Layout, ...]:
    """
    The layouts of every tower that a model was gated or cut in before; else the one of `locate`.

    Raises:
        UnsupportedModelError: as `locate`.
    """
    towers = list(_marked(model))
    return tuple(locate(model, tower) for tower in towers) if len(towers) > 1 else (locate(model),)


def _marked(model: nn.Module) -> dict[str | None, Part | None]:
    return cast(dict[str | None, Part | None], vars(model).get(TOWERS, {}))


def base_sizes(layouts: Sequence[Layout]) -> dict[str, int | str]:
    """What an adapter on some towers depends on, for JSON: of several each size by its tower's path."""
    if len(layouts) == 1:
        return layouts[0].base_sizes()
    each = {layout.tower: layout.base_sizes() for layout in layouts}
    common = {"model_type": layouts[0].model_type}
    return common | {
        f"{tower}.{name}": size for tower, sizes in each.items() for name, size in sizes.items() if name not in common
    }


def mark(model: PreTrainedModel, layout: Layout, layers: Sequence[int] | None = None, *, beside: bool = False) -> None:
    """
    Have `locate` find the tower of a layout in a model, whatever else is in it.

    Args:
        model: of the same class.
        layout: of a model of these sizes, or of the one that it was cut from.
        layers: those that are left of that one.
        beside: the towers that were marked before stay marked, before this one.
    """
    part = None
    if layout.known is not None:
        known = layout.known if layers is None else layout.known.left(layers)
        part = Part(layout.tower, layout.scope, layout.stack, layout.family, known)
    if layout.tower or part is not None:
        vars(model)[TOWERS] = {**(_marked(model) if beside else {}), layout.tower: part}


def relocate(layout: Layout, model: PreTrainedModel) -> Layout:
    """
    The layout of a model of the same class and family, of other sizes.

    Raises:
        UnsupportedModelError: if it does not have the family's modules.
    """
    return _measured(model, Part(layout.tower, layout.scope, layout.stack, layout.family, layout.known), layout.root)


def tower_names(model: PreTrainedModel) -> list[str]:
    """The towers of a model that a row is known for; the empty name is the model's own."""
    known = [each.path for each in _rows_in(model, towers_of(model))]
    return known or [part.tower for find in FINDERS for part in find(model)]


def _weight(model: PreTrainedModel, tower: Tower) -> int:
    """Parameters of a tower's layers."""
    stack = find_module(model, _stack(tower), tower.config.model_type)
    return sum(parameter.numel() for parameter in stack.parameters())


def _no_row(model: PreTrainedModel, towers: list[Tower], wanted: str | None) -> UnsupportedModelError:
    inside = {each.path: each.config.model_type for each in towers[1:]}
    paths = ", ".join(f"{path} ({kind})" for path, kind in inside.items())
    has = f" It has the towers {paths}." if inside else ""
    if wanted is not None and wanted not in [each.path for each in towers]:
        return UnsupportedModelError(f"{type(model).__name__} has no tower {wanted!r}.{has}")
    kind = inside.get(wanted or "", model.config.model_type)
    return UnsupportedModelError(
        f"There is no family row for model_type={kind!r}; rows exist for {sorted(FAMILIES)}.{has} "
        "Please specify `target_modules` in `peft_config` to gate the inputs of modules by name (such gates fold "
        "into the weights but remove nothing), or describe the family with `hawada_peft.register_family`."
    )


def _measured(model: PreTrainedModel, part: Part, root: str) -> Layout:
    config, family = config_at(model.config, part.scope), part.family
    stack = find_module(model, part.stack, config.model_type)
    if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) == 0:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: {part.stack!r} should be a list of layers, is a {type(stack).__name__}"
        )
    hidden = _number(config, family.hidden_field or "hidden_size")
    heads = _number(config, family.heads_field or "num_attention_heads")
    attention, ffn = _inputs(model, part, family.attention_out), _inputs(model, part, family.ffn_out)
    if len({*attention}) > 1 or len({*ffn}) > 1 or any(size % heads for size in attention):
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: every layer should have the same sizes, and {heads} heads; the input "
            f"features of {family.attention_out} and {family.ffn_out} are "
            f"{sorted({*zip(attention, ffn, strict=False)})}"
        )
    groups = int(value_at(config, family.kv_heads_field)) if family.kv_heads_field else heads
    return Layout(
        model_type=model.config.model_type,
        family=family,
        stack=part.stack,
        root=root,
        dense=Shape(
            num_attention_heads=heads,
            num_key_value_heads=groups,
            intermediate_size=next(iter(ffn), 1),
            num_hidden_layers=len(stack),
        ),
        head_dim=next(iter(attention), hidden) // heads,
        hidden_size=hidden,
        model_class=type(model),
        config=model.config,
        tower=part.tower,
        scope=part.scope,
        known=part.known,
        num_experts=getattr(config, family.experts_field) if family.router else None,
    )


def _number(config: PreTrainedConfig, field: str) -> int:
    """A size in a config; 1 where it has none of that name, or several."""
    value = value_at(config, field)
    return value if isinstance(value, int) else 1


def _inputs(model: PreTrainedModel, part: Part, end: str) -> list[int]:
    """The input features of one end of every layer, in layers of several kinds of those that have it."""
    stack = cast(Sequence[nn.Module], model.get_submodule(part.stack))
    names = {name for layer in stack for name, _ in layer.named_modules()} if part.known is not None else set()
    sizes = []
    for index, layer in enumerate(stack):
        if end and (part.known is None or end in dict(layer.named_modules())):
            module = find_module(model, f"{part.stack}.{index}.{end}", model.config.model_type)
            sizes.append(feature_sizes(module)[0])
    if end and not sizes:
        raise UnsupportedModelError(f"no layer of {part.stack!r} has a module {end!r}, only {sorted(names)}")
    return sizes


def find_module(model: nn.Module, name: str, model_type: str) -> nn.Module:
    """
    A module by its dotted name.

    Raises:
        UnsupportedModelError: if the model does not have it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) has no module {name!r}, where its family row looks "
            "for one. Correct the row with `hawada_peft.register_family`, or specify `target_modules`."
        ) from None


def hidden_home(layout: Layout) -> str:
    """
    The dotted name of the norm that holds the gate on the residual stream.

    Raises:
        UnsupportedModelError: if the family's row has no place for that gate.
    """
    if not layout.norms:
        raise UnsupportedModelError(
            f"gates on 'hidden' are not known for model_type={layout.model_type!r}: its family row names no "
            "`hidden_norms` and `final_norm`, through which everything reads the residual stream; rows that do: "
            f"{sorted(name for name, row in FAMILIES.items() if row.hidden_norms)}. Leave 'hidden' out of the "
            "config's `gates`."
        )
    return layout.norms[0]
