"""Every family that needs nothing but a row: what is masked is what is exported, and what its folder gives back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import KINDS, ROWS, STANDS_FOR, build, gate, inputs_of, scattered_plan
from families import FURTHER, INPUTS

from hawada_peft import Shape, save_slim
from hawada_peft.vanilla.family import FAMILIES, locate
from hawada_peft.vanilla.outputs import outputs_of

ALONE = FURTHER | {name: row for name, row in ROWS.items() if row.like}
"""Families on which not everything is tried."""
WIDE = [name for name in FURTHER if FAMILIES[name].hidden_norms]


def example_of(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    made = INPUTS[name]() if name in INPUTS else inputs_of(model)
    return {key: value.double() if value.is_floating_point() else value for key, value in made.items()}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(each.abs().max()) for each in expected.values())
    return max(float((found[name] - each).abs().max()) for name, each in expected.items()) / scale


def test_each_row_stands_for_something_or_is_like_one_that_does() -> None:
    rows = ROWS | KINDS
    assert STANDS_FOR.keys() == {name for name, row in rows.items() if not row.like}
    assert {row.like for row in rows.values()} <= {"", *STANDS_FOR}


@pytest.mark.parametrize("name", ALONE)
def test_a_family_that_is_a_row_slims_exactly(name: str, tmp_path: Path) -> None:
    row = ALONE[name]
    model = gate(build(row, torch.float64))
    inputs = example_of(name, model)
    dense = outputs_of(model, inputs)
    model.apply_plan(scattered_plan(model, row.slim))
    masked = outputs_of(model, inputs)
    assert largest(masked, dense) > 1e-3
    slimmed = model.merge_and_unload(inputs=inputs)
    assert locate(slimmed).dense == row.slim
    assert largest(outputs_of(slimmed, inputs), masked) < 1e-7  # float32 constants inside, as rotary frequencies
    assert save_slim(slimmed, tmp_path / "slim", inputs=inputs).max_difference < 1e-12


@pytest.mark.parametrize("name", WIDE)
def test_hidden_channels_of_a_family_that_is_a_row_go_exactly(name: str) -> None:
    model = gate(build(FURTHER[name], torch.float64), gates=("hidden",))
    inputs = example_of(name, model)
    model.apply_plan(model.plan(Shape(hidden_size=32)))
    masked = outputs_of(model, inputs)
    assert largest(outputs_of(model.merge_and_unload(inputs=inputs), inputs), masked) < 1e-12
