"""
The plan: which layers, heads and channels stay.

Long because whatever a file may say is checked before it is a plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import IncompatibleBaseError, InvalidPlanError
from ..vanilla.shape import EXPERTS, FFN, HEADS, HIDDEN, KV_GROUPS, LAYERS, Shape
from .further import SIZES, Further, from_masks, mask_problems, to_masks
from .rounding import Rounding
from .stored import from_mask, json_problems, short, to_mask

FORMAT = 1

LARGEST = 2**20
"""Of any size: a plan may come from a file, and what it says is counted out."""


@dataclass(frozen=True, repr=False)
class Plan:
    """
    What stays of a dense model. The sizes are the same in every kept layer; the indices may differ.

    Args:
        dense (`Shape`): the sizes of the model that the plan is for, complete.
        layers (`tuple[int, ...]`): the kept layers.
        heads (`tuple[tuple[int, ...], ...]`): the kept query heads, one entry per kept layer. The KV group of head
            h is `h // dense.heads_per_group`; every kept group keeps the same number of heads.
        channels (`tuple[tuple[int, ...], ...]`): the kept FFN channels, one entry per kept layer.
        hidden (`tuple[int, ...]`, *optional*): the kept channels of the residual stream, of which `dense` states the
            number then; all if left out.
        experts (`tuple[tuple[int, ...], ...]`, *optional*): the kept experts, one entry per kept layer, of which
            `dense` states the number then; all if left out.
        rotated (`bool`): `hidden` are directions of a basis of the stream, which the adapter has, not channels.
        head_dim (`int`, *optional*): the kept features of every head, the first ones of a basis inside each, which
            the adapter has; `dense` states their number then; all if left out.
        tower (`str`): path of the sub-config in the model's config that the sizes are in, as `"text_config"`; empty if
            they are the config's own, or that of the one tower.
        further (`tuple[Further, ...]`): the kept heads and FFN channels at modules beside the ends of the layers; all
            of them where none is named.
        beside (`tuple[Plan, ...]`): what stays of further towers of the same model, each with its path, as `of_towers`
            makes it.
        roundings (`tuple[Rounding, ...]`): what was asked for where that is not what the plan has, and why. Plans that
            keep the same are equal, whatever was asked for.

    Raises:
        InvalidPlanError: if the entries contradict each other or the dense sizes.
    """

    dense: Shape
    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...] | None = None
    rotated: bool = False
    head_dim: int | None = None
    tower: str = ""
    experts: tuple[tuple[int, ...], ...] | None = None
    further: tuple[Further, ...] = ()
    beside: tuple[Plan, ...] = ()
    roundings: tuple[Rounding, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InvalidPlanError("\n".join(problems))

    def _problems(self) -> Any:
        if not isinstance(self.dense, Shape):
            yield f"dense must be a Shape, got a {type(self.dense).__name__}"
            return
        if self.beside:
            yield from _tower_problems(self)
        if not all(isinstance(each, Further) and each.axis in SIZES for each in self.further):
            yield f"further must be kept units of {list(SIZES)} at modules, got {short(self.further)}"
            return
        sizes = self.dense.sizes()
        experts = () if self.experts is None else self.experts
        if not all(isinstance(row, Sequence) for row in (self.layers, self.heads, self.channels, experts)) or not all(
            isinstance(row, Sequence) for row in (*self.heads, *self.channels, *experts)
        ):
            yield "layers must be whole numbers, heads, channels and experts a row of them for each layer"
            return
        if (self.experts is None) != (self.dense.num_experts is None):
            yield "the kept experts and dense.num_experts must be given together"
            return
        if large := {name: size for name, size in sizes.items() if size > LARGEST}:
            yield f"dense: no model has sizes above {LARGEST}, got {short(large)}"
            return
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
            yield f"dense: {sizes['num_attention_heads']} query heads in {sizes['num_key_value_heads']} KV groups"
            return
        yield from _index_problems("layers", self.layers, sizes["num_hidden_layers"])
        rows_of_units = [
            ("heads", self.heads, sizes["num_attention_heads"]),
            ("channels", self.channels, sizes["intermediate_size"]),
        ]
        rows_of_units += [] if self.experts is None else [("experts", self.experts, self.dense.num_experts or 0)]
        for name, rows, total in rows_of_units:
            if len(rows) != len(self.layers):
                yield f"{name} must have one entry per kept layer ({len(self.layers)}), got {len(rows)}"
            if len({len(row) for row in rows}) > 1:
                yield f"every kept layer must keep the same number of {name}, got {[len(row) for row in rows]}"
            for layer, row in zip(self.layers, rows, strict=False):
                yield from _index_problems(f"{name} of layer {layer}", row, total)
        if (self.hidden is None) != (self.dense.hidden_size is None):
            yield "the kept channels of the residual stream (hidden) and dense.hidden_size must be given together"
        elif self.rotated and self.hidden is None:
            yield "rotated is about kept directions of the residual stream, and hidden names none"
        elif self.hidden is not None:
            yield from _index_problems("hidden", self.hidden, self.dense.hidden_size or 0)
        if (self.head_dim is None) != (self.dense.head_dim is None):
            yield "the kept features of heads (head_dim) and dense.head_dim must be given together"
        elif self.head_dim is not None and not 1 <= self.head_dim <= (self.dense.head_dim or 0):
            yield f"head_dim must be 1 to {self.dense.head_dim}, got {self.head_dim}"
        yield from self._further_problems()
        per_group = self.dense.heads_per_group
        every = [*self.heads, *(each.kept for each in self.further if each.axis == HEADS)]
        counts = [{g: [h // per_group for h in row].count(g) for g in _groups(row, per_group)} for row in every]
        if len({(len(groups), count) for groups in counts for count in groups.values()}) > 1:
            yield (
                "every kept layer must keep the same number of KV groups, and every kept group the same number of "
                f"query heads; heads kept per group: {counts}"
            )

    def _further_problems(self) -> Any:
        sizes, slim = self.dense.sizes(), {axis: len(rows[0]) for axis, rows in self._rows.items() if rows}
        for each in self.further:
            yield from _index_problems(f"{each.axis} at {each.module}", each.kept, sizes[SIZES[each.axis]])
            if len(each.kept) != (most := slim.get(each.axis, 0)):
                yield f"{each.module} must keep as many {each.axis} as the layers, {most}: {len(each.kept)}"

    def at(self, axis: str, module: str) -> tuple[int, ...] | None:
        """The kept units on `"heads"`, `"kv_groups"` or `"ffn"` at a module of `further`; None if all are."""
        if axis == KV_GROUPS:
            heads = self.at(HEADS, module)
            return None if heads is None else tuple(_groups(heads, self.dense.heads_per_group))
        return next((each.kept for each in self.further if (each.axis, each.module) == (axis, module)), None)

    def kept(self, axis: str, layer: int) -> tuple[int, ...] | None:
        """The kept units of a dense layer on `"heads"`, `"kv_groups"` or `"ffn"`; None if the layer goes."""
        if layer not in self.layers:
            return None
        return self.units(axis, self.layers.index(layer))

    def units(self, axis: str, position: int) -> tuple[int, ...] | None:
        """The kept units on an axis in the layer at a position of the plan; None if the plan leaves them all."""
        if axis in (HIDDEN, LAYERS):
            return self.hidden if axis == HIDDEN else self.layers
        if axis == KV_GROUPS:
            return tuple(_groups(self.heads[position], self.dense.heads_per_group))
        if axis == EXPERTS:
            return None if self.experts is None else self.experts[position]
        return self._rows[axis][position]

    @property
    def _rows(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {HEADS: self.heads, FFN: self.channels}

    @property
    def kv_groups(self) -> tuple[tuple[int, ...], ...]:
        """The kept KV groups, one entry per kept layer."""
        return tuple(_groups(row, self.dense.heads_per_group) for row in self.heads)

    @property
    def shape(self) -> Shape:
        """The sizes of the slim model, complete."""
        return Shape(
            num_attention_heads=len(self.heads[0]),
            num_key_value_heads=len(self.kv_groups[0]),
            intermediate_size=len(self.channels[0]),
            num_hidden_layers=len(self.layers),
            hidden_size=None if self.hidden is None else len(self.hidden),
            num_experts=None if self.experts is None else len(self.experts[0]),
            head_dim=self.head_dim,
        )

    @property
    def in_bases(self) -> bool:
        """Whether it keeps directions of a basis, of the residual stream or inside of heads."""
        return self.rotated or self.head_dim is not None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is removed, of any tower."""
        return all(part.shape == part.dense for part in self.parts)

    @cached_property
    def parts(self) -> tuple[Plan, ...]:
        """The plan of each tower by itself."""
        return (replace(self, beside=()), *self.beside) if self.beside else (self,)

    @property
    def cut_parts(self) -> tuple[Plan, ...]:
        """The plan of each tower that loses something."""
        return tuple(part for part in self.parts if not part.keeps_all)

    @property
    def target(self) -> Shape | dict[str, Shape]:
        """The sizes that are left, as `HawAdaModel.plan` takes them: a shape; of several towers one for each."""
        return {part.tower: part.shape for part in self.parts} if self.beside else self.shape

    @property
    def all_roundings(self) -> dict[str, tuple[Rounding, ...]]:
        """Of each tower its `roundings`."""
        return {part.tower: part.roundings for part in self.parts}

    def rounded(self, roundings: Mapping[str, Sequence[Rounding]]) -> Plan:
        """The same plan with other `roundings`, by the tower."""
        return Plan.of_towers([replace(part, roundings=tuple(roundings.get(part.tower, ()))) for part in self.parts])

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the slim model by their paths, of every tower: `"text_config.intermediate_size"`."""
        return {
            f"{part.tower}.{name}" if part.tower else name: size
            for part in self.parts
            for name, size in part.shape.to_dict().items()
        }

    @classmethod
    def of_towers(cls, parts: Sequence[Plan]) -> Plan:
        """
        One plan of several, each for another tower of the same model.

        Args:
            parts (`Sequence[Plan]`): at least one; the first is that of the tower that figures of one tower are about.

        Raises:
            InvalidPlanError: if two are for the same tower, or one does not say for which it is.
        """
        if not parts:
            raise InvalidPlanError("a plan is of at least one tower, and none was given")
        return replace(parts[0], beside=tuple(parts[1:])) if len(parts) > 1 else parts[0]

    @classmethod
    def keep_all(cls, dense: Shape, tower: str = "") -> Plan:
        """The plan that removes nothing of a model of these (complete) sizes."""
        dense = replace(dense, hidden_size=None, num_experts=None, head_dim=None)
        sizes = dense.sizes()
        layers = sizes["num_hidden_layers"]
        return cls(
            dense=dense,
            layers=tuple(range(layers)),
            heads=(tuple(range(sizes["num_attention_heads"])),) * layers,
            channels=(tuple(range(sizes["intermediate_size"])),) * layers,
            tower=tower,
        )

    def check_base(self, dense: Shape) -> None:
        """
        Check that the plan was made for a model of these sizes; that of the residual stream counts if both state it.

        Raises:
            IncompatibleBaseError: naming the sizes that differ.
        """
        mine, theirs = self.dense.to_dict(), dense.to_dict()
        differing = [
            f"{name}: plan {mine[name]}, model {theirs[name]}"
            for name in mine
            if name in theirs and mine[name] != theirs[name]
        ]
        if differing:
            raise IncompatibleBaseError(
                f"the plan was made for another base model ({'; '.join(differing)}); make one for this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """
        For JSON. Channels are a hexadecimal bit mask, channel 0 lowest; what is not given is left out. Of several
        towers it holds the plan of each by its path.
        """
        if self.beside:
            inner = {part.tower: part.to_dict() for part in self.parts}
            left_out = ("format", "tower")
            return {
                "format": FORMAT,
                "towers": {
                    tower: {name: value for name, value in part.items() if name not in left_out}
                    for tower, part in inner.items()
                },
            }
        data: dict[str, Any] = {
            "format": FORMAT,
            "dense": self.dense.to_dict(),
            "layers": list(self.layers),
            "heads": [list(row) for row in self.heads],
            "channels": [to_mask(row) for row in self.channels],
        }
        if self.hidden is not None:
            data["hidden"] = to_mask(self.hidden)
            data |= {"rotated": True} if self.rotated else {}
        data |= {} if self.head_dim is None else {"head_dim": self.head_dim}
        data |= {"tower": self.tower} if self.tower else {}
        if self.experts is not None:
            data["experts"] = [to_mask(row) for row in self.experts]
        if self.further:
            data["further"] = to_masks(self.further)
        if self.roundings:
            data["roundings"] = [rounding.to_dict() for rounding in self.roundings]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """
        The inverse of `to_dict`.

        Raises:
            InvalidPlanError: if this is not a plan, or one of an unknown format.
        """
        if not isinstance(data, Mapping):
            raise InvalidPlanError(f"a plan is an object with names, got a {type(data).__name__}")
        if data.get("format") != FORMAT or isinstance(data["format"], bool):
            raise InvalidPlanError(
                f"cannot read a plan of format {short(data.get('format'))}; this version reads {FORMAT}"
            )
        if "towers" in data:
            return _of_towers(data)
        known = {
            "format",
            "dense",
            "layers",
            "heads",
            "channels",
            "hidden",
            "experts",
            "further",
            "rotated",
            "head_dim",
            "tower",
            "roundings",
        }
        if unknown := sorted(map(short, set(data) - known)):
            raise InvalidPlanError(f"a plan has no fields {unknown[:5]}; it has {sorted(known)}")
        missing = sorted({"dense", "layers", "heads", "channels"} - set(data))
        if missing:
            raise InvalidPlanError(f"the plan lacks {missing}")
        problems = list(json_problems(data))
        problems = problems or list(mask_problems(data.get("further", {}), data["dense"]))
        if problems:
            raise InvalidPlanError(f"the plan is damaged: {'; '.join(problems[:5])}; make it anew with `model.plan`")
        try:
            roundings = tuple(Rounding(**rounding) for rounding in data.get("roundings", ()))
        except TypeError as error:
            raise InvalidPlanError(f"the plan is damaged: {error}; make it anew with `model.plan`") from None
        return cls(
            dense=Shape.from_dict(data["dense"]),
            layers=tuple(data["layers"]),
            heads=tuple(tuple(row) for row in data["heads"]),
            channels=tuple(from_mask(mask) for mask in data["channels"]),
            hidden=None if data.get("hidden") is None else from_mask(data["hidden"]),
            experts=None if data.get("experts") is None else tuple(from_mask(mask) for mask in data["experts"]),
            further=from_masks(data.get("further", {})),
            rotated=data.get("rotated", False),
            head_dim=data.get("head_dim"),
            tower=data.get("tower", ""),
            roundings=roundings,
        )

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """
        The inverse of `to_json`.

        Raises:
            InvalidPlanError: as `from_dict`, and if the text is not JSON.
        """
        if not isinstance(text, str | bytes):
            raise InvalidPlanError(f"the plan must be JSON text, got a {type(text).__name__}; see `Plan.from_dict`")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidPlanError(f"the plan is not JSON: {error}") from None
        return cls.from_dict(data)

    def __repr__(self) -> str:
        return str(self)  # all indices would be megabytes: `to_dict` has them

    def __str__(self) -> str:
        cut = [part for part in self.parts if not part.keeps_all] or self.parts
        return f"Plan({' | '.join(map(_told, cut))})"


def _told(plan: Plan) -> str:
    slim, dense = plan.shape.to_dict(), plan.dense.to_dict()
    changes = ", ".join(f"{name} {slim[name]}/{dense[name]}" for name in dense)
    dropped = sorted(set(range(dense["num_hidden_layers"])) - set(plan.layers))
    where = f"{plan.tower}: " if plan.tower else ""
    return f"{where}{changes}; dropped layers {dropped}"


def _tower_problems(plan: Plan) -> Any:
    """What is wrong with the plans of several towers beside each other."""
    if not isinstance(plan.beside, tuple) or not all(isinstance(each, Plan) for each in plan.beside):
        yield f"beside must be plans, got {short(plan.beside)}"
        return
    names = [plan.tower, *(each.tower for each in plan.beside)]
    if not all(names) or len(set(names)) < len(names):
        yield f"plans of several towers each name their own, got {names}"
    if any(each.beside for each in plan.beside):
        yield "a plan of several towers holds plans of one tower each"


def _of_towers(data: Mapping[str, Any]) -> Plan:
    towers = data["towers"]
    if unknown := sorted(map(short, set(data) - {"format", "towers"})):
        raise InvalidPlanError(f"a plan of several towers has no fields {unknown[:5]} beside them")
    named = isinstance(towers, Mapping) and all(isinstance(each, Mapping) for each in towers.values())
    if not named or len(towers) < 2:
        raise InvalidPlanError(f"towers must be an object with the plan of each of several, got {short(towers)}")
    once = {"format", "tower", "towers"}
    if twice := sorted(f"{tower}.{name}" for tower, each in towers.items() for name in once & each.keys()):
        raise InvalidPlanError(f"the plan is damaged: {twice[:5]} are said once, of the whole plan")
    return Plan.of_towers(
        [Plan.from_dict({**each, "format": data["format"], "tower": tower}) for tower, each in towers.items()]
    )


def _groups(heads: tuple[int, ...], per_group: int) -> tuple[int, ...]:
    return tuple(sorted({head // per_group for head in heads}))


def _index_problems(name: str, kept: tuple[int, ...], total: int) -> Any:
    if not kept:
        yield f"{name}: at least one must be kept"
    elif set(map(type, kept)) != {int}:  # plans hold many thousand, and searches make hundreds of them
        yield f"{name}: kept indices must be whole numbers, got {_shorten(kept)}"
    elif list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        yield f"{name}: kept indices must rise and lie in 0..{total - 1}, got {_shorten(kept)}"


def _shorten(indices: tuple[int, ...]) -> str:
    return str(list(indices)) if len(indices) <= 16 else f"[{indices[0]}, {indices[1]}, ..., {indices[-1]}]"
