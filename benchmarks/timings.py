"""Models that were timed, by the names and shapes of their parameters: what one process times, all know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rows import Row, append_row, read_rows
from sizing import Fit, Timed, fit_amount
from transformers import PreTrainedModel
from turns import Turns


class Untimed(Exception):
    """A model was asked for that nobody has timed, where nothing may be timed."""


def signature(model: PreTrainedModel) -> str:
    """The same for models with the same parameters by name and shape, whatever their values."""
    sizes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


class Timings:
    """
    A stopwatch with a memory.

    Args:
        watch: times a model beside the dense one.
        path: rows are added to this file, by all processes; earlier ones are read at each question.
        about: what else has to be the same: the device, the regime.
        turns: of the device; nothing is timed but alone.
        earlier: further files, read once.
    """

    def __init__(
        self,
        watch: Callable[[PreTrainedModel], Timed],
        path: Path,
        about: Row,
        turns: Turns,
        earlier: Sequence[Path] = (),
    ) -> None:
        self.watch, self.path, self.about, self.turns = watch, path, about, turns
        self._earlier = [row for file in earlier for row in read_rows(file)]

    def known(self, model: PreTrainedModel) -> Timed:
        """
        What a model with these parameters took.

        Raises:
            Untimed: if none was timed.
        """
        wanted = self.about | {"model": signature(model)}
        for row in (*self._earlier, *read_rows(self.path)):
            if all(row.get(name) == value for name, value in wanted.items()):
                return Timed(**{name: row[name] for name in Timed.__dataclass_fields__})
        raise Untimed(wanted["model"])

    def time(self, model: PreTrainedModel) -> Timed:
        """What it takes; timed if nobody did. To be called by who is alone."""
        try:
            return self.known(model)
        except Untimed:
            row = self.about | {"model": signature(model)}
            timed = self.watch(model)
            append_row(self.path, row | asdict(timed))
            return timed

    def fit(self, cut: Callable[[float], PreTrainedModel], speedup: float, start: Fit | None) -> Fit:
        """`fit_amount`, beside others as long as every model that it comes to is known, otherwise alone."""
        try:
            with self.turns.together():
                return fit_amount(cut, self.known, speedup, start=start)
        except Untimed:
            with self.turns.alone():
                return fit_amount(cut, self.time, speedup, start=start)

    def of(self, build: Callable[[], PreTrainedModel]) -> Timed:
        """What a model takes: known, or timed alone."""
        try:
            with self.turns.together():
                return self.known(build())
        except Untimed:
            with self.turns.alone():
                return self.time(build())
