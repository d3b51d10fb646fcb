"""The plan: which layers, heads and channels stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..adapters.huggingface.family import FFN, HEADS, KV_GROUPS
from ..adapters.huggingface.shape import Shape
from ..errors import IncompatibleBaseError, InvalidPlanError

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """
    What stays of a dense model. The sizes are the same in every kept layer; the indices may differ.

    Args:
        dense (`Shape`): the sizes of the model that the plan is for, complete.
        layers (`tuple[int, ...]`): the kept layers.
        heads (`tuple[tuple[int, ...], ...]`): the kept query heads, one entry per kept layer. The KV group of head
            h is `h // dense.heads_per_group`; every kept group keeps the same number of heads.
        channels (`tuple[tuple[int, ...], ...]`): the kept FFN channels, one entry per kept layer.

    Raises:
        InvalidPlanError: if the entries contradict each other or the dense sizes.
    """

    dense: Shape
    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InvalidPlanError("\n".join(problems))

    def _problems(self) -> Any:
        sizes = self.dense.sizes()
        yield from _index_problems("layers", self.layers, sizes["num_hidden_layers"])
        for name, rows, total in (
            ("heads", self.heads, sizes["num_attention_heads"]),
            ("channels", self.channels, sizes["intermediate_size"]),
        ):
            if len(rows) != len(self.layers):
                yield f"{name} must have one entry per kept layer ({len(self.layers)}), got {len(rows)}"
            if len({len(row) for row in rows}) > 1:
                yield f"every kept layer must keep the same number of {name}, got {[len(row) for row in rows]}"
            for layer, row in zip(self.layers, rows, strict=False):
                yield from _index_problems(f"{name} of layer {layer}", row, total)
        per_group = self.dense.heads_per_group
        counts = [{g: [h // per_group for h in row].count(g) for g in _groups(row, per_group)} for row in self.heads]
        if len({(len(groups), count) for groups in counts for count in groups.values()}) > 1:
            yield (
                "every kept layer must keep the same number of KV groups, and every kept group the same number of "
                f"query heads; heads kept per group: {counts}"
            )

    def kept(self, axis: str, layer: int) -> tuple[int, ...] | None:
        """The kept units of a dense layer on `"heads"`, `"kv_groups"` or `"ffn"`; None if the layer goes."""
        if layer not in self.layers:
            return None
        return {HEADS: self.heads, KV_GROUPS: self.kv_groups, FFN: self.channels}[axis][self.layers.index(layer)]

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
        )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is removed."""
        return self.shape == self.dense

    @classmethod
    def keep_all(cls, dense: Shape) -> Plan:
        """The plan that removes nothing of a model of these (complete) sizes."""
        sizes = dense.sizes()
        layers = sizes["num_hidden_layers"]
        return cls(
            dense=dense,
            layers=tuple(range(layers)),
            heads=(tuple(range(sizes["num_attention_heads"])),) * layers,
            channels=(tuple(range(sizes["intermediate_size"])),) * layers,
        )

    def check_base(self, dense: Shape) -> None:
        """
        Check that the plan was made for a model of these sizes.

        Raises:
            IncompatibleBaseError: naming the sizes that differ.
        """
        mine, theirs = self.dense.sizes(), dense.sizes()
        differing = [f"{name}: plan {mine[name]}, model {theirs[name]}" for name in mine if mine[name] != theirs[name]]
        if differing:
            raise IncompatibleBaseError(
                f"the plan was made for another base model ({'; '.join(differing)}); make one for this model"
            )

    def to_dict(self) -> dict[str, Any]:
        """For JSON. The channels of a layer are a hexadecimal bit mask, channel 0 in the lowest bit."""
        return {
            "format": FORMAT,
            "dense": self.dense.to_dict(),
            "layers": list(self.layers),
            "heads": [list(row) for row in self.heads],
            "channels": [f"{sum(1 << channel for channel in row):x}" for row in self.channels],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """
        The inverse of `to_dict`.

        Raises:
            InvalidPlanError: if this is not a plan, or one of an unknown format.
        """
        if data.get("format") != FORMAT:
            raise InvalidPlanError(f"cannot read a plan of format {data.get('format')!r}; this version reads {FORMAT}")
        missing = sorted({"dense", "layers", "heads", "channels"} - set(data))
        if missing:
            raise InvalidPlanError(f"the plan lacks {missing}")
        try:
            masks = [int(mask, 16) for mask in data["channels"]]
            fields = {
                "layers": tuple(data["layers"]),
                "heads": tuple(tuple(row) for row in data["heads"]),
                "channels": tuple(tuple(i for i, bit in enumerate(f"{mask:b}"[::-1]) if bit == "1") for mask in masks),
            }
        except (TypeError, ValueError) as error:
            raise InvalidPlanError(f"the plan is damaged: {error}; make it anew with `model.plan`") from None
        return cls(dense=Shape.from_dict(data["dense"]), **fields)

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
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise InvalidPlanError(f"the plan is not JSON: {error}") from None

    def __str__(self) -> str:
        slim, dense = self.shape.sizes(), self.dense.sizes()
        changes = ", ".join(f"{name} {slim[name]}/{dense[name]}" for name in dense)
        dropped = sorted(set(range(dense["num_hidden_layers"])) - set(self.layers))
        return f"Plan({changes}; dropped layers {dropped})"


def _groups(heads: tuple[int, ...], per_group: int) -> tuple[int, ...]:
    return tuple(sorted({head // per_group for head in heads}))


def _index_problems(name: str, kept: tuple[int, ...], total: int) -> Any:
    if not kept:
        yield f"{name}: at least one must be kept"
    elif not all(isinstance(index, int) for index in kept):
        yield f"{name}: kept indices must be whole numbers, got {_shorten(kept)}"
    elif list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        yield f"{name}: kept indices must rise and lie in 0..{total - 1}, got {_shorten(kept)}"


def _shorten(indices: tuple[int, ...]) -> str:
    return str(list(indices)) if len(indices) <= 16 else f"[{indices[0]}, {indices[1]}, ..., {indices[-1]}]"
