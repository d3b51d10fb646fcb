"""What a person may ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from conftest import LM_ROW, build, gate, inputs_of
from toys import StoppedClock, once

from hawada_peft.errors import InvalidBudgetError, InvalidRegimeError
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.regime import Conditions, Regime
from hawada_peft.search.budgeted import find_plan
from hawada_peft.search.timed import measure_table, regime_of


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({"speedup": 1.5}, 20.0),
        ({"fraction": 0.6}, 18.0),
        ({"latency_ms": 7.0}, 7.0),
        ({"max_parameters": 9}, math.inf),
    ],
)
def test_every_way_of_asking_gives_milliseconds(asked: dict[str, float], limit: float) -> None:
    assert LatencyBudget(**asked).limit_ms(30.0) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "give one of speedup"),
        ({"speedup": 2, "fraction": 0.5}, "got \\['speedup', 'fraction'\\]"),
        ({"speedup": 0.5}, "at least 1, got 0.5"),
        ({"fraction": 1.5}, "in \\(0, 1\\], got 1.5"),
        ({"latency_ms": -1}, "above 0, got -1"),
        ({"latency_ms": float("nan")}, "above 0, got nan"),
        ({"speedup": True}, "got True"),
        ({"max_parameters": 0}, "max_parameters must be a number above 0"),
        ({"speedup": 2, "batch_size": 0}, "batch_size must be"),
        ({"speedup": 2, "mode": "decode"}, "needs seq_len"),
        ({"speedup": 2, "dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_nonsense_is_refused(asked: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidBudgetError, match=message):
        LatencyBudget(**asked)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(InvalidBudgetError) as caught:
        LatencyBudget(speedup=0.5, latency_ms=-1, batch_size=0)
    assert len(str(caught.value).splitlines()) >= 4


def test_limits_combine() -> None:
    budget = LatencyBudget(speedup=2, max_parameters=1000, max_memory=2**20)
    assert str(budget) == "speedup 2x, parameters at most 1,000, memory at most 1.0 MiB"


def test_what_is_left_out_is_the_models() -> None:
    budget = LatencyBudget(speedup=2, batch_size=8, seq_len=64)
    regime = budget.regime(generates=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (regime.mode, regime.dtype, regime.device, regime.batch_size) == ("prefill", "bfloat16", "cpu", 8)
    forward = LatencyBudget(speedup=2).regime(generates=False, dtype=torch.float32, device="cpu")
    assert forward.mode == "forward"
    with pytest.raises(InvalidRegimeError, match="needs seq_len"):
        LatencyBudget(speedup=2).regime(generates=True, dtype=torch.float32, device="cpu")


NUMBERS = ("speedup", "latency_ms", "fraction", "max_parameters", "max_memory")


@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), 10**400, True, "2", [2]], ids=lambda v: str(v)[:9]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_limit_is_a_number_above_0(name: str, value: Any) -> None:
    with pytest.raises(InvalidBudgetError, match=f"{name} must be a number above 0"):
        LatencyBudget(**{name: value})


@pytest.mark.parametrize("cls", [Regime, partial(LatencyBudget, speedup=2)], ids=["regime", "budget"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "sideways"), ("mode", ["forward"]), ("dtype", "int8"), ("dtype", 32),
        ("backend", None), ("backend", "jit"), ("batch_size", 0), ("batch_size", None), ("batch_size", 1.0),
        ("seq_len", True), ("seq_len", -4),
        ("image_size", "8"), ("device", "tpu9"), ("device", 0), ("device", ""),
    ],
)  # fmt: skip
def test_conditions_are_checked_alike(cls: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((InvalidRegimeError, InvalidBudgetError), match=f"{name} must be"):
        cls(**{name: value})


def test_conditions_are_defined_once() -> None:
    names = [each.name for each in fields(Conditions)]
    assert [each.name for each in fields(Regime)] == names
    assert [each.name for each in fields(LatencyBudget)] == [*names, *NUMBERS]


@pytest.mark.parametrize("cuda", [{"mode": "prefill"}, {"backend": "cuda_graph", "device": "cpu"}], ids=str)
def test_what_contradicts_itself_is_told_with_the_rest(cuda: dict[str, Any]) -> None:
    with pytest.raises(InvalidBudgetError) as caught:
        LatencyBudget(speedup=2, fraction=0.5, **cuda)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "regime",
    [{"seq_len": 10**6}, {"seq_len": 32, "mode": "decode"}, {"batch_size": 10**9, "seq_len": 8}, {"seq_len": None}],
    ids=str,
)
def test_the_regime_is_checked_before_any_work(regime: dict[str, Any]) -> None:
    model = gate(build(LM_ROW, max_position_embeddings=32))
    conditions = {"batch_size": 1, "seq_len": 8, "mode": "forward"} | regime
    budget, effort = LatencyBudget(speedup=2, **conditions), once(StoppedClock())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # a forward pass would say so
    for ask in (
        lambda: find_plan(model, budget, [inputs_of(model)], effort=effort),
        lambda: measure_table(model, regime_of(model, budget), effort=effort),
    ):
        with pytest.raises(InvalidRegimeError, match=r"positions|GiB at least|needs seq_len"):
            ask()
