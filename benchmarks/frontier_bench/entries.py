"""The rows of the frontier bench as one entry per contestant and budget."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from peers.peer import Peer
from rows import Row

from frontier_bench.quality import HAWADA, shape_of
from hawada_peft.errors import HawAdaError

STAGES = {"before": "before recovery", "after": "after recovery"}
METRICS = {"text": ("perplexity",), "image": ("accuracy", "agreement")}
"""What is shown of a kind of teacher; the first decides. Accuracy and agreement with the teacher are in percent."""


@dataclass
class Entry:
    """A contestant at a budget, over its seeds. `stages["after"]["accuracy"]` are the values of a metric."""

    contestant: str
    title: str
    ours: bool
    budget: float
    speedups: list[float] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    met: bool = True
    stages: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def values(self, stage: str, metric: str) -> list[float]:
        return self.stages.get(stage, {}).get(metric, [])

    def mean(self, stage: str, metric: str) -> float:
        return statistics.fmean(self.values(stage, metric))

    def spread(self, stage: str, metric: str) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        values = self.values(stage, metric)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def entries_of(shapes: Sequence[Row], quality: Iterable[Row], peers: Mapping[str, Peer]) -> list[Entry]:
    """One entry per contestant and budget, in the order of budgets, ours first; the last row of a run counts."""
    groups: dict[tuple[float, str], dict[int, Row]] = defaultdict(dict)
    for row in quality:
        if row["budget"] is not None:
            groups[row["budget"], row["contestant"]][row["seed"]] = row
    names = [*HAWADA, *peers]
    entries = []
    for (budget, name), runs in sorted(groups.items(), key=lambda item: (item[0][0], names.index(item[0][1]))):
        ours = name in HAWADA
        entry = Entry(
            name, name.replace("hawada_", "hawada ").replace("_", "-") if ours else peers[name].name, ours, budget
        )
        for seed, row in sorted(runs.items()):
            shape = shape_of(shapes, name, budget, seed)
            if shape is None:
                raise HawAdaError(
                    f"{name} at {budget}x has a quality but no shape: give the file that it was made from"
                )
            entry.speedups.append(shape["speedup"])
            entry.parameters.append(row["parameters"])
            entry.met &= shape["met"]
            for stage in STAGES:
                for metric, value in row.get(stage, {}).items():
                    entry.stages.setdefault(stage, {}).setdefault(metric, []).append(value)
        entries.append(entry)
    return entries


def best_of(entries: Sequence[Entry], stage: str, kind: str) -> Entry | None:
    """The best by mean of those that meet the budget and were measured at the stage."""
    metric, sign = METRICS[kind][0], 1 if kind == "text" else -1
    measured = [entry for entry in entries if entry.met and entry.values(stage, metric)]
    return min(measured, key=lambda entry: sign * entry.mean(stage, metric), default=None)
