"""Every shape that may be chosen, as arrays: sizes, parameters, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..latency.regime import Regime
from ..planning.reasons import multiples
from ..planning.sizes import LEAST_ALIGNED, SIXTEENTHS, ffn_choices, hidden_multiple
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes, fit_hidden, head_shapes, least_layers, legal_head_shapes
from ..vanilla.resize import parameters_at
from ..vanilla.shape import FFN, HEADS, LAYERS, Shape

FIXED = "has no gates: stays as it is"
"""Why a size has one value."""


@dataclass(frozen=True)
class SearchSpace:
    """
    The shapes of a search: every combination of its axes. Arrays over it are (layers, heads, FFN sizes).

    Args:
        dense (`Shape`): the dense sizes, complete.
        layers (`tuple[int, ...]`): numbers of layers.
        heads (`tuple[Shape, ...]`): (query heads, KV groups).
        ffn (`tuple[int, ...]`): FFN sizes.
        parameters (`np.ndarray`): of the slim model, over the space.
        cache_bytes (`np.ndarray`): of its KV cache under the regime, over the space.
        weight_bytes (`int`): per parameter.
        hidden_size (`int`, *optional*): of all shapes, if it is not the dense one.
        head_dim (`int`, *optional*): likewise.
        steps (`dict[str, str]`): by size, which values there are to choose from, and why.
    """

    dense: Shape
    layers: tuple[int, ...]
    heads: tuple[Shape, ...]
    ffn: tuple[int, ...]
    parameters: np.ndarray
    cache_bytes: np.ndarray
    weight_bytes: int = 4
    hidden_size: int | None = None
    head_dim: int | None = None
    steps: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers) * len(self.heads) * len(self.ffn)

    @cached_property
    def memory(self) -> np.ndarray:
        """Bytes of weights and KV cache, over the space."""
        return self.parameters * self.weight_bytes + self.cache_bytes

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """KV groups, heads per group, FFN channels and layers, ready to broadcast over the space."""
        groups = np.array([shape.num_key_value_heads for shape in self.heads], dtype=float)[None, :, None]
        per_group = np.array([shape.heads_per_group for shape in self.heads], dtype=float)[None, :, None]
        ffn = np.array(self.ffn, dtype=float)[None, None, :]
        layers = np.array(self.layers, dtype=float)[:, None, None]
        return groups, per_group, ffn, layers

    def of_depth(self, least: int) -> SearchSpace:
        """The shapes of so many layers at least."""
        keep = [row for row, count in enumerate(self.layers) if count >= least]
        return replace(
            self,
            layers=tuple(self.layers[row] for row in keep),
            parameters=self.parameters[keep],
            cache_bytes=self.cache_bytes[keep],
        )

    def shape(self, index: int) -> Shape:
        """The shape at a position of the flattened space."""
        layer, pair, size = np.unravel_index(index, (len(self.layers), len(self.heads), len(self.ffn)))
        return replace(
            self.heads[pair],
            intermediate_size=self.ffn[size],
            num_hidden_layers=self.layers[layer],
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
        )

    def index(self, shape: Shape) -> int:
        """The inverse of `shape`."""
        pair = Shape(shape.num_attention_heads, shape.num_key_value_heads)
        place = (
            self.layers.index(shape.sizes()["num_hidden_layers"]),
            self.heads.index(pair),
            self.ffn.index(shape.sizes()["intermediate_size"]),
        )
        return int(np.ravel_multi_index(place, (len(self.layers), len(self.heads), len(self.ffn))))


def search_space(
    layout: Layout,
    regime: Regime,
    *,
    multiple: int = 1,
    group_size: int = 1,
    free: Sequence[str] = (HEADS, FFN, LAYERS),
    hidden_size: int | None = None,
    head_dim: int | None = None,
    untied: int = 0,
) -> SearchSpace:
    """
    The space of a model: what its class builds as asked.

    Args:
        layout: the dense model's, with its class and config.
        regime: for the size of weights and KV cache.
        multiple: FFN sizes are multiples of it: `LatencyTable.multiple`.
        group_size: and of this: the channels per gate.
        free: what may be cut.
        hidden_size: of all shapes; the dense one if left out.
        head_dim: of all shapes; the dense one if left out.
        untied: rows of an output projection that these models have and the dense one does not.
    """
    dense = layout.complete(replace(layout.narrowed(hidden_size), head_dim=head_dim))
    size = dense.sizes()["intermediate_size"]
    heads = legal_head_shapes(layout, hidden_size) if HEADS in free else [_pair(dense)]
    ffn: tuple[int, ...] = (size,)
    parts: dict[str, int] = {}
    if FFN in free:
        ffn, parts = ffn_choices(layout, dense, multiple=multiple, group_size=group_size)
    total = dense.sizes()["num_hidden_layers"]
    layers = tuple(range(least_layers(layout), total + 1)) if LAYERS in free else (total,)
    pairs = tuple(heads)
    tokens = regime.batch_size * regime.cached_tokens
    bytes_each = regime.torch_dtype.itemsize
    cache = (
        2.0 * tokens * (head_dim or layout.head_dim) * bytes_each * np.array([p.num_key_value_heads for p in pairs])
    )
    plain = replace(dense, num_hidden_layers=1)

    def first_two(shape: Shape) -> tuple[int, int]:
        """The parameters with one layer and with two."""
        one, two = (parameters_at(layout, replace(shape, num_hidden_layers=count)) for count in (1, 2))
        return one, two

    one, two = first_two(plain)
    low = first_two(replace(plain, intermediate_size=ffn[0]))
    channels = max(1, size - ffn[0])
    outer_channel = (2 * one - two - (2 * low[0] - low[1])) / channels  # of other stacks, where one number is of both
    per_channel = (two - one - (low[1] - low[0])) / channels
    least = first_two(min(pairs, key=lambda pair: pair.num_attention_heads or 0).complete(plain))
    alone = 2 * least[0] - least[1] == 2 * one - two
    per_pair = [
        (first, 2 * one - two) if alone else (first, 2 * first - second)
        for first, second in (
            (parameters_at(layout, p.complete(plain)), 0) if alone else first_two(p.complete(plain)) for p in pairs
        )
    ]
    count, width = np.array(layers, dtype=float)[:, None, None], np.array(ffn, dtype=float)[None, None, :]
    first, outer = np.array(per_pair, dtype=float).T[:, None, :, None]
    fixed = outer + outer_channel * (width - size) + untied * (dense.hidden_size or layout.hidden_size)
    layer = first - outer + per_channel * (width - size)
    return SearchSpace(
        dense=layout.dense,
        layers=layers,
        heads=pairs,
        ffn=ffn,
        parameters=fixed + count * layer,
        cache_bytes=np.broadcast_to(count * cache[None, :, None], (len(layers), len(pairs), len(ffn))),
        weight_bytes=bytes_each,
        hidden_size=dense.hidden_size,
        head_dim=dense.head_dim,
        steps={
            "num_attention_heads": f"{len(pairs)} of {len(head_shapes(layout.dense))} pairs of query heads and KV "
            f"groups are legal in {layout.model_class.__name__}"
            if HEADS in free
            else FIXED,
            "intermediate_size": multiples(parts) if FFN in free else FIXED,
            "num_hidden_layers": "whole layers" if LAYERS in free else FIXED,
        },
    )


def narrower_sizes(layout: Layout, *, multiple: int = 1, group_size: int = 1) -> list[int]:
    """
    The hidden sizes near `SIXTEENTHS` of the dense one that the model's class builds, the largest first.

    Args:
        layout: the dense model's, with its class and config.
        multiple: of the device (`LatencyTable.multiple`), as `sizes.hidden_multiple` takes it.
        group_size: channels per gate.
    """
    # Where there is an FFN unit the table's multiple is one of the hidden size itself.
    step = hidden_multiple(layout, group_size, 1 if layout.family.ffn_unit else multiple)
    wishes = [replace(layout.dense, hidden_size=max(1, round(part / 16 * layout.hidden_size))) for part in SIXTEENTHS]
    found = [layout.complete(fit_hidden(layout, wish, step=step)).hidden_size for wish in wishes]
    return sorted({size for size in found if size is not None}, reverse=True)


def narrower_heads(layout: Layout) -> list[int]:
    """
    Three, two and one quarter of the features of each head, as near as multiples of `LEAST_ALIGNED` come to that where
    heads are large enough; the largest first.

    Args:
        layout: the dense model's, with its class and config.
    """
    size = layout.head_dim
    step = math.gcd(LEAST_ALIGNED, size) if size >= 4 * LEAST_ALIGNED else 1
    found = {max(1, round(part * size / 4 / step)) * step for part in (3, 2, 1)}
    wanted = (replace(layout.dense, head_dim=each) for each in sorted(found - {size}, reverse=True))
    return [shape.head_dim for shape in wanted if shape.head_dim and build_sizes(layout, shape) is None]


def _pair(shape: Shape) -> Shape:
    return Shape(shape.num_attention_heads, shape.num_key_value_heads)
