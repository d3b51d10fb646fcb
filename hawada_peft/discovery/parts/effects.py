"""What each number of a config does to the parameters: it moves dimensions, adds or removes some, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..trial.builds import Builds, Moves
from ..trial.config_tree import Number, Path, left_out, numbers_of, value_at
from ..trial.specimen import Specimen

UNSET = 48
"""Tried for a number that the config leaves out."""


@dataclass(frozen=True)
class Effect:
    """
    What a number does.

    Args:
        value: it, now; what it stands for, where the config leaves it out.
        tried: the other value that showed it.
        moves: dimensions that moved with it; None if there are other parameters then.
    """

    value: Number
    tried: Number
    moves: Moves | None


def survey(specimen: Specimen) -> tuple[dict[Path, Effect], dict[Path, str]]:
    """
    Try other values of every number.

    Returns:
        Effects by path; and of numbers without one the reason: nothing is built, or nothing moves.
    """
    effects: dict[Path, Effect] = {}
    without: dict[Path, str] = {}
    builds = specimen.builds
    for path, value in numbers_of(builds.tree):
        found = _effect(builds, path, value)
        if isinstance(found, str):
            without[path] = found
        else:
            effects[path] = found
    for path in left_out(specimen.config):
        moves = builds.moves({path: UNSET})
        if path in effects or isinstance(moves, str):
            continue
        sizes = {moves[dim][0] for dim in specimen.reads(moves)}
        if len(sizes) == 1:
            effects[path] = Effect(sizes.pop(), UNSET, moves)
    return effects, without


def _effect(builds: Builds, path: Path, value: Number) -> Effect | str:
    why = "no other value is built"
    for tried in _others(path, value):
        shapes = builds.shapes({path: tried})
        if isinstance(shapes, str) and isinstance(tried, int) and tried < value:
            shortened = shortened_lists(builds.tree, path, value, tried)
            shapes = builds.shapes({path: tried} | shortened) if shortened else shapes
        if isinstance(shapes, str):
            why = shapes if why == "no other value is built" else why
            continue
        if shapes.keys() != builds.base.keys():
            return Effect(value, tried, None)
        moves = builds.moves({path: tried})
        if moves and not isinstance(moves, str):
            return Effect(value, tried, moves)
        why = "accepted, and nothing moves"
    return why


def _others(path: Path, value: Number) -> list[Number]:
    if isinstance(value, float):
        return [value / 2, value * 2]
    halves = [value // 2, value - 1, value * 2, value + 1]
    # A list has an entry for each stage: one layer more is always a stage.
    tried = [value + 1, value - 1, value * 2, value // 2] if isinstance(path[-1], int) and len(path) > 1 else halves
    return [each for each in dict.fromkeys(tried) if each > 0 and each != value]


def shortened_lists(tree: dict[str, Any], path: Path, value: Number, length: Number) -> dict[Path, Any]:
    """Lists beside a number that have as many entries as it says, with another number of them."""
    scope = value_at(tree, path[:-1])
    if not isinstance(scope, dict):
        return {}
    return {
        (*path[:-1], name): (list(entries) + list(entries[-1:]) * int(length))[: int(length)]
        for name, entries in scope.items()
        if isinstance(entries, list | tuple) and len(entries) == value and entries
    }
