"""
A family's row found in a model: its sizes, and the places of its gates.

Long because every field of a layout is explained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from ...errors import UnsupportedModelError
from ..shape import EXPERTS, FFN, HEADS, HIDDEN, Shape, SliceRule
from ..skeleton import build_empty
from ..towers import config_at
from .row import FAMILIES, Family

Found = TypeVar("Found")


@dataclass(frozen=True)
class Known:
    """
    What was found of the layers of one class and config, so that it needs not be asked again.

    Args:
        rules (`Mapping[str, tuple[SliceRule, ...]]`): how parameters are made of units, as `find_axes` gives them.
        sizes (`Mapping[str, Container[int]]`): the numbers of units that are built as asked, by the axis.
        layers (`Mapping[str, Collection[int]]`): the layers that have units of an axis, by the axis.
        branches (`tuple[tuple[str, ...], ...]`): of every layer what `Family.branches` says of all.
        pinned (`Mapping[int, str]`): layers that must stay, each with the reason.
        per_layer (`Mapping[str, tuple[int, int]]`): tensors outside of the layers with a stretch for each of them:
            along which dimension, and how long a stretch is.
        further (`Mapping[str, tuple[str, ...]]`): modules at whose inputs an axis has units beside the ends of the
            layers, by their full dotted names: a second FFN of a layer, a pooling head, another stack. Each has units
            of its own, and one number of the config says how many stay, in the layers and there.
        alike (`Mapping[str, tuple[tuple[str, ...], ...]]`): of an axis the modules, ends of layers and further ones,
            that must keep the same units, because a table holds those of all of them.
        ungated (`Mapping[str, str]`): by the kind of axis those that are proved and have no gates, with the reasons.
    """

    rules: Mapping[str, tuple[SliceRule, ...]]
    sizes: Mapping[str, Container[int]]
    layers: Mapping[str, Collection[int]]
    branches: tuple[tuple[str, ...], ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    per_layer: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    further: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alike: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    ungated: Mapping[str, str] = field(default_factory=dict)

    def left(self, layers: Sequence[int]) -> Known:
        """What is still known when some layers are left, of other sizes: where things are."""
        kept = {axis: {new for new, old in enumerate(layers) if old in some} for axis, some in self.layers.items()}
        return Known({}, {}, kept, tuple(self.branches[layer] for layer in layers), ungated=self.ungated)


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
        beside (`tuple[str, ...]`): the lists of layers of further towers that are gated, or cut, together with this
            one: what is in them is theirs.
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
    beside: tuple[str, ...] = ()

    def once(self, key: Any, find: Callable[[], Found]) -> Found:
        """
        What building this layout's class tells, found at the first call with a key, and kept: for every layout of the
        same row, class and config, as nothing else tells it. Who gets it leaves it as it is.
        """
        if key not in self._found:
            self._found[key] = find()
        return cast(Found, self._found[key])

    @cached_property
    def _found(self) -> dict[Any, Any]:
        if self.known is not None:  # what was found with the row tells as well
            return {}
        fields = self.config.to_dict()
        for name in ("_name_or_path", "architectures"):  # where the model is; its class is known
            fields.pop(name, None)
        return _found_of(cast(Any, self.model_class), repr(self), repr(fields))

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

    @property
    def further(self) -> dict[str, tuple[str, ...]]:
        """The modules that hold units of an axis beside the ends of the layers (`Known.further`), by the axis."""
        found = {} if self.facts is None else self.facts.further
        others = tuple(f"{stack}." for stack in self.beside)
        return {axis: tuple(name for name in names if not name.startswith(others)) for axis, names in found.items()}

    def alike(self, name: str) -> tuple[str, ...]:
        """The modules that must keep the same units as one of them (`Known.alike`), the first of them first."""
        groups = () if self.facts is None else (each for axis in self.facts.alike.values() for each in axis)
        return next((group for group in groups if name in group), ())

    def further_axis(self, name: str) -> str:
        """The axis that has units at a module beside the ends of the layers; empty if none has."""
        return next((axis for axis, names in self.further.items() if name in names), "")

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
        """The dense sizes with those of the residual stream and of a head, and the number of experts."""
        return replace(self.dense, hidden_size=self.hidden_size, num_experts=self.num_experts, head_dim=self.head_dim)

    def complete(self, shape: Shape) -> Shape:
        """Fill what was left out from the dense model; sizes that a shape need not state are left out if dense."""
        size = None if shape.hidden_size == self.hidden_size else shape.hidden_size
        experts = None if shape.num_experts == self.num_experts else shape.num_experts
        features = None if shape.head_dim == self.head_dim else shape.head_dim
        return replace(shape, hidden_size=size, num_experts=experts, head_dim=features).complete(self.dense)

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


@lru_cache(maxsize=128)
def _found_of(*_what: object) -> dict[Any, Any]:
    """Where the layouts of a class, a row with its sizes, and a config keep what building tells."""
    return {}


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
