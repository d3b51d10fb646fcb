"""The sizes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from ..errors import IllegalShapeError


@dataclass(frozen=True)
class Axis:
    """
    A size that slimming may change: what it is called, and where.

    Args:
        name (`str`): in gates, keep ratios and plans.
        field (`str`): of a `Shape`.
        word (`str`): one unit, for people.
        plural (`str`): several.
    """

    name: str
    field: str
    word: str
    plural: str


SIZES = (
    Axis("heads", "num_attention_heads", "query head", "query heads"),
    Axis("kv_groups", "num_key_value_heads", "KV group", "KV groups"),
    Axis("ffn", "intermediate_size", "FFN channel", "FFN channels"),
    Axis("layers", "num_hidden_layers", "layer", "layers"),
    Axis("hidden", "hidden_size", "channel of the residual stream", "channels of the residual stream"),
    Axis("experts", "num_experts", "expert", "experts"),
    Axis("head_dim", "head_dim", "feature per head", "features per head"),
)
"""Every axis, in the order of the fields of `Shape`."""

BY_NAME = {axis.name: axis for axis in SIZES}
BY_FIELD = {axis.field: axis for axis in SIZES}
HEADS, KV_GROUPS, FFN, LAYERS, HIDDEN, EXPERTS, HEAD_DIM = BY_NAME
AXES = tuple(axis.field for axis in SIZES if axis.name not in (HIDDEN, EXPERTS, HEAD_DIM))
"""The sizes that every complete shape states."""


@dataclass(frozen=True)
class Shape:
    """
    The sizes that slimming may change. What is left out stays as the dense model has it.

    Args:
        num_attention_heads (`int`, *optional*): query heads in every layer.
        num_key_value_heads (`int`, *optional*): KV groups in every layer. Left out, it stays; in a model with one
            query head per KV group (plain multi-head attention) it follows `num_attention_heads`.
        intermediate_size (`int`, *optional*): FFN channels in every layer.
        num_hidden_layers (`int`, *optional*): layers.
        hidden_size (`int`, *optional*): channels of the residual stream. A complete shape may leave it out as well:
            the dense model's.
        num_experts (`int`, *optional*): routed experts in every layer, whose channels `intermediate_size` counts. A
            complete shape may leave it out as well: the dense model's, or none.
        head_dim (`int`, *optional*): features of each head. A complete shape may leave it out as well: the dense
            model's.

    Example:

        >>> Shape(intermediate_size=512).complete(Shape(12, 4, 1024, 6)).to_dict()
        {'num_attention_heads': 12, 'num_key_value_heads': 4, 'intermediate_size': 512, 'num_hidden_layers': 6}
    """

    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number of at least 1, got {size!r}"
            for name, size in asdict(self).items()
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1)
        ]
        if problems:
            raise IllegalShapeError("\n".join(problems))

    def complete(self, dense: Shape) -> Shape:
        """Fill what was left out from the dense shape."""
        shape = self
        if shape.num_key_value_heads is None and dense.num_key_value_heads == dense.num_attention_heads:
            shape = replace(shape, num_key_value_heads=shape.num_attention_heads)
        given = {name: size for name, size in asdict(shape).items() if size is not None}
        return replace(dense, **given)

    @property
    def heads_per_group(self) -> int:
        """
        Query heads per KV group.

        Raises:
            IllegalShapeError: if either number is left out.
        """
        if self.num_attention_heads is None or self.num_key_value_heads is None:
            raise IllegalShapeError(f"{self} leaves out its heads; call `complete(dense_shape)` on it first")
        return self.num_attention_heads // self.num_key_value_heads

    def sizes(self) -> dict[str, int]:
        """
        The sizes that a complete shape states, by name, in the order of `AXES`.

        Raises:
            IllegalShapeError: if one is left out.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        missing = [name for name, size in sizes.items() if size is None]
        if missing:
            raise IllegalShapeError(f"the shape leaves out {missing}; call `complete(dense_shape)` on it first")
        return sizes

    def to_dict(self) -> dict[str, int]:
        """The sizes that are given, for JSON."""
        return {name: size for name, size in asdict(self).items() if size is not None}

    @classmethod
    def from_dict(cls, sizes: Mapping[str, int]) -> Shape:
        """
        The inverse of `to_dict`.

        Raises:
            IllegalShapeError: on names that are not sizes of a shape.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(sizes) - set(allowed))
        if unknown:
            raise IllegalShapeError(f"unknown sizes {unknown} in a shape; known are {allowed}")
        return cls(**sizes)


@dataclass(frozen=True)
class SliceRule:
    """
    How one dimension of one parameter is made of units.

    Args:
        dim (`int`): the dimension.
        segments (`tuple[str, ...]`): the axes whose units follow each other along it.
        width (`int`): rows per unit.
        units (`tuple[tuple[int, ...], ...]`): instead of an order and a width, for each of the axes the unit of every
            row; -1: none of its.
        place (`str`): the module whose units these are, by its full dotted name, where they are none of a layer's own
            end (`Known.further`).
    """

    dim: int
    segments: tuple[str, ...]
    width: int
    units: tuple[tuple[int, ...], ...] = ()
    place: str = ""
