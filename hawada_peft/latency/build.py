"""
Measuring a latency table: which sizes are timed, and what is made of the times.

Long because each step chooses by what the one before has timed.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

from ..files.kept import Kept
from ..progress import Progress
from ..vanilla.shape import Shape
from .effort import Effort
from .fit import Observation, fit_costs
from .measuring import measure_built
from .regime import Regime
from .table import LatencyTable, Realised
from .timing import Timing, unsettled

logger = logging.getLogger(__name__)
Build = Callable[[Shape], nn.Module]

SLOWER = 1.03
"""A size counts as slower than the next aligned one from this ratio on."""

SMALLEST_FFN = 1 / 16
"""The smallest FFN that is timed, in parts of the dense one."""

ALIGNED = 8
"""FFN sizes are multiples of this wherever the dense size is: a slim model may be run on other devices, too."""

TABLE = "measuring the latency table"
"""What it is shown as."""

PROBES = (1, 2, 4, 8, 16)
"""How far below the dense FFN size the multiple is looked for, in the smallest multiple allowed."""


def build_table(
    build: Build,
    *,
    dense: Shape,
    heads: Sequence[Shape],
    base_sizes: Mapping[str, int | str],
    regime: Regime,
    ffn_unit: int = 1,
    multiple: int | None = None,
    effort: Effort,
    widest: Shape | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> LatencyTable:
    """
    Measure a table.

    Costs per layer are slopes: the same widths with few and with many layers. Sizes of the FFN are added where the
    cost bends. At the end random shapes are timed as a whole, and the estimate corrected by them.

    Args:
        build: makes a model of a complete shape with random weights, in the regime's dtype on its device.
        dense: the dense sizes, complete.
        heads: the (query heads, KV groups) that `build` can make.
        base_sizes: what the table is for: model type, hidden size, head size and dense sizes.
        regime: the conditions.
        ffn_unit: FFN sizes are multiples of it.
        multiple: the multiple below which they get slower on the device, if it is known.
        effort: what is measured, how long, and by which clock.
        widest: the sizes that the table's shapes are cut from, complete, if these are not the dense ones: those of a
            narrower residual stream. The dense model is timed beside them, as `dense_ms`.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        kept: where timings are kept as they come.

    Raises:
        InvalidRegimeError: if the model cannot run that way.
    """
    whole, dense = dense, widest or dense
    device_name = effort.clock.device_name(regime)
    started = time.perf_counter()
    many = min(dense.sizes()["num_hidden_layers"], effort.depth)
    few = max(1, many // 4)
    timer = partial(
        measure_built,
        build,
        regime=regime,
        effort=effort,
        progress=progress,
        kept=kept,
    )
    reference = replace(whole, num_hidden_layers=many)
    slopes = _Slopes(timer, reference, few)
    if multiple is None:
        multiple = find_multiple(slopes, dense, ffn_unit)
        logger.info("FFN sizes that are not a multiple of %d are slower on %s", multiple, device_name)

    pairs = [pair.complete(dense) for pair in choose_pairs(heads, effort.attention_sizes)]
    sizes = refine_sizes(slopes, dense, multiple, effort)
    # Small layers take less time, so they are known better in absolute terms; the corners tie everything together.
    quarter = min(sizes, key=lambda size: abs(4 * size - sizes[-1]))
    smallest = min(pairs, key=lambda shape: (shape.num_attention_heads or 0, shape.num_key_value_heads or 0))
    half = min(pairs, key=lambda shape: abs(2 * (shape.num_attention_heads or 0) - (dense.num_attention_heads or 0)))
    corners = [replace(pair, intermediate_size=size) for pair in (dense, smallest) for size in (sizes[-1], sizes[0])]
    slopes.add(
        [
            *corners,
            *(replace(pair, intermediate_size=quarter) for pair in pairs),
            *(replace(half, intermediate_size=size) for size in sizes),
        ],
        shallow=[*corners, replace(half, intermediate_size=quarter)],
    )
    groups = tuple(sorted({shape.num_key_value_heads or 1 for shape in pairs}))
    per_group = tuple(sorted({shape.heads_per_group for shape in pairs}))
    seen = [
        each
        for each in slopes.observations()
        if each.shape.sizes()["intermediate_size"] in sizes
        and (each.shape.hidden_size, each.shape.head_dim) == (dense.hidden_size, dense.head_dim)
    ]
    costs = fit_costs(seen, dense, groups, per_group, sizes)
    table = LatencyTable(
        regime=regime,
        device_name=device_name,
        base_sizes=dict(base_sizes),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        kv_groups=groups,
        heads_per_group=per_group,
        ffn_sizes=sizes,
        multiple=multiple,
        dense_ms=0.0,
        **vars(costs),
    )
    shapes = random_shapes(dense, heads, multiple, effort.whole_shapes, seed=effort.seed)
    slopes.add_whole([whole, dense, *shapes])
    table = replace(table, dense_ms=slopes.times[whole])
    table = table.with_realised([Realised(shape, slopes.times[shape]) for shape in (dense, *shapes)])
    table = replace(
        table,
        seconds=time.perf_counter() - started,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        unsettled=unsettled(slopes.timings, effort),
    )
    logger.info("%s in %.0f s", table, table.seconds)
    return table


class _Slopes:
    """Times by shape, at two depths; what a layer of given widths costs follows from them."""

    def __init__(self, timer: Callable[..., dict[Shape, Timing]], reference: Shape, few: int) -> None:
        self.timer, self.reference, self.few = timer, reference, few
        self.many = reference.sizes()["num_hidden_layers"]
        self.times: dict[Shape, float] = {}
        self.errors: dict[Shape, float] = {}
        self.timings: list[Timing] = []

    def deep(self, shape: Shape) -> Shape:
        return replace(shape, num_hidden_layers=self.many)

    def add(self, shapes: Sequence[Shape], shallow: Sequence[Shape] = ()) -> None:
        """Time the widths of some shapes with many layers, and those of `shallow` with few layers as well."""
        shapes = [self.deep(shape) for shape in shapes]
        self.add_whole([*shapes, *(replace(shape, num_hidden_layers=self.few) for shape in shallow)])

    def add_whole(self, shapes: Sequence[Shape]) -> None:
        """Time shapes as they are, unless they were timed before; on the scale of the reference's first timing."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.times]
        if not missing:
            return
        timings = self.timer(missing, reference=self.reference, label=TABLE)
        self.timings += timings.values()
        scale = self.times.get(self.reference, timings[self.reference].median_ms) / timings[self.reference].median_ms
        self.times |= {shape: timing.median_ms * scale for shape, timing in timings.items()}
        self.errors |= {shape: timing.error for shape, timing in timings.items()}

    def observations(self) -> list[Observation]:
        """Everything that was timed."""
        return [Observation(shape, ms, self.errors[shape]) for shape, ms in self.times.items()]


