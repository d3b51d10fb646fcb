"""Few layers instead of many: one of each kind, and which of them each layer is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .parts.cuts import Cut, cuts_of
from .parts.depth import find_stacks
from .parts.effects import Effect
from .trial.config_tree import Path, numbers_of, value_at
from .trial.specimen import Specimen

LONG, LEAST = 6, 3
"""Stacks of more layers are shortened, to so many at least."""


@dataclass(frozen=True)
class Short:
    """
    One stack's few layers.

    Args:
        cut: how the config is edited.
        keep: the layers that stay.
        like: for each layer the index in `keep` of the one that it is like.
    """

    cut: Cut
    keep: tuple[int, ...]
    like: tuple[int, ...]


@dataclass
class Shortened:
    """The stacks that are shortened."""

    stacks: list[Short] = field(default_factory=list)

    def changes(self, tree: dict[str, Any]) -> dict[Path, Any]:
        """The config's values with few layers."""
        made: dict[Path, Any] = {}
        for short in self.stacks:
            made |= short.cut.changes(tree, short.keep)
        return made

    def like(self, stack: str, count: int) -> tuple[int, ...]:
        """For each layer of a stack the short model's that it is like."""
        found = next((short.like for short in self.stacks if short.cut.stack == stack), None)
        return tuple(range(count)) if found is None else found


def shorten(deep: Specimen) -> Shortened:
    """
    Leave out layers that are like others, where a stack is long.

    Args:
        deep: a model with all layers.
    """
    lengths = {len(module) for module in deep.model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    long = {length for length in lengths if length > LONG}
    effects = {path: Effect(value, value, None) for path, value in numbers_of(deep.builds.tree) if value in long}
    if not effects:
        return Shortened()
    cuts, _ = find_stacks(deep, effects)
    shortened = Shortened()
    for cut in cuts:
        short = next((short for short in _shorts(deep, cut, effects) if _is_built(deep, short, shortened)), None)
        if short is not None:
            shortened.stacks.append(short)
    return shortened


def _shorts(deep: Specimen, cut: Cut, effects: dict[Path, Effect]) -> Iterator[Short]:
    """Ways to shorten a stack: one layer of each kind, or the first layers until all kinds are there."""
    seen = set()
    for way in cuts_of(deep, cut, effects):
        kinds = _kinds(deep, way)
        firsts = sorted(set(kinds))
        if len(firsts) > cut.count // 2:
            continue
        some = {*firsts, cut.count - 1}
        more = [layer for layer in range(cut.count) if layer not in some][: max(0, LEAST - len(some))]
        for keep in (tuple(sorted({*some, *more})), tuple(range(max(LEAST, firsts[-1] + 1)))):
            if (way, keep) not in seen:
                seen.add((way, keep))
                yield Short(way, keep, tuple(keep.index(kind) for kind in kinds))


def _kinds(deep: Specimen, cut: Cut) -> list[int]:
    """
    For each layer the first one of its kind: with the same parameters, the same entries in lists, named in the same
    lists.
    """
    tree = deep.builds.tree
    first: dict[str, int] = {}
    kinds = []
    for layer in range(cut.count):
        own = deep.told(f"{cut.stack}.{layer}")
        entries = [value_at(tree, path)[layer] for path in cut.lists]
        named = [layer in value_at(tree, path) for path in cut.indices]
        named += [layer + 1 in value_at(tree, path) for path in cut.stages]
        kinds.append(first.setdefault(repr((own, entries, named)), layer))
    return kinds


def _is_built(deep: Specimen, short: Short, before: Shortened) -> bool:
    """Whether the class builds just the layers that stay."""
    changes = before.changes(deep.builds.tree) | short.cut.changes(deep.builds.tree, short.keep)
    shapes = deep.builds.shapes(changes)
    if isinstance(shapes, str):
        return False
    stack = f"{short.cut.stack}."
    rename = short.cut.renamed(short.keep)
    stays = tuple(f"{stack}{layer}." for layer in short.keep)
    inside = {rename(name): shape for name, shape in shapes.items() if name.startswith(stack)}
    return inside == {name: shape for name, shape in deep.base.items() if name.startswith(stays)}


def at_full_depth(cut: Cut, tree: dict[str, Any], count: int) -> Cut:
    """What goes with layers of the whole stack, from what goes with those of the short one."""

    def listed(path: Path) -> bool:
        return len(value_at(tree, path)) == count

    return replace(
        cut,
        count=count,
        also=tuple(path for path in cut.also if value_at(tree, path) == count),
        lists=tuple(path for path in cut.lists if listed(path)),
    )


@dataclass(frozen=True)
class Layers:
    """
    Which layers of the large model are like those of the small one.

    Args:
        like: for each stack by its dotted name, for each large layer the small one.
    """

    like: Mapping[str, Sequence[int]]

    def template(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A small model's name with `*` for the layer, and the large layers that are like it."""
        for stack, like in self.like.items():
            if name.startswith(f"{stack}."):
                layer, _, rest = name[len(stack) + 1 :].partition(".")
                alike = tuple(large for large, small in enumerate(like) if small == int(layer))
                return f"{stack}.*.{rest}", alike
        return name, ()
