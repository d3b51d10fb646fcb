"""What a search is said to take before it begins."""

from __future__ import annotations

import sys

import torch
from conftest import LM_ROW, build
from peft import get_peft_model

from hawada_peft import HawAdaConfig, LatencyBudget
from hawada_peft.cli.expected import expected_of
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.external import ExternalClock


def test_a_search_is_announced_by_what_it_is_spent_on() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    batches = [{"input_ids": torch.ones(4, 16, dtype=torch.long)} for _ in range(3)]
    budget = LatencyBudget(speedup=1.5, seq_len=8)
    told = expected_of(model, batches, budget, Effort(), refit=True)
    for part in ("12 examples; about", "to rank layers (12 times 3 of 3 batches)", "to judge", "to measure", "GiB"):
        assert part in told
    elsewhere = ExternalClock(f"{sys.executable} -c 1 {{folder}}")
    assert "to measure" not in expected_of(model, batches, budget, Effort(clock=elsewhere), refit=True)


def test_whole_answers_are_announced_too() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    batches = [{"input_ids": torch.ones(4, 16, dtype=torch.long)}]
    budget = LatencyBudget(speedup=1.5, prompt=4, output=4)
    assert "to measure" in expected_of(model, batches, budget, Effort(), refit=False)