def find_multiple(slopes: _Slopes, dense: Shape, unit: int) -> int:
    """
    The multiple below which FFN sizes get slower: the smallest power of two (times `unit`) such that the dense size
    less that multiple, and less every larger one probed, runs no slower than the dense size.
    """
    ffn = dense.sizes()["intermediate_size"]
    least = least_multiple(dense, unit)
    steps = [least * probe for probe in PROBES if least * probe * 8 <= ffn]
    if not steps:
        return least
    probes = {step: replace(dense, intermediate_size=ffn - step) for step in steps}
    slopes.add([dense, *probes.values()])
    limit = SLOWER * slopes.times[slopes.deep(dense)]
    good = steps[-1]
    for step in reversed(steps):
        deep = slopes.deep(probes[step])
        if slopes.times[deep] * (1 - 2 * slopes.errors[deep]) > limit:
            break
        good = step
    return good


def least_multiple(dense: Shape, unit: int) -> int:
    """What FFN sizes are multiples of on any device: of `unit`, and of `ALIGNED` as far as the dense size is."""
    return math.lcm(unit, math.gcd(dense.sizes()["intermediate_size"], ALIGNED))


def refine_sizes(slopes: _Slopes, dense: Shape, multiple: int, effort: Effort) -> tuple[int, ...]:
    """FFN sizes to interpolate between: evenly spaced ones, and more of them where the cost bends."""
    ffn = dense.sizes()["intermediate_size"]

    def at(size: int) -> Shape:
        return replace(dense, intermediate_size=size)

    def cost(size: int) -> float:
        return slopes.times[slopes.deep(at(size))]

    steps = (SMALLEST_FFN, *np.linspace(1 / 8, 1, min(8, effort.ffn_sizes - 1)))
    sizes = sorted({*(max(1, round(part * ffn / multiple)) * multiple for part in steps), ffn})
    sizes = [size for size in sizes if size <= ffn]
    slopes.add([at(size) for size in sizes])
    intervals = list(itertools.pairwise(sizes))
    while intervals and len(sizes) < effort.ffn_sizes:
        middles = {}
        for low, high in intervals:
            middle = round((low + high) / 2 / multiple) * multiple
            if low < middle < high:
                middles[middle] = (low, high)
        chosen = dict(list(middles.items())[: effort.ffn_sizes - len(sizes)])
        slopes.add([at(size) for size in chosen])
        intervals = []
        for middle, (low, high) in chosen.items():
            straight = cost(low) + (cost(high) - cost(low)) * (middle - low) / (high - low)
            noise = 2 * slopes.errors[slopes.deep(at(middle))]
            if abs(cost(middle) / straight - 1) > effort.bend + noise:
                intervals += [(low, middle), (middle, high)]
        sizes = sorted({*sizes, *chosen})
    return tuple(sizes)


def choose_pairs(heads: Sequence[Shape], most: int) -> list[Shape]:
    """The (query heads, KV groups) to time: all, or an even choice of the KV group counts with the ends kept."""
    pairs = list(heads)
    counts = sorted({pair.num_key_value_heads or 1 for pair in pairs})
    while len(pairs) > most and len(counts) > 2:
        counts = [count for index, count in enumerate(counts) if index % 2 == 0 or index == len(counts) - 1]
        pairs = [pair for pair in heads if pair.num_key_value_heads in counts]
    return pairs


def random_shapes(dense: Shape, heads: Sequence[Shape], multiple: int, count: int, *, seed: int) -> list[Shape]:
    """
    Random shapes that can be built: at least a quarter of the layers and of the FFN, any of the heads; never the dense
    one.
    """
    rng = np.random.default_rng(seed)
    sizes = dense.sizes()
    layers = range(max(1, sizes["num_hidden_layers"] // 4), sizes["num_hidden_layers"] + 1)
    ffn = range(
        multiple * max(1, sizes["intermediate_size"] // 4 // multiple), sizes["intermediate_size"] + 1, multiple
    )
    shapes: dict[Shape, None] = {}
    for _ in range(50 * count):
        pair = heads[int(rng.integers(len(heads)))]
        shape = replace(
            pair,
            intermediate_size=int(rng.choice(np.array(ffn))),
            num_hidden_layers=int(rng.choice(np.array(layers))),
            hidden_size=dense.hidden_size,
            head_dim=dense.head_dim,
        )
        if shape != dense and len(shapes) < count:
            shapes[shape] = None
    return list(shapes)
