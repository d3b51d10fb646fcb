"""Least-squares reconstruction: the maths, the sequence over layers, and what protects the plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LM_ROW, Row, assert_same_state, build, gate, scattered_plan, state_of
from transformers import PreTrainedModel

from hawada_peft import reconstruct, slim


def batches_of(model: PreTrainedModel, count: int = 8, rows: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(count, rows, 3, 16, 16, generator=generator).to(model.dtype)
        return [{"pixel_values": batch} for batch in pixels]
    return [{"input_ids": batch} for batch in torch.randint(128, (count, rows, 16), generator=generator)]


def test_every_row_gets_closer_to_the_dense_model(row: Row) -> None:
    model = build(row)
    before = state_of(model)
    plan = scattered_plan(model, row.slim)
    small = slim(model, plan)
    result = reconstruct(model, small, plan, batches_of(model))
    assert result.applied
    assert result.after < result.before
    assert all(refit.residual for refit in result.refits)
    assert_same_state(state_of(model), before)


def test_merge_reconstructs_towards_the_model_without_gates(row: Row) -> None:
    model = gate(build(row), gates=("heads", "ffn", "layers"))
    plan = scattered_plan(model, row.slim)
    model.apply_plan(plan)
    dense, reports = build(row), []
    expected = slim(dense, plan)
    small = model.merge_and_unload(calibration=batches_of(dense), on_reconstruction=reports.append)
    assert small.config.to_dict() == expected.config.to_dict()
    assert reports[0].applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_folds_the_same_bits_when_nothing_is_applied(dtype: torch.dtype) -> None:
    models = [gate(build(LM_ROW, dtype), gates=("heads", "ffn", "layers")) for _ in range(2)]
    for model in models:
        model.apply_plan(scattered_plan(model, LM_ROW.slim))
    constant = {"input_ids": torch.full((4, 16), 5)}  # says nothing about the batch that is held out
    held_out = batches_of(models[0].get_base_model(), count=1)
    reports: list[Any] = []
    expected = models[0].merge_and_unload()
    with pytest.warns(UserWarning, match="keeps its plain weights"):
        found = models[1].merge_and_unload(calibration=[constant, *held_out], on_reconstruction=reports.append)
    assert not reports[0].applied
    assert_same_state(state_of(found), state_of(expected))
