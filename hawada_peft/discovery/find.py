"""The anatomy of a class and config: found on a tiny copy, proved there, and said of the large one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .all_layers import prove_all
from .anatomy import EXPERTS, Anatomy, Axis, PerLayer, Pinned, Refusal, Stack
from .parts.depth import FoundStack
from .scale import Large
from .shortened import Layers, Shortened, at_full_depth, shorten
from .study import Study, study_of
from .trial.builds import Builds
from .trial.config_tree import CHOSEN_EXPERTS, Path, dotted, edited, value_at
from .trial.specimen import Specimen
from .twin import shrunk


def find_anatomy(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, inputs: Mapping[str, Any] | None = None
) -> Anatomy:
    """
    Find and prove what can be removed.

    Args:
        model_class: of transformers.
        config: the real one; left as it is.
        inputs: example inputs of a tiny copy by name, where they cannot be guessed.

    Raises:
        UnsupportedModelError: if no tiny copy of the model runs, or it gives nothing that can be compared.
    """
    return anatomy_of(model_class, config, inputs)[0]


def anatomy_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, inputs: Mapping[str, Any] | None = None
) -> tuple[Anatomy, Study]:
    """As `find_anatomy`, with what was found of the tiny copy."""
    deep = _deep(model_class, config, inputs)
    short = shorten(deep)
    few = deep
    if short.stacks:
        few = Specimen(model_class, edited(deep.config, short.changes(deep.builds.tree)), inputs)
    found = study_of(few)
    thin = Builds(model_class, edited(config, short.changes(config.to_dict())) if short.stacks else config)
    layers = Layers({stack.cut.stack: short.like(stack.cut.stack, stack.cut.count) for stack in found.stacks})
    axes, reasons = _axes(found, thin, layers)
    anatomy = Anatomy(
        model_class=model_class.__name__,
        model_type=config.model_type,
        axes=tuple(axes),
        stacks=tuple(_stack(found, stack, deep, short) for stack in found.stacks),
        refusals=tuple(Refusal(field, reason) for field, reason in (found.reasons | reasons).items()),
    )
    return anatomy, found


def _deep(model_class: type[PreTrainedModel], config: PreTrainedConfig, inputs: Mapping[str, Any] | None) -> Specimen:
    """A model with small numbers and all layers that runs."""
    first: UnsupportedModelError | None = None
    for small in shrunk(model_class, config):
        try:
            return Specimen(model_class, small, inputs)
        except UnsupportedModelError as error:
            first = first or error
    raise first or UnsupportedModelError(
        f"no small {model_class.__name__} is built from this config, on which anything could be proved: its numbers "
        "cannot be made smaller in step"
    )


def _axes(found: Study, thin: Builds, layers: Layers) -> tuple[list[Axis], dict[str, str]]:
    """The axes at their large sizes, and the reasons why some have none."""
    axes: list[Axis] = []
    reasons: dict[str, str] = {}
    larges = [Large(found.specimen, axis, thin, layers) for axis in found.axes]
    for large in larges:
        outer = (each for each in larges if each.found.grouped(large.found))
        groups = next((each.units for each in outer), large.found.groups)
        least, step = _experts(large) if large.found.kind == EXPERTS else (1, 1)
        made = large.axes(groups, least, step)
        if isinstance(made, str):
            reasons[large.found.label] = made
        else:
            axes += made
    return axes, reasons


def _experts(large: Large) -> tuple[int, int]:
    """The fewest experts with which the large model runs, and in what steps, by those of the small one."""
    small, path = large.found, next(iter(large.found.numbers))
    step = math.gcd(*small.sizes, small.units)
    least = small.sizes[0]
    scope = value_at(large.specimen.builds.tree, path[:-1])
    chosen = [name for name, value in scope.items() if CHOSEN_EXPERTS.search(name) and value == least]
    more = large.units // small.units
    at_least = value_at(large.builds.tree, (*path[:-1], chosen[0])) if chosen else least * more
    return at_least, step * more if step > 1 else 1


def _stack(found: Study, few: FoundStack, deep: Specimen, short: Shortened) -> Stack:
    """A stack with all of its layers."""
    count = len(short.like(few.cut.stack, few.cut.count))
    like = short.like(few.cut.stack, few.cut.count)
    whole = few
    if deep is not found.specimen:
        whole = prove_all(deep, at_full_depth(few.cut, deep.builds.tree, count), like, few)
    cut = whole.cut

    def named(paths: tuple[Path, ...]) -> tuple[str, ...]:
        return tuple(dotted(path) for path in paths)

    return Stack(
        field=dotted(cut.path),
        path=cut.stack,
        count=count,
        free=tuple(whole.free),
        pinned=tuple(Pinned(layer, whole.pinned[layer]) for layer in sorted(whole.pinned)),
        branches=tuple(found.branches[f"{cut.stack}.{layer}"] for layer in like),
        also=named(cut.also),
        lists=named(cut.lists),
        indices=named(cut.indices),
        stages=named(cut.stages),
        leading=named(cut.leading),
        removed=named(cut.removed),
        per_layer=tuple(PerLayer(name, dim, width) for (name, dim), width in whole.per_layer.items()),
    )
