"""What a person may ask for."""

from __future__ import annotations

import math

import pytest
import torch

from hawada_peft.errors import InvalidBudgetError, InvalidRegimeError
from hawada_peft.latency.budget import LatencyBudget


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
