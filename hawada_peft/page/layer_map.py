"""A picture of the dense layers: which heads and channels stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..planning.plan import Plan
from ..vanilla.shape import FFN, HEADS
from .drawing import COLOURS, Picture, picture_of
from .known import SlimFacts

BINS = 12
"""Neighbouring FFN channels are shown together, in so many parts at most."""


def kept(facts: SlimFacts) -> Picture | None:
    """A map of the dense layers: which heads and channels stay."""
    plan = facts.plan
    if plan is None:
        return None
    sizes = plan.dense.sizes()
    count = sizes["num_hidden_layers"]
    rows = {
        "heads, by KV group": [_group_parts(plan, layer) for layer in range(count)],
        "FFN channels, in order": [_bin_parts(plan, layer) for layer in range(count)],
    }

    def draw(figure: Any) -> None:
        for number, (axes, (title, parts)) in enumerate(
            zip(figure.subplots(1, 2, sharey=True), rows.items(), strict=True)
        ):
            _map(axes, parts)
            axes.set_title(title, fontsize=10, color=COLOURS["ink"])
            if number == 0:
                axes.set_ylabel("dense layer")

    gone = [layer for layer in range(count) if layer not in plan.layers]
    text = (
        f"Map of {count} dense layers, the fuller a cell the more of it stays. Dropped layers: "
        f"{', '.join(map(str, gone)) or 'none'}. Every other layer keeps {plan.shape.num_attention_heads} of "
        f"{sizes['num_attention_heads']} query heads and {plan.shape.intermediate_size} of "
        f"{sizes['intermediate_size']} FFN channels."
    )
    return picture_of("kept", text, draw, min(9.0, 1.3 + 0.24 * count))


def _map(axes: Any, parts: Sequence[Sequence[float] | None]) -> None:
    """Rows of cells, filled as much as stays; None is a layer that is gone."""
    from matplotlib.patches import Rectangle

    columns = max(len(row) for row in parts if row is not None)
    for layer, row in enumerate(parts):
        if row is None:
            axes.add_patch(
                Rectangle((0, layer - 0.4), columns, 0.8, fill=False, edgecolor=COLOURS["line"], linewidth=1)
            )
            axes.text(columns / 2, layer, "dropped", ha="center", va="center", fontsize=8, color=COLOURS["muted"])
            continue
        for column, part in enumerate(row):
            axes.add_patch(
                Rectangle((column + 0.05, layer - 0.4), 0.9, 0.8, facecolor=COLOURS["line"], alpha=0.45, linewidth=0)
            )
            axes.add_patch(
                Rectangle((column + 0.05, layer - 0.4), 0.9, 0.8, facecolor=COLOURS["first"], alpha=part, linewidth=0)
            )
    axes.set_xlim(0, columns)
    axes.set_ylim(len(parts) - 0.5, -0.5)
    every = max(1, -(-len(parts) // 16))
    axes.set_yticks(range(0, len(parts), every))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _group_parts(plan: Plan, layer: int) -> list[float] | None:
    """What of each KV group's heads stays."""
    heads = plan.kept(HEADS, layer)
    if heads is None:
        return None
    size = plan.dense.heads_per_group
    return [sum(h // size == group for h in heads) / size for group in range(plan.dense.num_key_value_heads or 1)]


def _bin_parts(plan: Plan, layer: int) -> list[float] | None:
    """What of each part of the FFN's channels stays."""
    channels = plan.kept(FFN, layer)
    if channels is None:
        return None
    total = plan.dense.sizes()["intermediate_size"]
    bins = min(BINS, total)
    ends = [total * place // bins for place in range(bins + 1)]
    return [sum(a <= c < b for c in channels) / (b - a) for a, b in pairwise(ends)]
