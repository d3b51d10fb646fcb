"""Rows as segments: found, read back, and at other sizes."""

from __future__ import annotations

import pytest

from hawada_peft.discovery import Rows
from hawada_peft.discovery.patterns import pattern_of

ROWS = {
    "plain": ([0, 1, 2, 3], 4),
    "heads": ([0, 0, 1, 1, 2, 2, 3, 3], 4),
    "gate and up": ([0, 1, 2, 3, 0, 1, 2, 3], 4),
    "queries, keys, values": ([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1], 2),
    "some stay": ([0, 1, -1, -1, -1], 2),
    "queries of groups, whose keys and values stay": ([0, 1, -1, -1, 2, 3, -1, -1], 4),
    "one of each group": ([0, -1, 1, -1, 2, -1], 3),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_pattern_gives_the_rows_back(name: str) -> None:
    rows, units = ROWS[name]
    found = pattern_of(rows, units)
    assert found is not None
    assert Rows("weight", 0, 0, found.segments, found.groups).units() == rows


@pytest.mark.parametrize("name", ROWS)
def test_a_pattern_keeps_its_order_at_another_size(name: str) -> None:
    rows, units = ROWS[name]
    found = pattern_of(rows, units)
    assert found is not None
    twice = found.resized(2 * units, found.groups, 3 * found.per_unit, 5 * found.fixed)
    assert twice is not None
    made = Rows("weight", 0, 0, twice.segments, twice.groups).units()
    assert len(made) == 6 * units * found.per_unit + 5 * found.fixed
    assert [unit for index, unit in enumerate(made) if index == 0 or made[index - 1] != unit][:1] == rows[:1]
    assert {made.count(unit) for unit in range(2 * units)} == {3 * found.per_unit}
    assert made.count(-1) == 5 * found.fixed


def test_what_has_no_order_has_no_pattern() -> None:
    assert pattern_of([0, 2, 1, 3], 4) is None
    assert pattern_of([0, 0, 1], 2) is None


def test_a_size_that_does_not_come_out_in_whole_rows_is_none() -> None:
    found = pattern_of([0, 0, 0, 1, 1, 1, 0, 1], 2)
    assert found is not None
    assert found.resized(2, 1, 5, 0) is None
