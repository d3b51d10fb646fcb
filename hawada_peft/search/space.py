"""Every shape that may be chosen, as arrays: sizes, parameters, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ..latency.build import SMALLEST_FFN
from ..latency.regime import Regime
from ..planning.reasons import multiples
from ..planning.sizes import hidden_multiple, size_steps
from ..vanilla.family import Layout, locate
from ..vanilla.legality import build_sizes, fit_hidden, head_shapes, legal_head_shapes
from ..vanilla.rehoming import has_twin, twin_skeleton
from ..vanilla.resize import edit_config
from ..vanilla.shape import Shape

HIDDEN = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Hidden sizes that are searched, in parts of the dense one. Each needs a latency table of its own."""

FIXED = "has no gates: stays as it is"
"""Why a size has one value."""

MOST_FFN_SIZES = 256
"""FFN sizes that are searched at most; finer steps than that change nothing that can be measured."""


@dataclass(frozen=True)
class SearchSpace:
    """
    The shapes of a search: every combination of its axes. Arrays over it are (layers, heads, FFN sizes).

    Args:
        dense (`Shape`): the dense sizes, complete.
        layers (`tuple[int, ...]`): numbers of layers.
        heads (`tuple[Shape, ...]`): (query heads, KV groups).
        ffn (`tuple[int, ...]`): FFN sizes.
        rehomed (`tuple[bool, ...]`): which of `heads` only the family's twin takes.
        parameters (`np.ndarray`): of the slim model, over the space.
        cache_bytes (`np.ndarray`): of its KV cache under the regime, over the space.
        weight_bytes (`int`): per parameter.
        hidden_size (`int`, *optional*): of all shapes, if it is not the dense one.
        steps (`dict[str, str]`): by size, which values there are to choose from, and why.
    """

    dense: Shape
    layers: tuple[int, ...]
    heads: tuple[Shape, ...]
    ffn: tuple[int, ...]
    rehomed: tuple[bool, ...]
    parameters: np.ndarray
    cache_bytes: np.ndarray
    weight_bytes: int = 4
    hidden_size: int | None = None
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

    def shape(self, index: int) -> Shape:
        """The shape at a position of the flattened space."""
        layer, pair, size = np.unravel_index(index, (len(self.layers), len(self.heads), len(self.ffn)))
        return replace(
            self.heads[pair],
            intermediate_size=self.ffn[size],
            num_hidden_layers=self.layers[layer],
            hidden_size=self.hidden_size,
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
    free: Sequence[str] = ("heads", "ffn", "layers"),
    allow_rehome: bool = False,
    hidden_size: int | None = None,
) -> SearchSpace:
    """
    The space of a model: what its class (or its family's twin) builds as asked.

    Args:
        layout: the dense model's, with its class and config.
        regime: for the size of weights and KV cache.
        multiple: FFN sizes are multiples of it: `LatencyTable.multiple`.
        group_size: and of this: the channels per gate.
        free: what may be cut.
        allow_rehome: also take heads that only the twin takes.
        hidden_size: of all shapes; the dense one if left out.
    """
    dense = layout.narrowed(hidden_size)
    size = dense.sizes()["intermediate_size"]
    heads = legal_head_shapes(layout, hidden_size) if "heads" in free else [_pair(dense)]
    twin = locate(twin_skeleton(layout)) if allow_rehome and "heads" in free and has_twin(layout) else None
    more = [] if twin is None else [pair for pair in legal_head_shapes(twin, hidden_size) if pair not in heads]
    unit = layout.family.ffn_unit
    parts = {"other sizes are slower on this device": multiple}
    parts |= size_steps(group_size, unit, dense.hidden_size or layout.hidden_size if unit else 1)
    fine = step = math.lcm(*parts.values())
    while size // step > MOST_FFN_SIZES:
        step *= 2
    if step > fine:
        parts[f"at most {MOST_FFN_SIZES} sizes are searched"] = step
    smallest = max(1, round(SMALLEST_FFN * size / step)) * step
    ffn = tuple(range(smallest, size, step)) if "ffn" in free else ()
    if layout.family.ffn_unit:
        ffn = tuple(f for f in ffn if build_sizes(layout, Shape(intermediate_size=f).complete(dense)) is None)
    ffn = (*ffn, size)
    total = dense.sizes()["num_hidden_layers"]
    layers = tuple(range(1, total + 1)) if "layers" in free else (total,)
    pairs = (*heads, *more)
    tokens = regime.batch_size * ((regime.seq_len or 0) + (regime.mode == "decode")) if regime.mode != "forward" else 0
    bytes_each = regime.torch_dtype.itemsize
    cache = 2.0 * tokens * layout.head_dim * bytes_each * np.array([p.num_key_value_heads for p in pairs])
    plain = replace(dense, num_hidden_layers=1)
    per_pair = [_parameters(layout if p in heads else twin or layout, p.complete(plain)) for p in pairs]
    one, two = (_parameters(layout, replace(plain, num_hidden_layers=count)) for count in (1, 2))
    low = _parameters(layout, replace(plain, intermediate_size=ffn[0]))
    per_channel = (one - low) / (size - ffn[0]) if len(ffn) > 1 else 0.0
    count, width = np.array(layers, dtype=float)[:, None, None], np.array(ffn, dtype=float)[None, None, :]
    fixed = 2 * one - two
    layer = np.array(per_pair, dtype=float)[None, :, None] - fixed + per_channel * (width - size)
    return SearchSpace(
        dense=layout.dense,
        layers=layers,
        heads=pairs,
        ffn=ffn,
        rehomed=(False,) * len(heads) + (True,) * len(more),
        parameters=fixed + count * layer,
        cache_bytes=np.broadcast_to(count * cache[None, :, None], (len(layers), len(pairs), len(ffn))),
        weight_bytes=bytes_each,
        hidden_size=dense.hidden_size,
        steps={
            "num_attention_heads": f"{len(pairs)} of {len(head_shapes(layout.dense))} pairs of query heads and KV "
            f"groups are legal in {layout.model_class.__name__}{f' or {twin.model_class.__name__}' if twin else ''}"
            if "heads" in free
            else FIXED,
            "intermediate_size": multiples(parts) if "ffn" in free else FIXED,
            "num_hidden_layers": "whole layers" if "layers" in free else FIXED,
        },
    )


def narrower_sizes(layout: Layout, *, multiple: int = 1, group_size: int = 1) -> list[int]:
    """
    A few hidden sizes below the dense one that the model's class builds, the largest first: the parts `HIDDEN` of it.

    Args:
        layout: the dense model's, with its class and config.
        multiple: sizes are multiples of it (`LatencyTable.multiple`), besides those of `rank.hidden_multiple`.
        group_size: channels per gate.
    """
    step = hidden_multiple(layout, group_size)
    if not layout.family.ffn_unit:  # otherwise the table's multiple is one of the hidden size itself
        step = math.lcm(step, multiple)
    wishes = [replace(layout.dense, hidden_size=max(1, round(part * layout.hidden_size))) for part in HIDDEN]
    found = [layout.complete(fit_hidden(layout, wish, step=step)).hidden_size for wish in wishes]
    return sorted({size for size in found if size is not None}, reverse=True)


def _pair(shape: Shape) -> Shape:
    return Shape(shape.num_attention_heads, shape.num_key_value_heads)


def _parameters(layout: Layout, shape: Shape) -> int:
    """Parameters of a model of these sizes, by building it on the meta device."""
    layers = (0,) * shape.sizes()["num_hidden_layers"]
    with torch.device("meta"):
        built = layout.model_class(edit_config(layout, shape, layers=layers))
    return built.num_parameters()
