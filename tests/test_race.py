"""A race without models: halving, preparations, the record, and going on after an interruption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from toy_race import DENSE, RACE, Trials, entrant, loss_of, record_of

from hawada_peft import Plan
from hawada_peft.errors import HawAdaError
from hawada_peft.race import Entrant, Race, RaceRecord, run_race
from hawada_peft.race.race import LEAST


def test_the_better_half_goes_on_and_the_leader_is_prepared_in_every_way() -> None:
    race, trials, retired = RACE, Trials(), list[list[tuple[str, int]]]()
    record = record_of(race)
    winner = run_race(record, trials, retire=lambda on: retired.append(list(on)))
    assert winner == entrant(1, "least squares, close")
    rungs = [[key for key, rung, _ in trials.seen if rung == number] for number in range(len(record.lengths))]
    assert [len(keys) for keys in rungs] == [5 + 1 + 3, 4, 2]
    assert {each.preparation for each in record.entrants if each.plan == entrant(1).plan} == set(race.preparations)
    assert all(each.preparation == "none" for each in record.entrants if each.plan != entrant(1).plan)
    assert len(retired) == len(trials.seen)
    assert retired[-1] == [(winner.key, 2)]
    for done, needed in enumerate(retired, 1):  # what is trained later was kept until then
        later = {(key, rung - 1) for key, rung, _ in trials.seen[done:] if rung > 0}
        assert later & {(key, rung) for key, rung, _ in trials.seen[:done]} <= set(needed)
        assert len([each for each in needed if each[1] >= 0]) <= 5 + 1
    assert not record.led_throughout  # least squares led the first rung


def test_a_neighbour_runs_once_and_cannot_win() -> None:
    record = record_of(RACE)
    run_race(record, Trials())
    beside = entrant(6, neighbour=True)
    losses = [run.loss for run in record.runs if run.rung == 0]
    assert [run.rung for run in record.runs if run.entrant == beside.key] == [0]
    assert record.find(beside, 0).loss == min(losses)
    assert record.best != beside
    assert any("beside the budget" in line for line in record.lines())


def test_neighbours_that_do_not_run_are_told_as_they_were_cut(tmp_path: Path) -> None:
    record = replace(record_of(RACE, tmp_path / "race.json"), beside=False)
    run_race(record, Trials())
    beside = entrant(6, neighbour=True)
    assert beside.key not in {run.entrant for run in record.runs}
    assert [line for line in record.lines() if f"{beside.start:.4f} as cut" in line]
    assert RaceRecord.read(tmp_path / "race.json", RACE.settings()) == record


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("steps", [300, 1000])
def test_a_race_costs_what_was_said(share: float, steps: int) -> None:
    race = replace(RACE, share=share)
    record = record_of(race, steps=steps * share)
    run_race(record, Trials())
    assert 0.3 * steps * share <= record.cost <= steps * share
    assert record.lengths == [record.lengths[0] * 2**rung for rung in range(len(record.lengths))]


@pytest.mark.parametrize("killed_at", range(15))
def test_a_race_that_was_killed_goes_on_and_ends_with_the_same_record(tmp_path: Path, killed_at: int) -> None:
    race = RACE
    whole = record_of(race)
    run_race(whole, Trials())
    path, killed = tmp_path / "race.json", Trials(killed_at)
    first = record_of(race, path)
    first.write()
    with pytest.raises(KeyboardInterrupt):
        run_race(first, killed)
    again, rest = RaceRecord.read(path, race.settings()), Trials()
    assert len(again.runs) == killed_at
    run_race(again, rest)
    assert killed.seen + rest.seen == [(run.entrant, run.rung, run.steps) for run in whole.runs]
    plain = [[replace(run, seconds=0.0) for run in record.runs] for record in (again, whole)]
    assert plain[0] == plain[1]
    assert (again.winner, again.entrants) == (whole.winner, whole.entrants)
    read = RaceRecord.read(path, race.settings())
    assert read.to_dict() == again.to_dict()
    assert run_race(read, Trials(0)) == whole.best  # nothing runs again


def test_what_cannot_be_trained_drops_out() -> None:
    race = replace(RACE, preparations=("none",))

    def loss(one: Entrant, rung: int, steps: int) -> float:
        return math.nan if one.plan == entrant(1).plan else loss_of(one, rung, steps)

    record = record_of(race)
    assert run_race(record, Trials(loss=loss)) == entrant(2)
    assert record.to_dict()["runs"][1]["loss"] is None
    with pytest.raises(HawAdaError, match="finite loss"):
        run_race(record_of(race), Trials(loss=lambda *_: math.inf))


def test_a_single_entrant_wins_without_running() -> None:
    race, trials = replace(RACE, preparations=("none",)), Trials()
    record = RaceRecord({}, [entrant(1)], ["none"], race.lengths(1, 0, 0, 50))
    assert run_race(record, trials) == entrant(1)
    assert not trials.seen
    assert record.cost == 0


def test_the_record_of_another_race_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    assert RaceRecord.read(path, {}) is None
    record_of(RACE, path).write()
    with pytest.raises(HawAdaError, match=r"another race \(other share\)"):
        RaceRecord.read(path, replace(RACE, share=0.5).settings())
    for text in ("{", "[]", '{"format": 9}'):
        path.write_text(text)
        with pytest.raises(HawAdaError, match="remove it"):
            RaceRecord.read(path, {})


def test_entrants_have_names_for_people() -> None:
    assert entrant(1).name == "without layers 1-2"
    assert entrant(1, "magnitude").name == "without layers 1-2; magnitude"
    full = Plan.keep_all(DENSE)
    narrow = replace(full, channels=tuple(row[:16] for row in full.channels))
    assert replace(entrant(1), plan=narrow).name == "FFN 16/32"


def test_everything_wrong_with_a_race_is_said_at_once() -> None:
    with pytest.raises(HawAdaError) as error:
        Race(budget=2.0, plans=0, preparations=("best",), share=0.0, onward="backward", learning_rate=-1.0)  # type: ignore[arg-type]
    parts = ("LatencyBudget, got a float", "plans", "'best'", "share", "'backward'", "learning_rate")
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("steps", [0, 3, 20, 60, 150, 1000])
def test_a_race_is_no_larger_than_there_are_steps_for(steps: int) -> None:
    race = RACE
    plans, preparations, neighbours, lengths = race.affordable(5, 2, steps)
    if plans + preparations > 1:
        assert lengths[0] >= LEAST
        cost = race.lengths(plans, preparations, neighbours, steps)
        assert cost == lengths
        sizes = [plans + preparations]
        while sizes[-1] > 2:
            sizes.append(math.ceil(sizes[-1] / 2))
        assert neighbours * lengths[0] + sum(map(math.prod, zip(sizes, lengths, strict=True))) <= steps
    else:
        assert steps < 2 * LEAST
    assert (plans, preparations, neighbours) == (5, 3, 2) or steps < 1000
    assert replace(RACE, steps=1).affordable(5, 2, steps)[:3] == (5, 3, 2)
