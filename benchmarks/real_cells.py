"""The cells of the bench on a real model: who is measured at which budget, seed and length, and in which order."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rows import Row

OURS: dict[str, dict[str, Any]] = {
    "race": {},
    "searched": {"searched": True},
    "race_tenth": {"share": 0.1},
    "race_short": {
        "share": 0.1,
        "plans": 3,
        "preparations": ("none", "least squares", "least squares, close"),
        "neighbours": False,
    },
    "race_anew": {"share": 0.1, "onward": "anew"},
    "race_prepared": {"share": 0.1, "preparations": ("none", "least squares, close")},
    "race_plain": {"share": 0.1, "preparations": ("none",)},
    "race_long": {"share": 0.3, "plans": 6},
    "no_race": {"plans": 1, "preparations": ("none",), "neighbours": False},
    "no_race_magnitude": {"plans": 1, "preparations": ("magnitude",), "neighbours": False},
    "no_race_cosine": {"plans": 1, "preparations": ("cosine",), "neighbours": False},
    "no_race_least_squares": {"plans": 1, "preparations": ("least squares",), "neighbours": False},
    "no_race_close": {"plans": 1, "preparations": ("least squares, close",), "neighbours": False},
}
"""
The package's own contestants: options of `Race`, its defaults where they say nothing.

In `searched` the plan of `find_plan` races against others. `race_tenth` may cost a tenth of the steps, once the
default, as may the next four: `race_short` has fewer plans, and preparations race too, as in `race_prepared`;
`race_plain` takes plans as they were cut, `race_anew` trains the winner anew.
`no_race*` take the depth plan of least loss, prepared in one way.
"""

MUON = "+muon"
"""Behind a peer's name: recovered by the optimizer that `recover` takes by itself, not by AdamW."""

RIVALS = ("minitron_depth", "shortgpt", "replaceme", "slicegpt", "flap", "llm_pruner", "tp_taylor", "wanda_sp")
"""The peers of this bench; `minitron_depth` is the strongest so far."""


@dataclass(frozen=True)
class Cell:
    """One piece of work, and its place in the file of rows."""

    contestant: str
    budget: float
    seed: int
    steps: int

    @property
    def peer(self) -> str:
        """The name in the registry of peers."""
        return self.contestant.removesuffix(MUON)

    @classmethod
    def of(cls, row: Row) -> Cell:
        """Of a row."""
        return cls(row["contestant"], row["budget"], row["seed"], row["steps"])


@dataclass(frozen=True)
class Group:
    """Cells that one process makes, since they share most of the work."""

    contestants: tuple[str, ...]
    budgets: tuple[float, ...]
    seed: int
    steps: int

    @property
    def cells(self) -> list[Cell]:
        """Budget by budget, as what is cut for one serves all its recoveries."""
        return [Cell(name, budget, self.seed, self.steps) for budget in self.budgets for name in self.contestants]

    def command(self, common: Sequence[str], verb: str = "run") -> str:
        """The command line that makes them; {until} and {turns} are for `jobs.py`."""
        options = {
            "--contestants": self.contestants,
            "--budgets": self.budgets,
            "--seeds": (self.seed,),
            "--steps": (self.steps,),
        }
        own = [str(part) for name, values in options.items() for part in (name, *values)]
        line = shlex.join(["python", "benchmarks/real_model.py", verb, *common, *own])
        return f"{line} --until {{until}} --turns {{turns}}"


def groups_of(
    budgets: Sequence[float], seeds: Sequence[int], steps: Sequence[int], ours: Sequence[str] = ("race",)
) -> Iterator[Group]:
    """
    All cells of a setup, what tells most first: of SmolLM2 the peers at the shortest length and one seed; `ours` over
    all seeds; the peers' seeds; what else we have; longer recoveries of ours and of the strongest peer.
    """
    every, short, first = tuple(budgets), steps[0], seeds[0]

    def rivals(seed: int) -> Iterator[Group]:
        yield from (Group((name, f"{name}{MUON}"), every, seed, short) for name in RIVALS)

    if len(ours) == 1:
        yield from rivals(first)
    for name in ours:
        yield from (Group((name,), (budget,), seed, short) for seed in seeds for budget in budgets)
    single = ("no_race_magnitude", "no_race_cosine", "no_race_least_squares", "no_race_close")
    if len(ours) == 1:
        yield from (Group((name,), every, first, short) for name in ("no_race", *single, "race_anew"))
    for seed in seeds:
        yield from rivals(seed)
    others = ("race_plain", "race_short", "no_race")
    yield from (Group((name,), every, seed, short) for seed in seeds for name in others)
    strongest = (RIVALS[0], f"{RIVALS[0]}{MUON}")
    for length in steps[1:]:
        for seed in seeds:
            for budget in budgets:
                yield from (Group((name,), (budget,), seed, length) for name in ours)
                yield Group(strongest, (budget,), seed, length)
    yield from (Group((name,), every, seed, short) for seed in seeds for name in (*single, "race_anew"))


def unmade(groups: Iterable[Group], done: Iterable[Cell]) -> list[Group]:
    """The groups of which a cell is missing, once each."""
    made = set(done)
    return [group for group in dict.fromkeys(groups) if not made.issuperset(group.cells)]


def shared_out(groups: Sequence[Group], shard: int, shards: int) -> list[Group]:
    """The groups of one of several machines."""
    return list(groups[shard::shards])
