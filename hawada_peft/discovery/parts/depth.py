"""Stacks of layers: which layers may go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..trial.builds import REFUSES, Dim, Shapes, cause, shapes_in
from ..trial.config_tree import Path
from ..trial.proof import ROUNDING, Cutting, Renaming, built_with, difference
from ..trial.specimen import Specimen
from .cuts import Cut
from .effects import Effect, shortened_lists

OTHER_KIND = "the class puts another kind of layer at that place"


@dataclass
class FoundStack:
    """
    A stack and what was found of it.

    Args:
        cut: what goes with layers.
        free: layers that may go.
        pinned: the others, with the reasons.
        per_layer: dimensions outside of the stack with a stretch of rows for each layer, and its width.
    """

    cut: Cut
    free: list[int] = field(default_factory=list)
    pinned: dict[int, str] = field(default_factory=dict)
    per_layer: dict[Dim, int] = field(default_factory=dict)


def find_stacks(specimen: Specimen, effects: dict[Path, Effect]) -> tuple[list[Cut], dict[str, str]]:
    """
    The lists of layers whose lengths numbers of the config are.

    Returns:
        With nothing but the number to change; and of other numbers that add or remove parameters, by path, why they
        are none.
    """
    found: dict[str, Cut] = {}
    reasons: dict[str, str] = {}
    for path, effect in effects.items():
        value, label = effect.value, ".".join(map(str, path))
        if effect.moves is not None or not isinstance(value, int):
            continue
        stack = _stack_of(specimen, path, value)
        if stack is None:
            reasons[label] = "adds or removes parameters, and those are no list of layers"
            continue
        try:
            module = specimen.model.get_submodule(stack)
        except AttributeError:
            continue
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) != value:
            reasons[label] = f"changes {stack}, which is no list of {value} layers"
        elif stack not in found:
            found[stack] = Cut(path, stack, value)
    return list(found.values()), reasons


def _stack_of(specimen: Specimen, path: Path, value: int) -> str | None:
    """What the names of parameters that come or go with a layer begin with."""
    builds = specimen.builds
    for count in (value - 1, value + 1):
        if count < 1:
            continue
        shortened = shortened_lists(builds.tree, path, value, count)
        for changes in (*([{path: count} | shortened] if shortened else []), {path: count}):
            shapes = builds.shapes(changes)
            if isinstance(shapes, str):
                continue
            other = [name.split(".") for name in set(builds.base) ^ set(shapes)]
            common = []
            for parts in zip(*other, strict=False):
                if len(set(parts)) > 1:
                    break
                common.append(parts[0])
            while common and not common[-1].isdigit():
                common.pop()
            if common:
                return ".".join(common[:-1])
    return None


def prove_layers(specimen: Specimen, cuts: Iterator[Cut]) -> FoundStack:
    """
    For every layer of a stack: does the model without it exist, and is it the one that skips it?

    Args:
        specimen: the model.
        cuts: ways to edit the config; the one with which most layers may go is taken.
    """
    best: FoundStack | None = None
    for cut in cuts:
        found = FoundStack(cut)
        for layer in range(cut.count):
            why = leave_out(specimen, found, [layer]) if cut.count > 1 else "it is the only one"
            if why is None:
                found.free.append(layer)
            else:
                found.pinned[layer] = why
        if best is None or len(found.free) > len(best.free):
            best = found
        if len(best.free) == cut.count:
            break
    if best is None:
        raise ValueError("a stack has at least one way to be cut")
    return best


def leave_out(specimen: Specimen, stack: FoundStack, layers: Sequence[int]) -> str | None:
    """Leave out some layers; None if the model without them is the one that skips them, else what was found."""
    cut = stack.cut
    keep = [layer for layer in range(cut.count) if layer not in set(layers)]
    changes, rename = cut.changes(specimen.builds.tree, keep), cut.renamed(keep)
    try:
        small = built_with(specimen, changes)
    except REFUSES as error:
        return cause(error)
    shapes = shapes_in(small)
    gone = tuple(f"{cut.stack}.{layer}." for layer in layers)
    if {rename(name) for name in shapes} != {name for name in specimen.base if not name.startswith(gone)}:
        return OTHER_KIND
    per_layer = _stretches(specimen, cut, shapes, rename, len(keep))
    if isinstance(per_layer, str):
        return per_layer
    rows = {
        (name, dim): [row for row in range(width * cut.count) if row // width in keep]
        for (name, dim), width in per_layer.items()
    }
    skipped = [f"{cut.stack}.{layer}" for layer in layers]
    try:
        found = difference(specimen, Cutting(changes=changes, renamed=rename, rows=rows, skipped=skipped), small)
    except REFUSES as error:
        return cause(error)
    if found >= ROUNDING:
        return f"without it the model computes something else than if it is skipped ({found:.1e})"
    stack.per_layer |= per_layer
    return None


def _stretches(specimen: Specimen, cut: Cut, shapes: Shapes, rename: Renaming, left: int) -> dict[Dim, int] | str:
    """The dimensions outside of the stack that hold rows for each layer; else what else has moved."""
    widths: dict[Dim, int] = {}
    for name, shape in shapes.items():
        whole = rename(name)
        old = specimen.base[whole]
        if old == shape:
            continue
        if len(old) != len(shape) or name.startswith(f"{cut.stack}."):
            return OTHER_KIND
        for dim, (before, after) in enumerate(zip(old, shape, strict=True)):
            if before == after:
                continue
            if before % cut.count or after != before // cut.count * left:
                return f"{whole} gets another size, and not by one stretch of rows for each layer"
            widths[whole, dim] = before // cut.count
    return widths
