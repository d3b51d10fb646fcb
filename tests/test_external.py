"""A clock outside of this process: how often it is asked, what it is told, and what it may answer."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LM_ROW, build, gate

from hawada_peft import LatencyBudget, find_plan
from hawada_peft.errors import ExternalClockError, HawAdaError
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.external import CommandLine, ExternalClock
from hawada_peft.latency.measuring import measure_built, measure_many
from hawada_peft.latency.regime import Regime
from hawada_peft.search.timed import measure_table
from hawada_peft.search.timed_models import realiser
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.shape import Shape

REGIME = Regime(mode="generate", prompt=8, output=4, batch_size=2)

PROGRAM = """
import json, pathlib, sys
folder, batch, prompt, output = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
assert (folder / "model.safetensors").stat().st_size > 0
config = json.loads((folder / "config.json").read_text())
print("warming up")
print(batch * (prompt + 3 * output) * config["num_hidden_layers"] * 1e-3)
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return build(LM_ROW)


@pytest.fixture
def command(tmp_path: Path) -> str:
    program = tmp_path / "time it.py"
    program.write_text(PROGRAM)
    return f"'{sys.executable}' '{program}' {{folder}} {{batch_size}} {{prompt}} {{output}}"


def seconds(model: Any, regime: Regime) -> float:
    """A machine that obeys a law."""
    sizes = locate(model).full.complete(locate(model).dense).sizes()
    layer = 1 + sizes["num_attention_heads"] / 4 + sizes["num_key_value_heads"] / 8 + sizes["intermediate_size"] / 32
    return 1e-3 * (1 + sizes["num_hidden_layers"] * layer)


def quick(clock: ExternalClock, **changes: Any) -> Effort:
    return Effort.quick(clock=clock, cache=False, **changes)


def test_a_program_is_given_the_model_and_the_conditions(model: Any, command: str) -> None:
    layers = locate(model).dense.sizes()["num_hidden_layers"]
    timing = measure_many({"a": model}, REGIME, effort=quick(ExternalClock(command)))["a"]
    assert timing.median_ms == pytest.approx(2 * (8 + 3 * 4) * layers)
    assert (timing.rounds, timing.settled, timing.device_name) == (1, True, command)


def test_each_shape_is_asked_about_so_often_one_at_a_time_and_never_again(model: Any) -> None:
    asked: list[tuple[int, int]] = []
    answers = iter([3.0, 1.0, 2.0] * 3)
    layout, alive = locate(model), weakref.WeakSet[Any]()

    def measure(model: Any, regime: Regime) -> float:
        asked.append((model.config.num_hidden_layers, len(alive)))
        return next(answers)

    def make(layers: int) -> Any:
        gc.collect()
        built = realiser(layout, REGIME)(Shape(num_hidden_layers=layers).complete(layout.dense))
        alive.add(built)
        return built

    effort = quick(ExternalClock(measure, name="a machine", repeats=3))
    found = measure_built(make, [1, 2, 1], REGIME, reference=2, effort=effort)
    assert asked == [(2, 1)] * 3 + [(1, 1)] * 3
    assert {key: (round(each.median_ms), each.rounds) for key, each in found.items()} == {2: (2000, 3), 1: (2000, 3)}
    assert not found[1].settled
    measure_built(make, [1], REGIME, reference=2, effort=effort)
    assert len(asked) == 6  # of what it knows it is not asked again
    with pytest.raises(HawAdaError, match="measures by itself"):
        effort.clock.runner(model, REGIME)


def test_it_feeds_tables_and_a_search(model: Any) -> None:
    effort = quick(ExternalClock(seconds), attention_sizes=40, ffn_sizes=4, whole_shapes=4)
    table = measure_table(model, REGIME, effort=effort)
    assert table.device_name == f"{__name__}.seconds"
    assert table.dense_ms == pytest.approx(1e3 * seconds(model, REGIME))
    assert table.errors["p95"] < 0.02
    budget = LatencyBudget(fraction=0.8, prompt=8, output=4, batch_size=2)
    tokens = model.dummy_inputs["input_ids"][:, :8]
    found = find_plan(gate(build(LM_ROW)), budget, [{"input_ids": tokens}], table=table, refit=False, effort=effort)
    assert found.ms <= 0.8 * found.dense_ms
    assert found.table.regime == REGIME


class Diary(Clock):
    """Has measured all models elsewhere, and gives several samples of each."""

    elsewhere = True

    def samples(self, models: Sequence[Any], regime: Regime, timed: Callable[[], np.ndarray]) -> np.ndarray:
        return 1e3 * np.array([[1, 1.01, 1.02]]) * np.array([[seconds(model, regime)] for model in models])


def test_any_clock_may_give_its_own_samples(model: Any) -> None:
    timing = measure_many({"it": model}, REGIME, effort=Effort.quick(clock=Diary(), cache=False))["it"]
    assert timing.median_ms == pytest.approx(1.01e3 * seconds(model, REGIME))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('out of memory')", "ended with code 1: out of memory"),
        ("print('fast')", "must print seconds in the last line of stdout, got 'fast'"),
        ("pass", "in the last line of stdout, got nothing"),
        ("print(0)", "must return seconds above 0, as a number; got 0.0"),
        ("print('nan')", "must return seconds above 0"),
    ],
)
def test_what_a_program_may_not_say(model: Any, code: str, message: str) -> None:
    clock = ExternalClock(f'{sys.executable} -c "{code}" {{folder}}')
    with pytest.raises(ExternalClockError, match=message):
        clock.measured(model, REGIME)


def test_a_program_that_is_not_there_or_does_not_end(model: Any) -> None:
    with pytest.raises(ExternalClockError, match="cannot be run"):
        CommandLine("no-such-program {folder}")(model, REGIME)
    with pytest.raises(ExternalClockError, match=r"was stopped after 0.05 s"):
        CommandLine(f"{sys.executable} -c 'import time; time.sleep(60)' {{folder}}", timeout=0.05)(model, REGIME)


@pytest.mark.parametrize("answer", [0, -1.0, float("inf"), "3", True, None])
def test_what_a_callable_may_not_return(model: Any, answer: Any) -> None:
    with pytest.raises(ExternalClockError, match="a machine must return seconds above 0"):
        ExternalClock(lambda model, regime: answer, name="a machine").measured(model, REGIME)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measure": "time it"}, "has no {folder}"),
        ({"measure": "time {folder} {batch}"}, r"has the unknown \['batch'\].*batch_size"),
        ({"measure": "time {folder} {prompt:d}"}, "has the unknown"),
        ({"measure": "time '{folder}"}, "cannot be read: No closing quotation"),
        ({"measure": "time {folder"}, "cannot be read"),
        ({"measure": lambda model, regime: 1.0}, "needs a function with a name"),
        ({"measure": 3.0}, "needs a function with a name"),
        ({"measure": seconds, "repeats": 0}, "repeats must be"),
        ({"measure": seconds, "timeout": 3.0}, "timeout must be seconds above 0, for a command line"),
        ({"measure": "time {folder}", "timeout": 0}, "timeout must be"),
    ],
)
def test_clocks_that_cannot_be_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HawAdaError, match=message):
        ExternalClock(**given)
