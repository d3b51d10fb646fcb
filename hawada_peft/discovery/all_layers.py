"""Layers of the whole stack: what was found of few of them, tried on all."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .parts.cuts import Cut
from .parts.depth import FoundStack, leave_out
from .trial.specimen import Specimen

DRAWS = 2
"""Random halves of the layers that are left out, to see that what may go one by one may go together."""

FEW = 8
"""Up to so many layers each is left out alone."""

TOGETHER = "it may go alone, and not with others"


def prove_all(deep: Specimen, cut: Cut, like: Sequence[int], few: FoundStack) -> FoundStack:
    """
    Try on a model with all layers what was found of few.

    Args:
        deep: the model.
        cut: what of the config goes with layers, of the whole stack.
        like: for each layer the one of the few that it is like.
        few: what was found of those.
    """
    found = FoundStack(cut)
    hopeless = {kind: few.pinned[kind] for kind in set(like) if kind in few.pinned}
    hopeful = [layer for layer in range(cut.count) if like[layer] not in hopeless]
    alone = [layer for layer in range(cut.count) if like[layer] in hopeless]
    if len(alone) > FEW:
        hopeful, alone = list(range(cut.count)), []
    free = _free(deep, found, hopeful)
    for layer in alone:
        # Of a stack that was whole among the few, no other layer was left out for it.
        why = few.pinned[layer] if few.cut.count == cut.count else leave_out(deep, found, [layer])
        if why is None:
            free.append(layer)
        else:
            found.pinned[layer] = why
    free = sorted(free)
    if not _together(deep, found, free):
        free = _one_by_one(deep, found, free)
    found.free = free
    return found


def _free(deep: Specimen, found: FoundStack, layers: list[int]) -> list[int]:
    """Of some layers those that may go, by halves; the reasons of the others are noted."""
    count = found.cut.count
    some = layers[:-1] if len(layers) == count else layers
    if not some:
        return []
    why = leave_out(deep, found, some)
    if why is None:
        return some + (_free(deep, found, layers[-1:]) if len(some) < len(layers) else [])
    if len(layers) == 1:
        found.pinned[layers[0]] = why
        return []
    middle = len(layers) // 2
    return _free(deep, found, layers[:middle]) + _free(deep, found, layers[middle:])


def _together(deep: Specimen, found: FoundStack, free: list[int]) -> bool:
    """Whether random halves of the layers that may go may go at once."""
    generator = random.Random(0)
    for _ in range(DRAWS):
        some = sorted(generator.sample(free, len(free) // 2))
        if some and leave_out(deep, found, some) is not None:
            return False
    return True


def _one_by_one(deep: Specimen, found: FoundStack, layers: list[int]) -> list[int]:
    """Layers that may go alone, and with all of these before them."""
    free: list[int] = []
    for layer in reversed(layers):
        if len(free) + 1 == found.cut.count:
            continue
        why = leave_out(deep, found, [layer])
        if why is None:
            why = None if leave_out(deep, found, sorted([*free, layer])) is None else TOGETHER
        if why is None:
            free.append(layer)
        else:
            found.pinned[layer] = why
    return sorted(free)
