"""
The record of a race: who ran, who left when, at what loss. Written after every run: a race can be resumed.

Long because a race that is resumed needs all of its record, checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from ..files.atomic import write_text
from ..planning.plan import Plan
from ..vanilla.shape import Shape
from .fits import Sizes, as_sizes

FORMAT = 2
NAME = "race.json"


@dataclass(frozen=True)
class Entrant:
    """
    A plan and how its model is prepared.

    Args:
        plan (`Plan`): what stays.
        source (`str`): where the plan comes from.
        preparation (`str`): a name in `PREPARATIONS`.
        ms (`float`, *optional*): measured latency; None if it is not limited.
        start (`float`): how far from the dense model (`Judge.loss`), cut, neither prepared nor trained.
        neighbour (`bool`): whether it only runs for comparison, and cannot win.
    """

    plan: Plan
    source: str
    preparation: str
    ms: float | None
    start: float
    neighbour: bool = False

    @property
    def key(self) -> str:
        """The same for the same plan and preparation."""
        text = f"{self.plan.to_json()} {self.preparation} {self.neighbour}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people: what goes, and the preparation."""
        cut = [(f"{part.tower}: " if part.tower else "") + _told(part) for part in self.plan.cut_parts]
        return " | ".join(cut) + ("" if self.preparation == "none" else f"; {self.preparation}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entrant:
        """The inverse of `to_dict`."""
        return cls(**(dict(data) | {"plan": Plan.from_dict(data["plan"])}))


@dataclass(frozen=True)
class Run:
    """
    A short recovery.

    Args:
        entrant (`str`): its key.
        rung (`int`): of the race, from 0.
        steps (`int`): of training, with a schedule of their own.
        loss (`float`): how far from the dense model on held-out batches after it: KL in nats per prediction, or the
            mean squared difference of outputs that are no distribution (`head_of`); NaN if it failed.
        seconds (`float`): it took.
    """

    entrant: str
    rung: int
    steps: int
    loss: float
    seconds: float


@dataclass
class RaceRecord:
    """
    A race as far as it has run.

    Args:
        settings (`dict`): what the race was asked for; another race does not go on from this record.
        entrants (`list[Entrant]`): those that run, in the order in which they entered.
        preparations (`list[str]`): the one that all plans run with, and those that the best of them is tried with.
        lengths (`list[int]`): steps of a run, by rung.
        runs (`list[Run]`): what has run.
        dense_ms (`float`, *optional*): the dense model's latency.
        limit_ms (`float`, *optional*): the budget's, on the same scale.
        share (`float`): of a step of the recovery that a step of the race costs: its batches may be smaller.
        seconds (`float`): what finding the entrants took.
        latencies (`dict[Sizes, float]`): of all shapes that were timed, in milliseconds; of several towers by
            `Together`.
        beside (`bool`): whether the neighbours run too; else it is only told what they lose as they are cut.
        winner (`str`, *optional*): its key, once the race is over.
        path (`Path`, *optional*): where it is written; nowhere if left out.
    """

    settings: dict[str, Any]
    entrants: list[Entrant]
    preparations: list[str]
    lengths: list[int]
    runs: list[Run] = field(default_factory=list)
    dense_ms: float | None = None
    limit_ms: float | None = None
    share: float = 1.0
    seconds: float = 0.0
    latencies: dict[Sizes, float] = field(default_factory=dict)
    beside: bool = True
    winner: str | None = None
    path: Path | None = None

    def entrant(self, key: str) -> Entrant:
        """By its key."""
        return next(each for each in self.entrants if each.key == key)

    def find(self, entrant: Entrant, rung: int) -> Run | None:
        """A run, if it was."""
        return next((run for run in self.runs if (run.entrant, run.rung) == (entrant.key, rung)), None)

    def standing(self, rung: int) -> list[Run]:
        """The runs of a rung by those that can win, the best first; failed ones last."""
        able = {each.key for each in self.entrants if not each.neighbour}
        runs = [run for run in self.runs if run.rung == rung and run.entrant in able]
        return sorted(runs, key=lambda run: math.inf if math.isnan(run.loss) else run.loss)

    @property
    def best(self) -> Entrant | None:
        """The winner."""
        return None if self.winner is None else self.entrant(self.winner)

    @property
    def led_throughout(self) -> bool:
        """Whether the winner was the best of the first rung as well."""
        first = self.standing(0)
        return bool(first) and first[0].entrant == self.winner

    @property
    def cost(self) -> float:
        """Of all runs, in steps of the recovery."""
        return self.share * sum(run.steps for run in self.runs)

    @property
    def spent(self) -> float:
        """Of all runs but the winner's own, in steps of the recovery."""
        return self.share * sum(run.steps for run in self.runs if run.entrant != self.winner)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "preparations": self.preparations,
            "lengths": self.lengths,
            "dense_ms": self.dense_ms,
            "limit_ms": self.limit_ms,
            "share": self.share,
            "seconds": self.seconds,
            "entrants": [{"key": each.key, "name": each.name} | each.to_dict() for each in self.entrants],
            "runs": [asdict(run) | {"loss": None if math.isnan(run.loss) else run.loss} for run in self.runs],
            "latencies": [[_plain(sizes), ms] for sizes, ms in self.latencies.items()],
            "beside": self.beside,
            "winner": self.winner,
            "cost": self.cost,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path | None = None) -> RaceRecord:
        """
        The inverse of `to_dict`.

        Raises:
            HawAdaError: if it is not the record of a race, or one of another format.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT or "entrants" not in data:
            raise HawAdaError(f"{path or 'this'} is not the record of a race in format {FORMAT}; remove it")
        fields = (
            "settings",
            "preparations",
            "lengths",
            "dense_ms",
            "limit_ms",
            "share",
            "seconds",
            "beside",
            "winner",
        )
        return cls(
            entrants=[
                Entrant.from_dict({name: value for name, value in each.items() if name not in ("key", "name")})
                for each in data["entrants"]
            ],
            runs=[Run(**(run | {"loss": math.nan if run["loss"] is None else run["loss"]})) for run in data["runs"]],
            latencies={_sizes(plain): ms for plain, ms in data["latencies"]},
            path=path,
            **{name: data[name] for name in (*fields, "beside", "winner")},
        )

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> RaceRecord | None:
        """
        The record in a file; None if there is none.

        Raises:
            HawAdaError: if it is that of another race.
        """
        if not path.exists():
            return None
        try:
            found = cls.from_dict(json.loads(path.read_text(encoding="utf-8")), path)
        except json.JSONDecodeError as error:
            raise HawAdaError(f"{path} is damaged ({error}); remove it, and the race begins anew") from None
        theirs = found.settings
        differing = sorted(name for name in {*settings, *theirs} if settings.get(name) != theirs.get(name))
        if differing:
            raise HawAdaError(
                f"{path} is the record of another race (other {', '.join(differing)}): remove it, or give another "
                "output folder"
            )
        return found

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.to_dict(), indent=1) + "\n")

    def lines(self) -> list[str]:
        """The race in words, one line for each rung, and one for the neighbours."""
        lines = []
        for rung, steps in enumerate(self.lengths):
            runs = self.standing(rung)
            if runs:
                results = "; ".join(f"{self.entrant(run.entrant).name}: {run.loss:.4f}" for run in runs)
                lines.append(f"rung {rung + 1}, {steps} steps: {results}")
        for each in self.entrants:
            run = self.find(each, 0)
            if each.neighbour:
                latency = "" if each.ms is None else f" ({each.ms:.4g} ms)"
                found = f"{each.start:.4f} as cut" if run is None else f"{run.loss:.4f} after {run.steps} steps"
                lines.append(f"beside the budget, {each.name}{latency}: {found}")
        if self.winner is not None:
            lines.append(f"won: {self.entrant(self.winner).name}; the race cost {self.cost:.0f} steps of recovery")
        return lines


def _plain(sizes: Sizes) -> Any:
    """For JSON: an object; of several towers a list of them."""
    return sizes.to_dict() if isinstance(sizes, Shape) else [shape.to_dict() for shape in sizes.shapes]


def _sizes(plain: Any) -> Sizes:
    """The inverse of `_plain`."""
    each = plain if isinstance(plain, list) else [plain]
    return as_sizes([Shape.from_dict(shape) for shape in each])


def _told(plan: Plan) -> str:
    """What goes of a tower."""
    parts = []
    gone = sorted(set(range(plan.dense.sizes()["num_hidden_layers"])) - set(plan.layers))
    if gone:
        parts.append(f"without layer{'s' if len(gone) > 1 else ''} {_ranges(gone)}")
    dense = plan.dense.to_dict()
    short = {"num_attention_heads": "heads", "num_key_value_heads": "KV groups", "intermediate_size": "FFN"}
    short |= {"hidden_size": "hidden"}
    sizes = plan.shape.to_dict()
    return ", ".join(
        [*parts, *(f"{short[key]} {sizes[key]}/{dense[key]}" for key in short if sizes.get(key) != dense.get(key))]
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 5-7` for rising numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
