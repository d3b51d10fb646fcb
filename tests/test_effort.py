"""Effort: what it refuses, and what follows from it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from hawada_peft import Effort
from hawada_peft.errors import HawAdaError
from hawada_peft.latency.effort import LEAST, QUICK, TABLE

NUMBERS = sorted(LEAST)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "3", None, True], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(HawAdaError, match=f"effort: {name} must be"):
        Effort(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_rounds": 5, "max_rounds": 4}, "min_rounds must not exceed max_rounds"),
        ({"margin": 0.7}, "margin must be below"),
        ({"depth": 1}, "depth must be a whole number of at least 2"),
        ({"tolerance": 0}, "tolerance must be above 0"),
        ({"clock": 3.0}, "clock must be a Clock, got float"),
        ({"cache": None}, "cache must be a folder"),
    ],
)
def test_impossible_efforts_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HawAdaError, match=message):
        Effort(**given)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(HawAdaError) as caught:
        Effort(warmup=-1, tolerance=float("nan"), group=1)
    assert len(str(caught.value).splitlines()) == 3


def test_every_number_is_checked() -> None:
    assert {each.name for each in fields(Effort)} - {"cache", "fresh", "clock"} == set(NUMBERS)
    assert set(TABLE) < set(NUMBERS)


def test_a_quick_one_asks_for_no_more_than_the_default() -> None:
    default, quick = Effort(), Effort.quick()
    for name in QUICK:
        less, more = (quick, default) if name != "tolerance" else (default, quick)
        assert getattr(less, name) <= getattr(more, name)
    assert Effort.quick(instances=5) == replace(quick, instances=5)


def test_what_follows_keeps_the_clock_and_the_order() -> None:
    effort = Effort.quick()
    for other in (effort.confirming(), effort.narrower()):
        assert other.clock is effort.clock
    assert effort.confirming().tolerance < effort.tolerance
    assert effort.max_seconds < effort.confirming().max_seconds
    assert Effort().narrower().ffn_sizes < Effort().ffn_sizes
