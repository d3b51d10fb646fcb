"""What was cut, in words and numbers: for cards, pages and whatever else tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..vanilla.shape import BY_NAME, EXPERTS, FFN, HEAD_DIM, HEADS, HIDDEN, KV_GROUPS, LAYERS

_TOLD = (LAYERS, HEADS, KV_GROUPS, EXPERTS, FFN, HIDDEN, HEAD_DIM)

PLURALS = {BY_NAME[name].field: BY_NAME[name].plural for name in _TOLD}
"""The units of a `Shape` in words, in the order in which they are told."""

SIZES = PLURALS | {BY_NAME[HIDDEN].field: "hidden size"}
"""Its sizes."""

SHORT = {name: word.split()[0] for name, word in SIZES.items()} | {
    BY_NAME[HEADS].field: HEADS,
    BY_NAME[HEAD_DIM].field: "head size",
}
"""The same at the head of a column."""

BESIDE = "beside"
"""Where the sizes of further towers stand beside those of the first."""

EACH = (BY_NAME[HEADS].field, BY_NAME[EXPERTS].field, BY_NAME[FFN].field)
"""Sizes that every kept layer has."""


@dataclass(frozen=True)
class Cut:
    """
    One size before and after.

    Args:
        name (`str`): in words.
        dense (`int`, *optional*): before, if that is known.
        slim (`int`): after.
    """

    name: str
    dense: int | None
    slim: int

    @property
    def part(self) -> float | None:
        """What is left."""
        return self.slim / self.dense if self.dense else None


def cuts(dense: Mapping[str, Any], slim: Mapping[str, Any]) -> list[Cut]:
    """
    The sizes of two models, and their parameters where those are given.

    Args:
        dense, slim: the fields of a `Shape`, and `parameters`; what the slim model lacks is left out. Those
            of further towers stand under `beside`, by their names.
    """
    words = SIZES | {"parameters": "parameters"}
    found = [Cut(word, dense.get(name), slim[name]) for name, word in words.items() if name in slim]
    for tower, sizes in slim.get(BESIDE, {}).items():
        for cut in cuts(dense.get(BESIDE, {}).get(tower, {}), sizes):
            found.append(replace(cut, name=f"{cut.name} of {tower}"))
    return found


def sentence(dense: Mapping[str, Any], slim: Mapping[str, Any]) -> str:
    """
    What was cut, in one sentence.

    Args:
        dense, slim: as in `cuts`, with `parameters`.
    """
    gone = _gone(dense, slim)
    for tower, sizes in slim.get(BESIDE, {}).items():
        gone += [f"{each} of {tower}" for each in _gone(dense[BESIDE][tower], sizes)]
    what = f"{', '.join(gone[:-1])} and {gone[-1]}" if len(gone) > 1 else "".join(gone) or "nothing"
    left = f"{slim['parameters']:,} of {dense['parameters']:,} parameters stay"
    return f"Cut: {what}. {left} ({slim['parameters'] / dense['parameters']:.0%})."


def _gone(dense: Mapping[str, Any], slim: Mapping[str, Any]) -> list[str]:
    return [
        f"{dense[name] - slim[name]:,} of {dense[name]:,} {word}" + (" in every kept layer" if name in EACH else "")
        for name, word in PLURALS.items()
        if name != BY_NAME[KV_GROUPS].field and name in dense and dense[name] > slim[name]
    ]
