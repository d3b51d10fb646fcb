"""
What can be removed of a model, as data: axes, stacks, refusals.

Long because every field is explained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from ..errors import UnsupportedModelError

HEADS, FFN, EXPERTS, HIDDEN, OTHER = KINDS = ("heads", "ffn", "experts", "hidden", "other")
"""Kinds of axes: attention heads or KV groups; channels of a block; experts; the residual stream; other widths."""

INPUT, PARAMETER, LOGITS, NORM = ("input", "parameter", "logits", "norm")
"""How a place closes units; see `Place`."""

Sizes = range | tuple[int, ...]
"""Numbers of units, ascending."""

Made = TypeVar("Made", bound="Data")


@dataclass(frozen=True)
class Data:
    """A frozen dataclass of numbers, names and tuples of the like, with JSON both ways."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_dict(cls: type[Made], data: Mapping[str, Any]) -> Made:
        """
        The inverse of `to_dict`.

        Raises:
            UnsupportedModelError: on names that are no fields.
        """
        known = {each.name for each in fields(cls)}
        if set(data) - known:
            raise UnsupportedModelError(
                f"{cls.__name__} has no fields {sorted(set(data) - known)}, only {sorted(known)}"
            )
        inner = {name: PARTS.get((cls.__name__, name)) for name in data}
        return cls(**{name: _made(value, inner[name]) for name, value in data.items()})


@dataclass(frozen=True)
class Number(Data):
    """
    A number of the config that an axis sets.

    Its value for `n` units of an axis of `units` is `value * n / units`; where several axes set it, the product of all
    these factors counts.

    Args:
        field (`str`): its path in the config, `"text_config.intermediate_size"`, `"depths.1"`.
        value (`int` or `float`): at all units; what it stands for, where the config leaves it out.
    """

    field: str
    value: int | float

    def at(self, units: int, of: int) -> int | float:
        """The value with `units` of `of` units left; of a whole number a whole one, where it comes out."""
        scaled = self.value * units
        return scaled // of if isinstance(scaled, int) and scaled % of == 0 else scaled / of


