"""
Everything that can be removed of one small model: found, proved alone and together.

Long because every step from the first change of a number to the last proof is called here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .anatomy import EXPERTS, FFN, HIDDEN, OTHER
from .parts.branches import find_branches
from .parts.cuts import Cut, cuts_of
from .parts.depth import FoundStack, find_stacks, prove_layers
from .parts.effects import Effect, survey
from .parts.heads import find_heads, head_numbers
from .parts.stream import find_stream, step_of
from .parts.widths import built_sizes, find_experts, find_width, is_stream
from .trial.builds import REFUSES, Dim, cause
from .trial.config_tree import Path, dotted
from .trial.found import Found
from .trial.proof import ROUNDING, Cutting, difference, draw, half, prove
from .trial.specimen import Specimen

FEW = 24
"""Up to so many units every number of them is tried."""

ODD = 37
"""A number of units that divides nothing."""


@dataclass
class Study:
    """
    What was found of a small model.

    Args:
        specimen: the model.
        axes: widths, each proved alone.
        stacks: lists of layers.
        branches: for each layer's dotted name the modules that a soft gate multiplies.
        reasons: of numbers that cannot be made smaller, by path or paths.
        errors: for each axis by its name, and `""` for all at once, the differences that were found.
    """

    specimen: Specimen
    axes: list[Found] = field(default_factory=list)
    stacks: list[FoundStack] = field(default_factory=list)
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def study_of(specimen: Specimen) -> Study:
    """Find and prove all axes and stacks of a small model."""
    found = Study(specimen)
    effects, without = survey(specimen)
    found.reasons |= {dotted(path): why for path, why in without.items() if why != "accepted, and nothing moves"}
    cuts, reasons = find_stacks(specimen, effects)
    stacks = [cut.stack for cut in cuts]
    for axis in _proposals(specimen, effects, stacks, found.reasons):
        _judge(found, axis, stacks)
    _name_kinds(found, effects, stacks)
    found.reasons |= {name: why for name, why in reasons.items() if name not in {axis.name for axis in found.axes}}
    for cut in cuts:
        _study_stack(found, cut, effects)
    _name_by_branches(found)
    _prove_together(found)
    return found


def _proposals(
    specimen: Specimen, effects: dict[Path, Effect], stacks: list[str], reasons: dict[str, str]
) -> list[Found]:
    found: list[Found] = []
    heads = head_numbers(specimen)
    for scope, paths in heads.items():
        axes, why = find_heads(specimen, scope, paths, effects, stacks)
        found += axes
        reasons |= why
    counted = {path for paths in heads.values() for path in paths}
    known: list[set[Dim]] = []
    for path, effect in effects.items():
        if path in counted or effect.moves is None or set(effect.moves) in known:
            continue
        try:
            axis = _proposal(specimen, path, effect, stacks)
        except REFUSES as error:
            axis = cause(error)
        if isinstance(axis, str):
            reasons[dotted(path)] = axis
        else:
            known.append(set(effect.moves))
            found.append(axis)
    return found


def _proposal(specimen: Specimen, path: Path, effect: Effect, stacks: list[str]) -> Found | str:
    moves = effect.moves or {}
    if is_stream(specimen, moves, stacks) and not isinstance(path[-1], int):
        return find_stream(specimen, path)
    experts = find_experts(specimen, path, effect.value, effect.tried, moves)
    if experts is not None:
        return experts
    return find_width(specimen, {path: effect.value}, effect.value, effect.tried, moves)


def _judge(found: Study, axis: Found, stacks: list[str]) -> None:
    """Take an axis in if it is proved, else the reason why not."""
    specimen = found.specimen
    try:
        axis.sizes = built_sizes(specimen, axis, _candidates(axis))
        if axis.kind == EXPERTS:
            axis.sizes = _enough(specimen, axis)
        if not axis.sizes:
            found.reasons[axis.label] = "no smaller size is built as asked"
            return
        error = prove(specimen, axis, stacks)
    except REFUSES as problem:
        found.reasons[axis.label] = cause(problem)
        return
    if error < ROUNDING:
        found.axes.append(axis)
        found.errors[axis.name] = error
    else:
        found.reasons[axis.label] = f"the smaller model computes something else ({error:.1e})"


def _candidates(axis: Found) -> list[int]:
    units = axis.units
    if axis.kind == HIDDEN:
        step = step_of(axis)
        sizes = {units // 4, units // 2, 3 * units // 4, units - step, units // 2 + step}
    elif units <= FEW:
        sizes = set(range(1, units))
    else:
        sizes = {units // 4, units // 2, 3 * units // 4, units - 1, ODD}
    return sorted(size for size in sizes if 0 < size < units)


def _enough(specimen: Specimen, axis: Found) -> list[int]:
    """Numbers of experts with which the model runs: not fewer than are chosen for a token, in whole groups."""
    return [size for size in axis.sizes if _runs(specimen, axis, size)]


def _runs(specimen: Specimen, axis: Found, size: int) -> bool:
    try:
        difference(specimen, Cutting(draw(axis, size, 3, tied=False), axis.changes(size)))
    except REFUSES:
        return False
    return True


def _name_kinds(found: Study, effects: dict[Path, Effect], stacks: list[str]) -> None:
    """An axis is of an FFN's kind where what reads its units writes into the residual stream of a layer."""
    specimen = found.specimen
    stream = {
        dim
        for each in effects.values()
        if each.moves and is_stream(specimen, each.moves, stacks)
        for dim in each.moves
    }
    inside = tuple(f"{stack}." for stack in stacks)
    for axis in found.axes:
        if axis.kind == "other" and any(
            name.startswith(inside) and any((name, other) in stream for other in range(3) if other != dim)
            for name, dim in axis.places
        ):
            axis.kind = FFN


