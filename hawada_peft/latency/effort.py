"""How hard to measure and to search, and by which clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from .checks import is_number
from .clock import Clock


@dataclass(frozen=True)
class Effort:
    """
    How hard to measure and to search, and by which clock. The defaults take minutes; `Effort.quick()` takes seconds.

    Args:
        warmup (`int`): calls of a model before the first timed one.
        lead_in (`int`): untimed calls right before each timed one, so that caches hold what they hold when the model
            runs alone and not what another candidate left there. None precede calls that are so long that this makes
            no difference.
        min_rounds (`int`): timed calls of each candidate at least.
        max_rounds (`int`): and at most.
        max_seconds (`float`): no further round is begun after this time, once there are `min_rounds`.
        tolerance (`float`): a timer has settled when the relative standard error of its median is below this.
        attention_sizes (`int`): (KV groups, heads per group) pairs that are timed for a table, at most.
        ffn_sizes (`int`): FFN sizes, at most.
        bend (`float`): an interval of FFN sizes is halved where its middle is off the straight line by more than this
            part of a layer.
        whole_shapes (`int`): random shapes that are timed as a whole, to correct a table.
        depth (`int`): layers of the deeper of the two models that give a slope, at most.
        group (`int`): models in memory at a time.
        seed (`int`): of the random shapes.
        margin (`float`): how far below a budget a search stays, in parts of it; room for the spread of the timer.
        candidates (`int`): shapes that are built, timed and evaluated in the first round of a search; half as many in
            each later one.
        search_rounds (`int`): such rounds at most.
        instances (`int`): how often the dense model and the answer are built and timed side by side at the end. Models
            of one shape differ in speed by where their weights lie in memory; the median counts.
        cache (`str`, `Path` or `bool`): the folder of measured tables; `True` for the user's cache folder, `False` for
            none.
        fresh (`bool`): measure a table anew, even if there is one in the cache.
        clock (`Clock`): what times a call.

    Raises:
        HawAdaError: with every impossible number.

    Example:

        >>> Effort.quick(instances=3).narrower().ffn_sizes
        2
    """

    warmup: int = 3
    lead_in: int = 1
    min_rounds: int = 7
    max_rounds: int = 60
    max_seconds: float = 8.0
    tolerance: float = 0.01
    attention_sizes: int = 40
    ffn_sizes: int = 25
    bend: float = 0.01
    whole_shapes: int = 12
    depth: int = 8
    group: int = 8
    seed: int = 0
    margin: float = 0.01
    candidates: int = 4
    search_rounds: int = 12
    instances: int = 3
    cache: str | Path | bool = True
    fresh: bool = False
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise HawAdaError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        for name, least in LEAST.items():
            value: Any = getattr(self, name)
            whole = name not in ("max_seconds", "tolerance", "bend", "margin")
            if not is_number(value) or (whole and not isinstance(value, int)) or value < least:
                kind = "whole number" if whole else "number"
                yield f"effort: {name} must be a {kind} of at least {least}, got {value!r}"
            elif name in ("tolerance", "bend") and value == 0:
                yield f"effort: {name} must be above 0, got {value!r}"
            elif name == "margin" and value >= 0.5:
                yield f"effort: margin must be below 0.5, got {value!r}"
        rounds = self.min_rounds, self.max_rounds
        if all(isinstance(each, int) for each in rounds) and self.min_rounds > self.max_rounds:
            yield f"effort: min_rounds must not exceed max_rounds, got {self.min_rounds} and {self.max_rounds}"
        if not isinstance(self.clock, Clock):
            yield f"effort: clock must be a Clock, got {type(self.clock).__name__}"
        if not isinstance(self.cache, str | Path | bool) or not isinstance(self.fresh, bool):
            given = f"{self.cache!r} and {self.fresh!r}"
            yield f"effort: cache must be a folder, True or False, and fresh True or False, got {given}"

    @classmethod
    def quick(cls, **changes: Any) -> Effort:
        """
        A look in seconds: few sizes and shapes, each timed a few times. For examples and first tries.

        Args:
            changes: fields that differ from that.
        """
        return cls(**(QUICK | changes))

    @classmethod
    def thorough(cls, **changes: Any) -> Effort:
        """
        Several times as long as by default: for noisy machines, and budgets in which each percent counts.

        Args:
            changes: fields that differ from that.
        """
        return cls(**(THOROUGH | changes))

    def confirming(self) -> Effort:
        """How the shapes of a search are timed: longer than those of a table, as a budget hangs on each."""
        return replace(
            self,
            min_rounds=math.ceil(1.5 * self.min_rounds),
            max_rounds=math.ceil(5 / 3 * self.max_rounds),
            max_seconds=1.5 * self.max_seconds,
            tolerance=0.4 * self.tolerance,
        )

    def narrower(self) -> Effort:
        """What is measured for the table of a further hidden size: less."""
        return replace(
            self,
            attention_sizes=min(self.attention_sizes, 8),
            ffn_sizes=min(self.ffn_sizes, 5),
            whole_shapes=min(self.whole_shapes, 4),
        )

    def of_a_table(self) -> dict[str, Any]:
        """The fields that a measured table depends on."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name in TABLE}


TABLE = (
    "warmup", "lead_in", "min_rounds", "max_rounds", "max_seconds", "tolerance", "attention_sizes", "ffn_sizes",
    "bend", "whole_shapes", "depth", "group", "seed",
)  # fmt: skip
"""The fields that a measured table depends on."""

LEAST: dict[str, float] = {
    "warmup": 0,
    "lead_in": 0,
    "min_rounds": 1,
    "max_rounds": 1,
    "max_seconds": 0,
    "tolerance": 0,
    "attention_sizes": 2,
    "ffn_sizes": 2,
    "bend": 0,
    "whole_shapes": 0,
    "depth": 2,
    "group": 2,
    "seed": 0,
    "margin": 0,
    "candidates": 1,
    "search_rounds": 1,
    "instances": 1,
}
"""What each number is at least."""

QUICK: dict[str, Any] = {
    "warmup": 1,
    "min_rounds": 5,
    "max_rounds": 10,
    "max_seconds": 1.0,
    "tolerance": 0.05,
    "attention_sizes": 2,
    "ffn_sizes": 2,
    "whole_shapes": 0,
    "depth": 3,
    "candidates": 2,
    "search_rounds": 8,
    "instances": 1,
}
"""`Effort.quick`."""

THOROUGH: dict[str, Any] = {
    "min_rounds": 30,
    "max_rounds": 240,
    "max_seconds": 60.0,
    "tolerance": 0.004,
    "attention_sizes": 80,
    "ffn_sizes": 49,
    "whole_shapes": 24,
    "candidates": 8,
    "search_rounds": 24,
    "instances": 7,
}
"""`Effort.thorough`."""
