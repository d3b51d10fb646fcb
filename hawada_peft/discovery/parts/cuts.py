"""What of a config goes with layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..trial.builds import Shapes
from ..trial.config_tree import DESCRIPTIONS, LISTED_LAYERS, NOT_WIDTHS, REMOVED, Path, value_at
from ..trial.proof import Renaming
from ..trial.specimen import Specimen
from .effects import Effect
from .heads import HEADLIKE

DERIVED_FIELDS = ("out_features", "stage_names")
"""Fields of backbones that follow from others."""

COUNTS = re.compile("layers|depth")
"""Names of fields that count layers, and may say the same number again."""


@dataclass(frozen=True)
class Cut:
    """
    What of a config goes with layers; see `Stack`.

    Args:
        path: the number of layers.
        stack: the list's dotted name.
        count: layers.
        also: further numbers that count them.
        lists: with an entry for each layer.
        indices: lists of layers, counted from 0.
        stages: lists of layers, counted from 1.
        leading: how many of the first layers are of a kind.
        removed: fields that follow from others.
    """

    path: Path
    stack: str
    count: int
    also: tuple[Path, ...] = ()
    lists: tuple[Path, ...] = ()
    indices: tuple[Path, ...] = ()
    stages: tuple[Path, ...] = ()
    leading: tuple[Path, ...] = ()
    removed: tuple[Path, ...] = ()

    def changes(self, tree: dict[str, Any], keep: Sequence[int]) -> dict[Path, Any]:
        """The config's values with some layers left."""
        gone = [layer for layer in range(self.count) if layer not in set(keep)]
        made: dict[Path, Any] = dict.fromkeys((self.path, *self.also), len(keep))
        made |= {path: [value_at(tree, path)[layer] for layer in keep] for path in self.lists}
        for path in self.indices:
            listed = [layer for layer in value_at(tree, path) if layer not in gone]
            made[path] = [layer - sum(each < layer for each in gone) for layer in listed]
        for path in self.stages:
            listed = value_at(tree, path)
            made[path] = sorted({stage - sum(each < stage for each in gone) for stage in listed})
        for path in self.leading:
            first = value_at(tree, path)
            made[path] = first - sum(each < first for each in gone)
        return made | dict.fromkeys(self.removed, REMOVED)

    def renamed(self, keep: Sequence[int]) -> Renaming:
        """From names of the model with some layers left to those of the whole one."""
        before = self.stack + "."

        def rename(name: str) -> str:
            if not name.startswith(before):
                return name
            layer, _, rest = name[len(before) :].partition(".")
            return f"{before}{keep[int(layer)]}.{rest}" if int(layer) < len(keep) else name

        return rename


def cuts_of(specimen: Specimen, cut: Cut, effects: dict[Path, Effect]) -> Iterator[Cut]:
    """Ways to edit the config with layers of a stack, the most likely first."""
    tree = specimen.builds.tree
    scope = cut.path[:-1]
    own: dict[str, Any] = value_at(tree, scope[:-1] if isinstance(cut.path[-1], int) else scope)
    if isinstance(cut.path[-1], int):
        yield replace(cut, removed=_derived(own, scope[:-1]))
        return
    also = tuple(
        (*scope, name)
        for name, value in own.items()
        if value == cut.count and name != cut.path[-1] and isinstance(value, int) and not isinstance(value, bool)
        if COUNTS.search(name) and (*scope, name) not in effects
    )
    lists = tuple(
        (*scope, name)
        for name, value in own.items()
        if isinstance(value, list | tuple) and len(value) == cut.count and name not in DESCRIPTIONS
        if not LISTED_LAYERS.search(name)
    )
    listed = tuple(
        (*scope, name)
        for name, value in own.items()
        if isinstance(value, list | tuple) and value and LISTED_LAYERS.search(name)
        if all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    )
    leading = tuple(_leading(specimen, cut, own))
    plain = replace(cut, also=also, removed=_derived(own, scope))
    for some in dict.fromkeys((lists, ())):
        for indices, stages in dict.fromkeys(((listed, ()), ((), listed), ((), ()))):
            for first in dict.fromkeys((leading, ())):
                yield replace(plain, lists=some, indices=indices, stages=stages, leading=first)


def _derived(own: dict[str, Any], scope: Path) -> tuple[Path, ...]:
    return tuple((*scope, name) for name in DERIVED_FIELDS if name in own)


def _leading(specimen: Specimen, cut: Cut, own: dict[str, Any]) -> Iterator[Path]:
    """Numbers up to the number of layers that change which parameters there are."""
    base = specimen.builds.base.keys()
    for name, value in own.items():
        path = (*cut.path[:-1], name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= cut.count or path == cut.path:
            continue
        if NOT_WIDTHS.search(name) or HEADLIKE.search(name):
            continue
        for other in (value - 1, value + 1):
            shapes = specimen.builds.shapes({path: other})
            if not isinstance(shapes, str) and shapes.keys() != base:
                inside = all(each.startswith(f"{cut.stack}.") for each in shapes.keys() ^ base)
                if inside and len(_layers(shapes, cut.stack)) == cut.count:
                    yield path
                break


def _layers(shapes: Shapes, stack: str) -> set[str]:
    before = f"{stack}."
    return {name[len(before) :].partition(".")[0] for name in shapes if name.startswith(before)}
