"""What is timed once is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from sizing import Timed
from timings import Timings, Untimed, signature
from torch import nn
from turns import Turns


def make(width: int) -> nn.Module:
    return nn.Linear(width, 2)


def test_models_are_told_apart_by_their_parameters() -> None:
    assert signature(make(3)) == signature(make(3))
    assert len({signature(make(3)), signature(make(4)), signature(nn.Sequential(make(3)))}) == 3


def test_a_model_is_timed_once_for_all_processes(tmp_path: Path) -> None:
    calls: list[int] = []

    def watch(model: nn.Module) -> Timed:
        calls.append(model.in_features)
        return Timed(float(model.in_features), 8.0, 0.0, 1, [None, (1, 2)])

    def timings(device: str = "one") -> Timings:
        return Timings(watch, tmp_path / "rows", {"device": device}, Turns(tmp_path / "turns"))

    with pytest.raises(Untimed):
        timings().known(make(4))
    assert timings().of(lambda: make(4)).speedup == 2.0
    assert timings().of(lambda: make(4)).ms == 4.0
    assert timings().known(make(4)).parameters == 1
    assert calls == [4]
    with pytest.raises(Untimed):
        timings("another").known(make(4))

    fit = timings().fit(lambda amount: make(max(1, round(8 * (1 - amount)))), 2.0, None)
    assert fit.met
    assert fit.timed.speedup == 2.0
    timed = list(calls)
    assert timings().fit(lambda amount: make(max(1, round(8 * (1 - amount)))), 2.0, None).amount == fit.amount
    assert calls == timed
