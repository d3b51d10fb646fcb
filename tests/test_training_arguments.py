"""The arguments of gate training: what they refuse, and that nothing is said twice."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hawada_peft import GateTrainingArguments
from hawada_peft.errors import HawAdaError
from hawada_peft.training.arguments import GATE_OPTIONS, gate_problems


def arguments(folder: Path, **options: Any) -> GateTrainingArguments:
    return GateTrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


def test_every_option_has_help_and_its_default_is_right(tmp_path: Path) -> None:
    own = [each for each in fields(GateTrainingArguments) if each.name in GATE_OPTIONS]
    assert all(each.metadata["help"] for each in own)
    args = arguments(tmp_path)
    assert {each.name: getattr(args, each.name) for each in own} == GATE_OPTIONS


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    wrong = {"relaxation": "open", "keep_better": "best", "soft_fraction": 2, "keep_floor": -1}
    wrong |= {"kd_temperature": 0, "kl_weight": 0.0, "size_weight": -1, "learning_rate": -1e-3, "save_steps": -5}
    with pytest.raises(HawAdaError) as caught:
        arguments(tmp_path, gradient_accumulation_steps=0, **wrong)
    found = str(caught.value)
    assert [name for name in wrong if name not in found] == []
    assert "gradient_accumulation_steps" in found


NUMBERS = [name for name, default in GATE_OPTIONS.items() if not isinstance(default, str)]


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0.5", True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_mean_nothing_are_refused(name: str, value: Any) -> None:
    assert name in "".join(gate_problems({name: value}))


def test_counts_are_whole() -> None:
    assert "whole" in "".join(gate_problems({"calibration_examples": 1.5}))


def test_options_of_others_are_not_judged() -> None:
    assert gate_problems({"learning_rate": "?", "unknown": 3}) == []


@pytest.mark.parametrize(
    ("warmup", "soft", "right"),
    [(0, 1, True), (0.5, 0.5, True), (0.6, 0.5, False), (-0.1, 0.5, False), (0, 1.1, False)],
)
def test_the_phases_are_in_order(warmup: float, soft: float, right: bool) -> None:
    assert (gate_problems({"warmup_fraction": warmup, "soft_fraction": soft}) == []) == right
