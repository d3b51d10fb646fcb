"""The reasons of a plan's sizes: asked of what rounds them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..gates.reading import UnitScores
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes, depth_of, head_shapes, least_layers
from ..vanilla.shape import Shape
from .rounding import Rounding
from .sizes import ffn_steps, hidden_multiple, hidden_steps, open_units, ratio_sizes

AS_ASKED = "as asked for"


def explained(
    layout: Layout,
    scores: UnitScores,
    shape: Shape,
    keep_ratio: float | Mapping[str, float] | None,
) -> tuple[Rounding, ...]:
    """
    What became of the sizes that a keep ratio, or without one the gates, asked for.

    Args:
        layout: the dense model's, with its class and config.
        scores: of its units.
        shape: what was chosen, complete.
        keep_ratio: as in `HawAdaModel.plan`.
    """
    asked: Mapping[str, float]
    if keep_ratio is None:
        names = layout.dense.to_dict() | ({} if scores.hidden is None else {"hidden_size": 0})
        names |= {"num_experts": 0} if any(score is not None for score in scores.experts) else {}
        opened = open_units(layout, scores)
        asked, source = {name: opened[name] for name in names}, "gates"
        rule = "the smallest size with room for all that is open in the layer where that is most"
    else:
        asked, source, rule = ratio_sizes(layout, keep_ratio), "keep ratio", "the nearest size"
    steps = {
        "intermediate_size": multiples(
            ffn_steps(layout.dense.sizes()["intermediate_size"], layout, scores.group_size)
        ),
    }
    if "hidden_size" in asked:
        causes = why_hidden(layout, asked["hidden_size"], scores.hidden_group)
        steps["hidden_size"] = "; ".join([multiples(hidden_steps(layout, scores.hidden_group)), *causes])
    if layout.stages or depth_of(layout).pinned:
        why = [f"layer {layer} stays ({reason})" for layer, reason in sorted(depth_of(layout).pinned.items())][:3]
        why += ["one stays before each stage of the backbone"] if layout.stages else []
        steps["num_hidden_layers"] = f"at least {least_layers(layout)}: {'; '.join(why)}"
    rules = dict.fromkeys(asked, rule)
    return roundings(layout, asked, shape, source, steps=steps, rules=rules)


def multiples(steps: Mapping[str, int]) -> str:
    """
    The step of a size in words.

    Args:
        steps: what it must be a multiple of, by the reason; those of 1 are left out.
    """
    parts = [f"{step} ({reason})" for reason, step in steps.items() if step > 1]
    return f"multiples of {math.lcm(*steps.values())}: {' and '.join(parts)}" if parts else "whole numbers"


def why_heads(layout: Layout, asked: float) -> str:
    """Why no shape has the whole number of query heads that is nearest to what was asked for; empty if one has."""
    count = min(layout.dense.sizes()["num_attention_heads"], max(1, math.floor(asked + 0.5)))
    pairs = [pair for pair in head_shapes(layout.dense) if pair.num_attention_heads == count]
    if not pairs:
        per_group = layout.dense.heads_per_group
        return f"{count} heads cannot be divided evenly over KV groups of at most {per_group} heads"
    found = [build_sizes(layout, pair.complete(layout.dense)) for pair in pairs]
    return "" if None in found else str(found[0])


def why_hidden(layout: Layout, asked: float, group_size: int) -> list[str]:
    """Why no model has the multiple of `hidden_multiple` that is nearest to what was asked for; empty if one has."""
    step = hidden_multiple(layout, group_size)
    size = max(1, math.floor(asked / step + 0.5)) * step
    found = build_sizes(layout, layout.narrowed(size)) if size < layout.hidden_size else None
    return [found] if found else []


def roundings(
    layout: Layout,
    asked: Mapping[str, float],
    shape: Shape,
    source: str,
    *,
    steps: Mapping[str, str],
    rules: Mapping[str, str],
) -> tuple[Rounding, ...]:
    """
    What became of the sizes that were asked for.

    Args:
        layout: the dense model's, with its class and config.
        asked: by the names of `Shape`; those left out were not asked for.
        shape: what was chosen, complete.
        source: who asked.
        steps: by name, which values there are to choose from.
        rules: by name, which of them is taken, in words.
    """
    sizes = layout.full.to_dict() | shape.to_dict()
    found = []
    for axis, wish in asked.items():
        chosen, rule = sizes[axis], rules[axis]
        if wish == chosen:
            reason = AS_ASKED
        elif axis == "num_attention_heads" and (cause := why_heads(layout, wish)):
            reason = f"{rule}; {cause}"
        else:
            reason = f"{rule}; {steps[axis]}" if axis in steps else rule
        found.append(Rounding(axis, float(wish), chosen, source, reason))
    return tuple(found)
