"""
From a keep ratio, or gates that are closed, to legal sizes.

Long because the steps of sizes are found here for all who choose them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InvalidPlanError
from ..gates.reading import UnitScores
from ..latency.build import SMALLEST_FFN
from ..vanilla.family import Layout
from ..vanilla.legality import build_sizes, fit_hidden, least_experts, least_layers
from ..vanilla.shape import BY_NAME, EXPERTS, FFN, HEADS, HIDDEN, LAYERS, Shape

PER_GROUP = "heads_per_group"
"""Query heads per KV group, beside the names of `Shape`."""


MOST_FFN_SIZES = 256
"""FFN sizes that are searched at most; finer steps than that change nothing that can be measured."""

OPEN = 0.5
"""A unit whose gate is below this is one that the gates ask to close."""


ALIGNMENT = "keeps the dense size's alignment"
"""Why a size that is chosen for the user keeps a power of two."""

LEAST_ALIGNED = 8
"""Hidden sizes stay multiples of it, if the dense one is: 16 bytes of 16-bit numbers, which matrix units want."""

SIXTEENTHS = range(15, 5, -1)
"""The hidden sizes that are chosen for the user, in sixteenths of the dense one, as near as the class allows."""


def ratio_shape(
    layout: Layout, keep_ratio: float | Mapping[str, float], legal_heads: Sequence[Shape], group_size: int
) -> Shape:
    """
    The legal shape nearest to a keep ratio; the hidden size is left to `legality.fit_hidden`.

    Heads: the nearest legal count; of equally near ones the larger, of equal counts that with more KV groups. FFN: the
    nearest multiple of `ffn_multiple`. Layers, hidden: the nearest count. At least one of each.

    Args:
        layout: the dense model's row and sizes.
        keep_ratio: kept over total, in (0, 1]: one number for heads and FFN, or one per axis (`"heads"`, `"ffn"`,
            `"layers"`, `"hidden"`).
        legal_heads: the (query heads, KV groups) to choose from.
        group_size: channels per gate.

    Raises:
        InvalidPlanError: on other axes or ratios.
    """
    asked, dense = ratio_sizes(layout, keep_ratio), layout.dense.sizes()
    target = asked.get("num_attention_heads", dense["num_attention_heads"])
    heads = min((shape.complete(layout.dense).sizes() for shape in legal_heads), key=lambda s: _distance(s, target))
    multiple = ffn_multiple(dense["intermediate_size"], layout, group_size)
    ffn = max(1, _round(asked.get("intermediate_size", dense["intermediate_size"]) / multiple)) * multiple
    hidden = asked.get("hidden_size", layout.hidden_size)
    experts = max(least_experts(layout), _round(asked.get("num_experts", layout.num_experts or 0)))
    return Shape(
        num_attention_heads=heads["num_attention_heads"],
        num_key_value_heads=heads["num_key_value_heads"],
        intermediate_size=min(ffn, dense["intermediate_size"]),
        num_hidden_layers=max(
            least_layers(layout), _round(asked.get("num_hidden_layers", dense["num_hidden_layers"]))
        ),
        hidden_size=max(1, _round(hidden)) if hidden < layout.hidden_size else None,
        num_experts=experts if experts < (layout.num_experts or 0) else None,
    )


def ratio_sizes(layout: Layout, keep_ratio: float | Mapping[str, float]) -> dict[str, float]:
    """
    The sizes that a keep ratio asks for, not rounded, by the names of `Shape`; what it does not name is left out.

    Args, Raises: as in `ratio_shape`.
    """
    if problems := ratio_problems(keep_ratio):
        raise InvalidPlanError("\n".join(problems))
    full, ratios = layout.full.to_dict(), _by_axis(keep_ratio)
    if EXPERTS in ratios and not layout.num_experts:
        raise InvalidPlanError(
            f"keep_ratio names experts, and the family row of model_type={layout.model_type!r} names no router"
        )
    return {BY_NAME[axis].field: ratio * full[BY_NAME[axis].field] for axis, ratio in ratios.items()}


def ratio_problems(keep_ratio: Any) -> list[str]:
    """What is wrong with a keep ratio, one line each."""
    ratios = _by_axis(keep_ratio)
    allowed = (HEADS, FFN, LAYERS, HIDDEN, EXPERTS)
    problems = [f"unknown axis {axis!r}; known are {list(allowed)}" for axis in ratios if axis not in allowed]
    problems += [
        f"keep_ratio of {axis} must be a number in (0, 1], got {ratio!r}"
        for axis, ratio in ratios.items()
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1
    ]
    if not ratios:
        problems.append(f"keep_ratio names no axis; give one number, or one per axis of {list(allowed)}")
    return problems


def _by_axis(keep_ratio: Any) -> dict[Any, Any]:
    return dict(keep_ratio) if isinstance(keep_ratio, Mapping) else {HEADS: keep_ratio, FFN: keep_ratio}


def open_shape(layout: Layout, scores: UnitScores, legal_heads: Sequence[Shape]) -> Shape:
    """
    The smallest legal shape with room for every unit whose score is at least `OPEN`, in every layer that stays; the
    hidden size is left to `legality.fit_hidden`.

    Args:
        layout: the dense model's row and sizes.
        scores: of its units; what is not gated counts as open.
        legal_heads: the (query heads, KV groups) to choose from.
    """
    dense, opened = layout.dense.sizes(), open_units(layout, scores)
    groups, per_kept = opened["num_key_value_heads"], opened[PER_GROUP]
    complete = [shape.complete(layout.dense) for shape in legal_heads]
    roomy = [
        s.sizes() for s in complete if s.heads_per_group >= per_kept and s.sizes()["num_key_value_heads"] >= groups
    ]
    heads = min(roomy, key=lambda s: s["num_attention_heads"])
    multiple = ffn_multiple(dense["intermediate_size"], layout, scores.group_size)
    hidden, experts = opened["hidden_size"], max(opened["num_experts"], least_experts(layout))
    if layout.family.heads_follow:
        hidden = max(hidden, opened["num_attention_heads"] * layout.head_dim)
    return Shape(
        num_attention_heads=heads["num_attention_heads"],
        num_key_value_heads=heads["num_key_value_heads"],
        intermediate_size=min(-(-opened["intermediate_size"] // multiple) * multiple, dense["intermediate_size"]),
        num_hidden_layers=max(opened["num_hidden_layers"], least_layers(layout)),
        hidden_size=hidden if hidden < layout.hidden_size else None,
        num_experts=experts if experts < (layout.num_experts or 0) else None,
    )


def open_units(layout: Layout, scores: UnitScores) -> dict[str, int]:
    """
    What the gates leave open, by the names of `Shape`, in that layer of those that stay where it is most; `PER_GROUP`
    is the most query heads in one KV group. At least 1 of each.
    """
    dense, per_group = layout.dense.sizes(), layout.dense.heads_per_group
    depth = [1.0 if score is None else float(score) for score in scores.layers]
    layers = [layer for layer, score in enumerate(depth) if score >= OPEN] or [depth.index(max(depth))]
    counted = ("num_attention_heads", "num_key_value_heads", PER_GROUP, "intermediate_size", "num_experts")
    most = dict.fromkeys(counted, 1)
    for layer in layers:
        opened = _opened(scores.heads[layer], dense["num_attention_heads"]).reshape(-1, per_group)
        here = {
            "num_attention_heads": opened.sum(),
            "num_key_value_heads": opened.any(1).sum(),
            PER_GROUP: opened.sum(1).max(),
            "intermediate_size": _opened(scores.channels[layer], dense["intermediate_size"]).sum(),
            "num_experts": _opened(scores.experts[layer] if scores.experts else None, layout.num_experts or 1).sum(),
        }
        most = {name: max(most[name], int(count)) for name, count in here.items()}
    hidden = max(1, int(_opened(scores.hidden, layout.hidden_size).sum()))
    return most | {"num_hidden_layers": len(layers), "hidden_size": hidden}


def ffn_multiple(dense_size: int, layout: Layout, group_size: int) -> int:
    """
    The step of FFN sizes that are chosen for the user.

    Misaligned sizes run slower than larger aligned ones, so a size keeps the power of two that divides the dense one,
    up to 64 and up to 1/16 of it. Families that state the size as a multiple of another field step by that field.
    """
    return math.lcm(*ffn_steps(dense_size, layout, group_size).values())


def ffn_steps(dense_size: int, layout: Layout, group_size: int) -> dict[str, int]:
    """What `ffn_multiple` is made of, by the reason."""
    unit = layout.family.ffn_unit
    steps = {ALIGNMENT: _aligned(dense_size), **size_steps(group_size, unit, layout.hidden_size if unit else 1)}
    return steps | _built_steps(layout)


def _built_steps(layout: Layout) -> dict[str, int]:
    """What the FFN sizes that the class was found to build are multiples of."""
    known = () if layout.facts is None else layout.facts.sizes.get(FFN, ())
    if isinstance(known, range):
        known = (known.start, known.start + known.step)
    return {"the class builds no others": math.gcd(*known)} if known and isinstance(known, tuple) else {}


def size_steps(group_size: int, unit: str | None, unit_size: int) -> dict[str, int]:
    """What every FFN size is a multiple of, by the reason: the channels per gate, and the family's unit."""
    return {"channels per gate": group_size} | (
        {f"the config states it in units of {unit}": unit_size} if unit else {}
    )


