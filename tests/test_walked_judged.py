"""Plans of models larger than memory judged by their loss: several in one walk, as if each slim model was there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KINDS, LM_ROW, ROWS, VISION_ROW, Row, build, scattered_plan
from test_low_memory import GPT2, batches_of
from test_walked_basis import loaded_basis
from toys import REGIME, once

from hawada_peft import LatencyBudget, Plan, Shape, slim, slim_checkpoint
from hawada_peft.basis.bases import Bases, plan_turn
from hawada_peft.basis.basis import Basis, rows_untied
from hawada_peft.errors import HawAdaError, IllegalShapeError
from hawada_peft.refit.activity import activity_of
from hawada_peft.refit.fidelity import divergence
from hawada_peft.search.space import search_space
from hawada_peft.vanilla.family import Layout, locate
from hawada_peft.walked import ActivityQuality, plan_checkpoint
from hawada_peft.walked.closed import closed_losses
from hawada_peft.walked.judged import JudgedQuality
from hawada_peft.walked.walk import Walk, open_walk

JUDGED = {"llama": LM_ROW, "vit": VISION_ROW, "gpt2": GPT2} | {
    name: (ROWS | KINDS)[name] for name in ("llama-bare", "gemma2")
}
ROTATED = ("llama", "vit", "llama-bare")


def judged_plans(model: Any, row: Row, *, rotated: bool) -> list[Plan]:
    """Nothing cut, a layer gone, two apart, units of every layer, all of it, and directions with and without."""
    layout = locate(model)
    full, units = Plan.keep_all(layout.dense), scattered_plan(model, row.slim)
    plans = [full, *(scattered_plan(model, Shape(num_hidden_layers=count)) for count in (3, 2)), units]
    if rotated:
        for each in (full, units):
            kept = (each.layers, each.heads, each.channels)
            plans.append(
                Plan(
                    replace(layout.dense, hidden_size=layout.hidden_size), *kept, hidden=tuple(range(40)), rotated=True
                )
            )
    return plans


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in JUDGED), ("llama", True)])
def test_losses_of_one_walk_are_those_of_the_slim_models(name: str, padded: bool, tmp_path: Path) -> None:
    row = JUDGED[name]
    model, batches = build(row), batches_of(VISION_ROW if name == "vit" else LM_ROW, padded=padded)[:3]
    model.save_pretrained(tmp_path / "base")
    basis = loaded_basis(model, batches) if name in ROTATED else None
    plans = judged_plans(model, row, rotated=basis is not None)
    with open_walk(tmp_path / "base", batches, spill=tmp_path) as walk:
        metric, losses = closed_losses(walk, walk.start(), plans, basis)
        assert losses == closed_losses(walk, walk.start(), plans, basis)[1]
    assert losses[0] == 0
    for plan, loss in zip(plans[1:], losses[1:], strict=True):
        turn = plan_turn(model, plan, Bases(basis))
        small = slim(model, plan, turn=turn)
        if turn is not None and name == "llama-bare":  # its states are in other coordinates
            continue
        kind, expected = divergence(model, small, batches)
        assert loss == pytest.approx(expected, rel=2e-3, abs=1e-6)
        assert metric == kind
        assert loss > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def judged(walk: Walk, basis: Basis | None = None, sizes: tuple[int, ...] = ()) -> JudgedQuality:
    return JudgedQuality(walk, ActivityQuality(walk.layout, activity_of(walk.start(), walk.batches), basis), sizes)


def test_depth_goes_by_what_is_measured(tmp_path: Path) -> None:
    model, batches = build(LM_ROW, num_hidden_layers=6), batches_of(LM_ROW)[:2]
    model.save_pretrained(tmp_path / "base")
    with open_walk(tmp_path / "base", batches) as walk:
        activity = activity_of(walk.start(), walk.batches)
        measured = JudgedQuality(walk, ActivityQuality(walk.layout, activity)).losses
        alone = [measured[without(walk.layout, layer)] for layer in range(6)]
        worst = max(range(6), key=lambda layer: alone[layer])
        lies = tuple(0.0 if layer == worst else 1.0 for layer in range(6))
        quality = JudgedQuality(walk, ActivityQuality(walk.layout, replace(activity, influence=lies)))
        for count in (5, 4, 3):
            shape = Shape(num_hidden_layers=count)
            plan, loss = quality.plan(shape), quality.evaluate(shape)
            tried = {each: found for each, found in quality.losses.items() if each.shape == plan.shape}
            assert len(tried) > 1
            assert loss == tried[plan] == min(tried.values())
            assert any(worst not in each.layers for each in tried)  # as the influence would have it
            assert worst in plan.layers
        assert quality.evaluate(Shape()) == 0
        with pytest.raises(IllegalShapeError, match="num_key_value_heads"):
            quality.plan(Shape(num_key_value_heads=3))


def without(layout: Layout, gone: int) -> Plan:
    full, kept = Plan.keep_all(layout.dense), tuple(layer for layer in range(6) if layer != gone)
    return replace(full, layers=kept, heads=full.heads[1:], channels=full.channels[1:])


def test_predictions_are_measured_where_one_axis_is_cut(tmp_path: Path) -> None:
    model, batches = build(LM_ROW), batches_of(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    basis = loaded_basis(model, batches)
    with open_walk(tmp_path / "base", batches) as walk:
        quality = judged(walk, basis, (48,))
        assert quality.free == ("heads", "ffn", "layers", "hidden")
        dense = search_space(quality.layout, REGIME, free=quality.free)
        predicted = quality.predict(dense)
        count = len(quality.losses)
        narrow = search_space(quality.layout, REGIME, free=quality.free, hidden_size=48)
        narrower = quality.predict(narrow)
        assert len(quality.losses) == count  # nothing had to be walked for
        measured = {plan.shape: loss for plan, loss in quality.losses.items() if plan.hidden is None}
        widths = [shape for shape in measured if shape.num_hidden_layers == 4]
        assert min(shape.sizes()["num_attention_heads"] for shape in widths) == 2
        assert min(shape.sizes()["intermediate_size"] for shape in widths) == 24
        for shape in widths:
            assert predicted.flat[dense.index(shape)] == pytest.approx(measured[shape], rel=1e-6)
        deep = Shape(num_hidden_layers=2).complete(quality.layout.dense)
        assert predicted.flat[dense.index(deep)] == pytest.approx(quality.evaluate(deep), rel=1e-6)
        alone = quality.evaluate(Shape(hidden_size=48))
        both = [pair for pair in narrow.heads if pair in dense.heads]
        pairs = [[space.heads.index(pair) for pair in both] for space in (narrow, dense)]
        assert narrow.ffn == dense.ffn
        np.testing.assert_allclose(narrower[:, pairs[0]] - predicted[:, pairs[1]], alone, rtol=1e-6)
        assert alone > 0
        assert predicted.flat[dense.index(quality.layout.dense)] == 0
        uncut = predicted[:, dense.heads.index(Shape(8, 4)), -1]
        assert (np.diff(uncut) <= 1e-12).all()  # more layers are no worse
        assert (np.diff(predicted, axis=2) <= 1e-12).all()
    assert "kl of" in quality.meaning


def test_a_budget_is_searched_with_hidden_sizes(tmp_path: Path) -> None:
    model, batches = build(LM_ROW, tie_word_embeddings=True), batches_of(LM_ROW)
    model.save_pretrained(tmp_path / "base")
    basis = loaded_basis(model, batches)
    budget = LatencyBudget(speedup=1.5, batch_size=1, seq_len=8)
    options: Any = {"spill": tmp_path, "effort": once()}
    found = plan_checkpoint(tmp_path / "base", budget, batches, basis=basis, **options)
    assert found.speedup >= 1.5
    assert found.best.measured_loss > 0
    assert "by directions of a basis" in found.steps["hidden_size"]
    with open_walk(tmp_path / "base", batches) as walk:
        rows = rows_untied(walk.weights.model, walk.layout, walk.checkpoint.whole)
    assert rows == rows_untied(model, locate(model)) == 128
    loss = closed_loss(tmp_path / "base", batches, found.plan, basis)
    assert found.best.measured_loss == pytest.approx(loss)
    given = basis if found.plan.rotated else None
    written = slim_checkpoint(tmp_path / "base", None, tmp_path / "slim", plan=found.plan, basis=given)
    assert written.parameters == found.best.parameters
    with pytest.raises(HawAdaError, match="judge=False"):
        plan_checkpoint(tmp_path / "base", budget, batches, basis=basis, judge=False)


def closed_loss(base: Path, batches: Any, plan: Plan, basis: Basis) -> float:
    with open_walk(base, batches) as walk:
        return closed_losses(walk, walk.start(), [plan], basis)[1][0]