@dataclass(frozen=True)
class Place(Data):
    """
    Where units of an axis are closed: by a gate in training, by a mask under a plan.

    Args:
        parameter (`str`): a weight, by its dotted name; `*` stands for a layer's index.
        dim (`int`): its dimension that is made of the units.
        how (`str`): `"input"`: the input of the module (a Linear, Conv1D, convolution) that owns the weight is gated
            there; `"parameter"`: the weight itself is multiplied along `dim`, its module has no such input
            (stacked experts); `"logits"`: what comes out of this row is -infinity for a closed unit (a router; of a
            vector, the entry itself); `"norm"`: the norm's statistics are those of the units that stay. A norm does
            not choose units: `Rows` say whose it has.
        units (`int`): units here; at most `Axis.units`, and fewer where one number sets widths of several sizes.
        layers (`tuple[int, ...]`): the layers that `*` stands for.
    """

    parameter: str
    dim: int
    how: str
    units: int
    layers: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The dotted name of the module that owns the parameter; `*` as there."""
        return self.parameter.rpartition(".")[0]

    def names(self) -> Iterator[str]:
        """The dotted names of the parameters."""
        return expand(self.parameter, self.layers)


@dataclass(frozen=True)
class Segment(Data):
    """
    A stretch of rows.

    Args:
        width (`int`): rows per unit.
        units (`int`): so many units follow each other; 0: `width` rows of no unit, which always stay.
    """

    width: int
    units: int = 0

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.width * (self.units or 1)


@dataclass(frozen=True)
class Rows(Data):
    """
    How a dimension of a parameter is made of the units of an axis.

    Args:
        parameter (`str`): by its dotted name; `*` stands for a layer's index.
        dim (`int`): the dimension.
        place (`int`): index in `Axis.places` of the place whose kept units stay here: that of the same layer, or any
            of its layers where one of both lies outside of them.
        segments (`tuple[Segment, ...]`): in their order. Each segment counts its units from the first.
        groups (`int`): the segments repeat so often, once for each group, each with the next units.
        explicit (`tuple[int, ...]`): instead of segments, the unit of every row; -1: the row always stays.
        layers (`tuple[int, ...]`): the layers that `*` stands for.
    """

    parameter: str
    dim: int
    place: int
    segments: tuple[Segment, ...] = ()
    groups: int = 1
    explicit: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    def names(self) -> Iterator[str]:
        """The dotted names of the parameters."""
        return expand(self.parameter, self.layers)

    def units(self) -> list[int]:
        """The unit of every row; -1: the row always stays."""
        if self.explicit:
            return list(self.explicit)
        units: list[int] = []
        for group in range(self.groups):
            for segment in self.segments:
                first = group * segment.units
                run = range(first, first + segment.units) if segment.units else (-1,)
                units += [unit for unit in run for _ in range(segment.width)]
        return units


@dataclass(frozen=True)
class Axis(Data):
    """
    One thing of which less can stay. Proved: the model with units closed and the smaller vanilla model agree.

    Args:
        name (`str`): path of the config field that counts it (of the first of `numbers`): `"num_key_value_heads"`.
        kind (`str`): one of `KINDS`.
        units (`int`): how many there are, at the widest place.
        numbers (`tuple[Number, ...]`): the config's numbers that it sets; none if it follows another axis.
        places (`tuple[Place, ...]`): where units are closed.
        rows (`tuple[Rows, ...]`): every dimension of every parameter that gets smaller, the places' own too.
        sizes (`range` or `tuple[int, ...]`): numbers of units with which the class builds a model as asked, all of
            them among these.
        written (`tuple[tuple[str, Any], ...]`): config fields and values to write beside a smaller size: what the
            config would derive from it (`head_dim`).
        groups (`int`): units come in so many groups, in their order, and all keep equally many; 0: in none.
        tied (`bool`): the same units stay at every place.
        alike (`bool`): the same units stay in all layers of a place, and others at other places.
        follows (`str`): the axis in proportion to which this one gets smaller, and never alone; empty: it has a size
            of its own.
    """

    name: str
    kind: str
    units: int
    numbers: tuple[Number, ...]
    places: tuple[Place, ...]
    rows: tuple[Rows, ...]
    sizes: Sizes
    written: tuple[tuple[str, Any], ...] = ()
    groups: int = 0
    tied: bool = False
    alike: bool = False
    follows: str = ""

    def left_at(self, place: Place, size: int) -> int:
        """Units that stay at a place when `size` of the axis do."""
        return size * place.units // self.units


@dataclass(frozen=True)
class PerLayer(Data):
    """
    A dimension outside of a stack that holds one stretch of rows for each of its layers.

    Args:
        parameter (`str`): by its dotted name.
        dim (`int`): the dimension.
        width (`int`): rows per layer.
    """

    parameter: str
    dim: int
    width: int


@dataclass(frozen=True)
class Pinned(Data):
    """
    A layer that has to stay.

    Args:
        layer (`int`): its index.
        reason (`str`): what was found when it was left out.
    """

    layer: int
    reason: str


@dataclass(frozen=True)
class Stack(Data):
    """
    A list of layers, of which fewer can stay.

    Args:
        field (`str`): path of the config field that counts them.
        path (`str`): dotted name of the list.
        count (`int`): layers.
        free (`tuple[int, ...]`): those that may go, at least one of the stack left.
        pinned (`tuple[Pinned, ...]`): the others.
        branches (`tuple[tuple[str, ...], ...]`): for each layer the modules, relative to it, whose outputs a soft gate
            `g` multiplies: the layer is then exactly `x + g * (what it adds)`, linear in the gate. Empty: it has none,
            and a gate has to blend, `x + g * (layer(x) - x)`.
        also (`tuple[str, ...]`): further config fields that hold the same number.
        lists (`tuple[str, ...]`): config fields with an entry for each layer, to be cut.
        indices (`tuple[str, ...]`): config fields that list layers counted from 0: renumbered, those that go left out.
        stages (`tuple[str, ...]`): config fields that list layers counted from 1, 0 being what goes into the first.
        leading (`tuple[str, ...]`): config fields that tell how many of the first layers are of a kind.
        removed (`tuple[str, ...]`): config fields that follow from others, to be left out.
        per_layer (`tuple[PerLayer, ...]`): what is cut with the layers outside of them.
    """

    field: str
    path: str
    count: int
    free: tuple[int, ...]
    pinned: tuple[Pinned, ...] = ()
    branches: tuple[tuple[str, ...], ...] = ()
    also: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    per_layer: tuple[PerLayer, ...] = ()


@dataclass(frozen=True)
class Refusal(Data):
    """
    A number of the config that cannot be made smaller.

    Args:
        field (`str`): its path; several joined by `+` where they were changed together.
        reason (`str`): what was found when it was tried.
    """

    field: str
    reason: str


@dataclass(frozen=True)
class Anatomy(Data):
    """
    What can be removed of a model of a class and config, found and proved.

    Args:
        model_class (`str`): name of the class.
        model_type (`str`): as in its config.
        axes (`tuple[Axis, ...]`): widths.
        stacks (`tuple[Stack, ...]`): lists of layers.
        refusals (`tuple[Refusal, ...]`): what cannot be removed, and why.
    """

    model_class: str
    model_type: str
    axes: tuple[Axis, ...] = ()
    stacks: tuple[Stack, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all axes."""
        return tuple(axis.name for axis in self.axes)

    def axis(self, name: str) -> Axis:
        """
        An axis by its name, or by its kind where there is one of it.

        Raises:
            UnsupportedModelError: if there is none, or several.
        """
        found = [axis for axis in self.axes if axis.name == name] or [axis for axis in self.axes if axis.kind == name]
        if len(found) == 1:
            return found[0]
        why = next((f": {each.reason}" for each in self.refusals if name in each.field.split("+")), "")
        raise UnsupportedModelError(
            f"{self.model_class} has {'several axes' if found else 'no axis'} {name!r}{why}; give one of "
            f"{list(self.names)}"
        )

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Anatomy:
        """
        The inverse of `to_json`.

        Raises:
            UnsupportedModelError: if it is not one.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(f"this is no anatomy: {error}") from None


def expand(name: str, layers: tuple[int, ...]) -> Iterator[str]:
    """The names that one with `*` stands for."""
    return (name.replace("*", str(layer), 1) for layer in layers) if layers else iter((name,))


PARTS: dict[tuple[str, str], type[Data]] = {
    ("Anatomy", "axes"): Axis,
    ("Anatomy", "stacks"): Stack,
    ("Anatomy", "refusals"): Refusal,
    ("Axis", "numbers"): Number,
    ("Axis", "places"): Place,
    ("Axis", "rows"): Rows,
    ("Rows", "segments"): Segment,
    ("Stack", "pinned"): Pinned,
    ("Stack", "per_layer"): PerLayer,
}
"""What the entries of a field are, by class and field."""


def _plain(value: Any) -> Any:
    if isinstance(value, Data):
        return value.to_dict()
    if isinstance(value, range):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _made(value: Any, part: type[Data] | None) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_made(each, part) for each in value)
    if part is not None:
        return part.from_dict(value)
    if isinstance(value, Mapping) and value.keys() == {"start", "stop", "step"}:
        return range(value["start"], value["stop"], value["step"])
    return value