def ffn_choices(
    layout: Layout, dense: Shape, *, multiple: int, group_size: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """
    The FFN sizes that a search chooses from, the dense one last, and what they are multiples of, by the reason.

    Args:
        layout: the dense model's.
        dense: the widest sizes, complete; of another hidden size, perhaps.
        multiple: of the device: `LatencyTable.multiple`.
        group_size: channels per gate.
    """
    size, unit = dense.sizes()["intermediate_size"], layout.family.ffn_unit
    steps = {"other sizes are slower on this device": multiple}
    steps |= size_steps(group_size, unit, dense.hidden_size or layout.hidden_size if unit else 1) | _built_steps(
        layout
    )
    fine = step = math.lcm(*steps.values())
    while size // step > MOST_FFN_SIZES:
        step *= 2
    if step > fine:
        steps[f"at most {MOST_FFN_SIZES} sizes are searched"] = step
    smallest = max(1, round(SMALLEST_FFN * size / step)) * step
    found = tuple(range(smallest, size, step))
    if unit:
        found = tuple(f for f in found if build_sizes(layout, Shape(intermediate_size=f).complete(dense)) is None)
    return (*found, size), steps


def hidden_multiple(layout: Layout, group_size: int, multiple: int = 1) -> int:
    """
    The step of hidden sizes that are chosen for the user: aligned as FFN sizes are, as far as the class allows.

    Many classes want a multiple of the number of heads: with nine heads and a step of 32 every 288th size is one. So
    the step is halved, down to `LEAST_ALIGNED`, until there is a legal size near every sixteenth of the dense one.

    Args:
        layout: the dense model's, with its class and config.
        group_size: channels per gate.
        multiple: of the device: `LatencyTable.multiple`; halved as well.
    """
    return math.lcm(*hidden_steps(layout, group_size, multiple).values())


def hidden_steps(layout: Layout, group_size: int, multiple: int = 1) -> dict[str, int]:
    """What `hidden_multiple` is made of, by the reason."""
    widest = math.lcm(_aligned(layout.hidden_size), multiple)
    found = layout.once(("hidden step", widest, group_size), lambda: _hidden_step(layout, widest, group_size))
    return {ALIGNMENT: found, "channels per gate": group_size}


def _hidden_step(layout: Layout, widest: int, group_size: int) -> int:
    """The largest step with legal sizes near all sixteenths of the dense one; else that near most of them."""
    best, most = widest, -1
    for step in _halved(widest):
        near = sum(_is_near(layout, part, math.lcm(step, group_size)) for part in SIXTEENTHS)
        if near > most:
            best, most = step, near
        if near == len(SIXTEENTHS):
            break
    return best


def _halved(step: int) -> Iterator[int]:
    yield step
    while step % 2 == 0 and step > LEAST_ALIGNED:
        step //= 2
        yield step


def _is_near(layout: Layout, part: int, step: int) -> bool:
    """Whether a legal hidden size is as near to so many sixteenths of the dense one as the step allows."""
    wish = min(layout.hidden_size * part / 16, layout.hidden_size - step)
    shape = fit_hidden(layout, replace(layout.dense, hidden_size=max(1, _round(wish))), step=step)
    return abs((shape.hidden_size or layout.hidden_size) - wish) <= max(layout.hidden_size / 16, step) / 2


def _aligned(dense_size: int) -> int:
    aligned = math.gcd(dense_size, 64)
    while aligned > 1 and aligned * 16 > dense_size:
        aligned //= 2
    return aligned


def _distance(sizes: Mapping[str, int], target: float) -> tuple[float, int, int]:
    heads = sizes["num_attention_heads"]
    return abs(heads - target), -heads, -sizes["num_key_value_heads"]


def _opened(score: torch.Tensor | None, units: int) -> torch.Tensor:
    return torch.ones(units, dtype=torch.bool) if score is None else score >= OPEN


def _round(value: float) -> int:
    return math.floor(value + 0.5)