def _name_by_branches(found: Study) -> None:
    """So is one whose units are read by what a layer's gate multiplies, where the stream itself was not found."""
    branches = {f"{layer}.{name}.weight" for layer, names in found.branches.items() for name in names}
    taken = {place for axis in found.axes if axis.kind != OTHER for place in axis.places}
    for axis in found.axes:
        at = [place for place in axis.places if place[0] in branches and place not in taken]
        if axis.kind == OTHER and at and all(found.specimen.input_dim(name) == dim for name, dim in at):
            axis.kind = FFN


def _study_stack(found: Study, cut: Cut, effects: dict[Path, Effect]) -> None:
    specimen = found.specimen
    stack = prove_layers(specimen, cuts_of(specimen, cut, effects))
    found.stacks.append(stack)
    known: dict[str, tuple[str, ...]] = {}
    for layer in range(cut.count):
        name = f"{cut.stack}.{layer}"
        like = specimen.told(name)
        if like not in known:
            known[like] = find_branches(specimen, name)
        found.branches[name] = known[like]


def _prove_together(found: Study) -> None:
    """Cut all at once; an axis that does not go with those before it is refused."""
    chosen, stacks = together(found)
    error = _at_once(found.specimen, chosen, stacks)
    if error >= ROUNDING:
        good: list[Found] = []
        for axis in chosen:
            if _at_once(found.specimen, [*good, axis], []) < ROUNDING:
                good.append(axis)
                continue
            others = ", ".join(each.name for each in good)
            found.axes.remove(axis)
            found.reasons[axis.label] = f"together with {others} the smaller model computes something else"
        error = _at_once(found.specimen, good, stacks)
    found.errors[""] = error


def together(found: Study) -> tuple[list[Found], list[FoundStack]]:
    """What is cut at once: every width but the residual stream, and a layer of every stack that can lose one."""
    chosen: list[Found] = []
    taken: set[Dim] = set()
    numbers: set[Path] = set()
    for axis in sorted(found.axes, key=lambda axis: -len(axis.rows)):
        changes = axis.changes(half(axis))
        if axis.kind == HIDDEN or taken & set(axis.places) or numbers & set(changes):
            continue
        chosen.append(axis)
        taken |= set(axis.places)
        numbers |= set(changes)
    return chosen, [stack for stack in found.stacks if stack.free]


def at_once(specimen: Specimen, axes: list[Found], stacks: list[FoundStack]) -> Cutting:
    """Half of every axis, and the middle one of the layers that may go of every stack."""
    cutting = Cutting()
    renames = []
    for axis in axes:
        units = half(axis)
        cutting.kept += draw(axis, units, 7, tied=axis.tied)
        cutting.changes |= axis.changes(units)
    for stack in stacks:
        layer = stack.free[len(stack.free) // 2]
        cut = stack.cut
        keep = [each for each in range(cut.count) if each != layer]
        cutting.changes |= cut.changes(specimen.builds.tree, keep)
        cutting.rows |= {
            (name, dim): [row for row in range(width * cut.count) if row // width in keep]
            for (name, dim), width in stack.per_layer.items()
        }
        cutting.skipped = [*cutting.skipped, f"{cut.stack}.{layer}"]
        renames.append(cut.renamed(keep))

    def rename(name: str) -> str:
        for each in renames:
            name = each(name)
        return name

    cutting.renamed = rename
    return cutting


def _at_once(specimen: Specimen, axes: list[Found], stacks: list[FoundStack]) -> float:
    try:
        return difference(specimen, at_once(specimen, axes, stacks))
    except REFUSES:
        return float("inf")
