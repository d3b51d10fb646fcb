"""An anatomy for people: a table of axes, one of stacks, and what has to stay."""

from __future__ import annotations

from collections.abc import Sequence

from ..vanilla.family import FAMILIES
from .anatomy import INPUT, LOGITS, NORM, PARAMETER, Anatomy, Axis, Sizes, Stack
from .families import ungated

SOFT = {
    INPUT: "at the input of {}",
    PARAMETER: "on {}",
    LOGITS: "open or closed, at {}",
    NORM: "statistics of what stays in {}",
}
"""What a gate can do at a place: any value at an input, or on a weight; -infinity or nothing at logits."""

MOST, SHOWN = 10, 3
"""Sizes and places that are listed one by one."""


def table_of(anatomy: Anatomy) -> str:
    """What can be removed, what a soft gate can do there, and what has to stay with the reasons."""
    parts = [f"{anatomy.model_class} (model_type={anatomy.model_type})"]
    if anatomy.axes:
        head = ("width", "kind", "units", "sizes", "gates")
        parts.append(_aligned([head, *(_axis_row(axis) for axis in anatomy.axes)]))
    if anatomy.stacks:
        head = ("layers", "in", "count", "may go", "a layer's gate")
        parts.append(_aligned([head, *(_stack_row(stack) for stack in anatomy.stacks)]))
    stays = [f"  {each.field}: {each.reason}" for each in anatomy.refusals]
    stays += [f"  {stack.path}.{each.layer}: {each.reason}" for stack in anatomy.stacks for each in stack.pinned]
    if stays:
        parts.append("\n".join(["has to stay", *stays]))
    left = {} if anatomy.model_type in FAMILIES else ungated(anatomy)
    if left:
        parts.append("\n".join(["has no gates by default", *(f"  {name}: {why}" for name, why in left.items())]))
    return "\n\n".join(parts)


def _axis_row(axis: Axis) -> tuple[str, ...]:
    fields = " + ".join(number.field for number in axis.numbers) or axis.name
    notes = [f"with {axis.follows}"] if axis.follows else []
    notes += [f"equally many in each of {axis.groups} groups"] if axis.groups else []
    notes += ["the same everywhere"] if axis.tied else ["the same in all layers"] if axis.alike else []
    notes += [f"{field}={value} written" for field, value in axis.written]
    return fields, axis.kind, str(axis.units), sizes_told(axis.sizes), "; ".join([*gates_told(axis), *notes])


def gates_told(axis: Axis) -> list[str]:
    """Where the gates of an axis are, by the modules' names in a layer."""
    told = []
    for how, words in SOFT.items():
        names = list(dict.fromkeys(_short(place.parameter) for place in axis.places if place.how == how))
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            told.append(words.format(", ".join(names[:SHOWN]) + more))
    return told


def sizes_told(sizes: Sizes) -> str:
    """Numbers of units, in few words."""
    if isinstance(sizes, range) and len(sizes) > MOST:
        step = "" if sizes.step == 1 else f" in steps of {sizes.step}"
        return f"{sizes[0]} to {sizes[-1]}{step}"
    return ", ".join(map(str, sizes))


def _stack_row(stack: Stack) -> tuple[str, ...]:
    branches = dict.fromkeys(" + ".join(names) or "blends output and input" for names in stack.branches)
    return stack.field, stack.path, str(stack.count), free_told(stack), "; ".join(branches)


def free_told(stack: Stack) -> str:
    """Which layers may go, in few words."""
    if len(stack.free) == stack.count:
        return "all but one"
    stay = [pinned.layer for pinned in stack.pinned]
    return "none" if not stack.free else f"all but {', '.join(map(str, stay))}"


def _short(parameter: str) -> str:
    """A module's name within a layer; a raw parameter's own."""
    inside = parameter.partition(".*.")[2] or parameter
    return inside.removesuffix(".weight")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
