"""The search, on a machine that obeys a law its table does not know, with qualities that can be checked by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, LM_ROW, ROWS, VISION_ROW, build, difference, gate, inputs_of, logits_of
from peft import get_peft_model
from toy_search import DENSE, Machine, ToyQuality, toy_space
from toys import REGIME, StoppedClock, by_shape, by_table, once, timing, toy_table
from tqdm import tqdm

from hawada_peft import HawAdaConfig, Shape, collect_gates, init_basis
from hawada_peft.errors import (
    HawAdaError,
    IllegalShapeError,
    InfeasibleBudgetError,
    InvalidPlanError,
    InvalidRegimeError,
    UnsettledTimingWarning,
)
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.timing import Timing
from hawada_peft.latency.toy import ToyClock
from hawada_peft.planning.importance import gate_importance
from hawada_peft.planning.plan import Plan
from hawada_peft.search import reference, timed_models
from hawada_peft.search.answer import frontier
from hawada_peft.search.budgeted import find_plan
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.narrow import DOUBT, both_narrower, most_loss, worthwhile_sizes
from hawada_peft.search.result import MOST_POINTS, SearchResult
from hawada_peft.search.rounds import search
from hawada_peft.search.space import SearchSpace, narrower_sizes, search_space
from hawada_peft.search.state import SearchState
from hawada_peft.search.timed import dense_model, measure_table, regime_of
from hawada_peft.search.timed_models import realiser
from hawada_peft.vanilla import rehome
from hawada_peft.vanilla.family import locate


@pytest.mark.parametrize("speedup", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_the_answer_is_measured_and_meets_the_budget(speedup: float, factor: float) -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    machine = Machine(table, factor)
    result = search(toy_space(), table, ToyQuality(), LatencyBudget(speedup=speedup), machine)
    true = machine.ms(result.best.shape) / machine.ms(DENSE) * speedup
    assert 0.9 < true <= 1
    assert result.figures()["loss"] == ToyQuality.meaning
    assert result.ms <= result.limit_ms
    assert result.speedup == pytest.approx(machine.ms(DENSE) / machine.ms(result.best.shape))
    assert result.best.measured_ms is not None
    assert result.best.measured_loss is not None
    assert "measured, budget" in str(result)


def test_the_answer_is_the_best_of_all_shapes() -> None:
    table, space, quality = toy_table(DENSE, launch=0.5, arithmetic=1.0), toy_space(), ToyQuality()
    result = search(space, table, quality, LatencyBudget(speedup=1.5), Machine(table), effort=Effort(margin=0))
    loss = quality.predict(space).ravel()
    every = [space.shape(index) for index in range(len(space))]
    fits = [index for index, shape in enumerate(every) if table.estimate(shape) <= table.dense_ms / 1.5]
    assert result.best.predicted_loss == pytest.approx(min(loss[index] for index in fits))


@pytest.mark.parametrize("limits", [{"speedup": 1.5}, {"max_parameters": 20_000}])
def test_a_search_goes_to_json_and_back(limits: dict[str, float]) -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    result = search(toy_space(), table, ToyQuality(), LatencyBudget(**limits), Machine(table, 1.3))
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert SearchResult.from_dict(data) == result
    for damaged in ([], {}, data | {"more": 1}, data | {"best": {}}, data | {"budget": {"speed": 2}}):
        with pytest.raises(HawAdaError, match="search again"):
            SearchResult.from_dict(damaged)


@pytest.mark.parametrize("limits", [{"speedup": 1.5}, {"speedup": 1.2, "max_parameters": 20_000}])
def test_a_search_says_why_it_rejected_the_rest(limits: dict[str, float]) -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    result = search(toy_space(), table, ToyQuality(), LatencyBudget(**limits), Machine(table, 1.3))
    found = json.loads(json.dumps(result.figures(), allow_nan=False))
    assert len(result.measured) < len(found["points"]) <= MOST_POINTS
    (chosen,) = [point for point in found["points"] if point["rejected"] is None]
    assert chosen["shape"] == result.best.shape.to_dict()
    assert {Shape.from_dict(point["shape"]) for point in found["points"]} >= {each.shape for each in result.measured}
    for point in found["points"]:
        timed = point["measured_ms"] is not None
        assert timed == (point["expected_ms"] is not None)
        ms = point["measured_ms"] if timed else point["estimate_ms"]
        if point is not chosen:
            assert ("slower than the budget" in point["rejected"]) == (ms > found["limit_ms"])
            large = point["parameters"] > limits.get("max_parameters", float("inf"))
            assert ("too many parameters" in point["rejected"]) == large
    expected = [point["expected_ms"] for point in found["points"] if point["expected_ms"] is not None]
    measured = [point["measured_ms"] for point in found["points"] if point["expected_ms"] is not None]
    assert expected != measured  # what the table said before it was corrected


def test_depth_is_cut_where_launches_dominate_and_width_where_arithmetic_does() -> None:
    found = {}
    for name, launch, arithmetic in (("launches", 1.0, 0.05), ("arithmetic", 0.05, 1.0)):
        table = toy_table(DENSE, launch=launch, arithmetic=arithmetic)
        found[name] = search(toy_space(), table, ToyQuality(), LatencyBudget(speedup=1.5), Machine(table)).best.shape
    assert found["launches"].num_hidden_layers == 5
    assert found["launches"].intermediate_size == 1024
    assert found["arithmetic"].num_hidden_layers > 5
    assert found["arithmetic"].intermediate_size < 1024
    assert found["arithmetic"].num_attention_heads < 16


def test_a_quality_that_cannot_be_measured_is_searched_by_prediction() -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    result = search(
        toy_space(), table, ToyQuality(measurable=False), LatencyBudget(latency_ms=table.dense_ms / 2), Machine(table)
    )
    assert result.best.measured_loss is None
    assert result.best.measured_ms is not None


def test_limits_on_size_combine_with_latency() -> None:
    table, space = toy_table(DENSE, launch=0.5, arithmetic=1.0), toy_space()
    dense = int(space.parameters.max())
    budget = LatencyBudget(speedup=1.2, max_parameters=dense // 2)
    result = search(space, table, ToyQuality(), budget, Machine(table))
    assert result.best.parameters <= dense // 2
    only_size = search(space, table, ToyQuality(), LatencyBudget(max_memory=dense * 2), Machine(table))
    assert only_size.best.memory <= dense * 2
    assert only_size.best.measured_ms is not None
    assert math.isinf(only_size.limit_ms)


@pytest.mark.parametrize(
    ("asked", "binding"),
    [
        ({"speedup": 50.0}, "binding: latency"),
        ({"max_parameters": 10}, "binding: size"),
        ({"speedup": 50.0, "max_parameters": 10}, "binding: latency and size"),
    ],
)
def test_a_budget_below_the_floor_is_refused_with_the_range(asked: dict[str, float], binding: str) -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    machine = Machine(table)
    with pytest.raises(InfeasibleBudgetError, match=binding) as caught:
        search(toy_space(), table, ToyQuality(), LatencyBudget(**asked), machine)
    assert re.search(r"a speedup of 1 to \d+\.\d+.*740 to 94,720 parameters", str(caught.value))
    assert machine.rounds == 0


def test_a_noisy_table_gives_a_range_above_zero() -> None:
    table = replace(toy_table(DENSE, launch=0.5, arithmetic=1.0), fixed_ms=-3.0)
    assert table.fixed_ms + table.layer_ms < 0
    with pytest.raises(InfeasibleBudgetError, match=r": 0\.\d*[1-9]\d* to \d+\.\d+ ms, a speedup of 1 to \d"):
        search(toy_space(), table, ToyQuality(), LatencyBudget(speedup=500.0), Machine(table))


def test_a_machine_that_never_meets_the_budget_is_reported() -> None:
    table = toy_table(DENSE, launch=0.5, arithmetic=1.0)

    def stuck(shapes: Sequence[Shape]) -> dict[Shape, Timing]:
        return {shape: timing(10.0) for shape in (*shapes, DENSE)}

    with pytest.raises(InfeasibleBudgetError, match=r"10\.|fastest took"):
        search(toy_space(), table, ToyQuality(), LatencyBudget(speedup=4), stuck, effort=Effort(search_rounds=3))


def test_the_frontier_holds_what_nothing_beats() -> None:
    ms, loss = np.array([5.0, 4.0, 4.0, 2.0, 1.0]), np.array([0.0, 0.3, 0.2, 0.2, 0.9])
    assert frontier(ms, loss).tolist() == [0, 3, 4]


def test_shapes_and_places_of_a_space_agree() -> None:
    space = toy_space()
    for index in (0, 17, len(space) - 1):
        assert space.index(space.shape(index)) == index


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
def test_parameters_are_those_of_the_built_model(row: object) -> None:
    model = build(row)
    layout = locate(model)
    space = search_space(layout, REGIME, multiple=8)
    build_shape = realiser(layout, Regime())
    for index in np.linspace(0, len(space) - 1, 7).astype(int):
        shape = space.shape(int(index))
        assert space.parameters.ravel()[index] == build_shape(shape).num_parameters()
    assert space.shape(len(space) - 1).num_hidden_layers == 4
    assert max(space.ffn) == layout.dense.intermediate_size


def test_a_re_homed_model_takes_more_heads() -> None:
    alone, both = (search_space(locate(model), REGIME) for model in (build(LM_ROW), rehome(build(LM_ROW))))
    assert set(both.heads) > set(alone.heads)
    assert Shape(6, 3) in both.heads
    frozen = search_space(locate(build(LM_ROW)), REGIME, free=("ffn",))
    assert frozen.layers == (4,)
    assert len(frozen.heads) == 1
    assert (both.memory > both.parameters * 4).all()  # a KV cache comes with prefill


def test_random_models_leave_the_random_state_alone() -> None:
    model = build(LM_ROW)
    before = torch.get_rng_state()
    built = realiser(locate(model), Regime(dtype="bfloat16"))(Shape(4, 2, 40, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert built.dtype is torch.bfloat16
    assert locate(built).dense == Shape(4, 2, 40, 2)
    assert not built.training


# --------------------------------------------------------------------------------------------------- masked quality


def quality_of(row: object, **options: object) -> MaskedQuality:
    model = get_peft_model(build(row), HawAdaConfig(**options))
    batches = [inputs_of(model)]
    return MaskedQuality(model, batches, gate_importance(model, batches))


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
def test_masked_quality_is_nothing_for_the_dense_model_and_grows(row: object) -> None:
    quality = quality_of(row)
    dense = quality.layout.dense
    assert quality.loss(Plan.keep_all(dense)) == pytest.approx(0.0, abs=1e-6)
    assert quality.evaluate(Shape(num_hidden_layers=2)) > 0
    space = search_space(quality.layout, Regime(), multiple=8)
    loss = quality.predict(space)
    assert loss.shape == (4, len(space.heads), len(space.ffn))
    assert loss.ravel()[space.index(dense)] == 0
    full = space.heads.index(Shape(8, dense.num_key_value_heads))
    assert (np.diff(loss[:, full, -1]) <= 0).all()  # more layers, less loss
    assert (np.diff(loss, axis=2) <= 1e-9).all()  # more channels, less loss


def test_measured_widths_are_met_by_the_prediction() -> None:
    quality = quality_of(LM_ROW)
    space = search_space(quality.layout, Regime(), multiple=8)
    loss = quality.predict(space)
    shape = Shape(intermediate_size=72).complete(quality.layout.dense)  # three quarters: one of the measured widths
    assert loss.ravel()[space.index(shape)] == pytest.approx(quality.evaluate(shape), rel=1e-6)


def test_layers_are_dropped_greedily_and_scored_anew() -> None:
    quality = quality_of(LM_ROW)
    space = search_space(quality.layout, Regime(), multiple=8)
    quality.predict(space)
    first = {layer: quality.loss(quality._without([layer])) for layer in range(4)}
    assert quality._order[0] == min(first, key=first.__getitem__)
    second = {
        layer: quality.loss(quality._without([quality._order[0], layer]))
        for layer in set(range(4)) - {quality._order[0]}
    }
    assert quality._order[1] == min(second, key=second.__getitem__)
    plan = quality.plan(Shape(num_hidden_layers=2))
    assert set(plan.layers) == set(range(4)) - set(quality._order[:2])


def test_layers_are_ranked_by_the_first_batches_and_depths_measured_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    batch = inputs_of(model)
    batches = [{name: value.roll(step, -1) for name, value in batch.items()} for step in range(5)]
    monkeypatch.setattr(reference, "RANKED", batch["input_ids"].numel() + 1)  # held by two
    quality, first = MaskedQuality(model, batches), MaskedQuality(model, batches[:2])
    passes: list[None] = []
    model.get_base_model().register_forward_hook(lambda *_: passes.append(None))
    order = quality.drop_order(2)
    assert len(passes) == 2 * (4 + 3)  # each of four layers, then of three
    losses = quality.depth_losses(2)
    assert len(passes) == 2 * (4 + 3) + 5 * 2
    assert order == first.drop_order(2)
    assert losses[4] == 0
    assert losses[3] == pytest.approx(quality.loss(quality.without_layers(3)))
    assert losses[2] == pytest.approx(max(losses[3], quality.loss(quality.without_layers(2))))


def test_a_table_leaves_out_less_the_worse_it_is() -> None:
    space, budget = toy_space(), LatencyBudget(speedup=1.3)
    plain = toy_table(DENSE, launch=0.5, arithmetic=1.0)
    counts = [
        SearchState(space, replace(plain, errors=errors), budget, Effort()).surely().sum()
        for errors in ({"p95": 0.0}, {"p95": 0.03}, {"p95": 0.3}, {})
    ]
    assert counts[0] > counts[1] > counts[2] == counts[3] > 0


@pytest.mark.parametrize("speedup", [1.1, 1.3, 2.0])
def test_hidden_sizes_that_cannot_win_get_no_table(speedup: float) -> None:
    class Narrow(ToyQuality):
        def evaluate(self, shape: Shape) -> float | None:
            self.evaluated.append(shape)
            return float((1 - shape.hidden_size / 64) ** 2)

    sizes = [Shape(hidden_size=size) for size in (56, 48, 40, 32, 24, 16, 8)]
    table, space, quality = toy_table(DENSE, launch=0.5, arithmetic=1.0), toy_space(), Narrow()
    state = SearchState(space, table, LatencyBudget(speedup=speedup), Effort())
    best = quality.predict(space).ravel()[state.fits()].min()
    asked: list[Shape] = []

    def enough(size: Shape, least: int = 0) -> bool:
        asked.append(size)
        return (size.hidden_size or 0) <= least

    limit = most_loss(state, quality)
    found = worthwhile_sizes(limit, quality, sizes, enough)
    losses = [((1 - (size.hidden_size or 0) / 64) ** 2) for size in sizes]
    assert found == [size for size, loss in zip(sizes, losses, strict=True) if loss <= DOUBT * best]
    assert len(found) < len(sizes)
    assert len(quality.evaluated) == len(found) + 1  # the first that is left out ends it
    assert asked == found
    wide = [size for size in found if (size.hidden_size or 0) >= 48]
    assert worthwhile_sizes(limit, quality, sizes, lambda size: enough(size, 48)) == wide
    hopeless = SearchState(space, table, LatencyBudget(speedup=1e6), Effort())
    assert worthwhile_sizes(most_loss(hopeless, quality), quality, sizes, enough) == sizes


def test_pairs_of_narrower_sizes_are_searched_where_both_may_win() -> None:
    class Sum(ToyQuality):
        def evaluate(self, shape: Shape) -> float | None:
            return 0.1 if shape.hidden_size is None else (64 - shape.hidden_size) / 100

    streams, heads = [Shape(hidden_size=56), Shape(hidden_size=48)], [Shape(head_dim=6), Shape(head_dim=4)]
    found = both_narrower(0.2, Sum(), streams, heads, lambda size: size == Shape(head_dim=4))
    assert found == [Shape(hidden_size=56, head_dim=6)]
    assert both_narrower(0.2, Sum(), streams, heads[1:], lambda size: size == Shape(head_dim=4)) == []
    assert both_narrower(0.2, Sum(), [], heads, lambda size: False) == []


def test_the_gated_model_is_left_as_it_was() -> None:
    model = gate(build(LM_ROW), gates=EVERYTHING)
    model.apply_plan(model.plan(Shape(4, 2, 40, 2)))
    before = {name: (gate.theta.clone(), gate.kept) for name, gate in collect_gates(model).items()}
    expected = logits_of(model)
    quality = MaskedQuality(model, [inputs_of(model)], gate_importance(model, [inputs_of(model)]))
    quality.evaluate(Shape(intermediate_size=48))
    for name, found in collect_gates(model).items():
        assert torch.equal(found.theta, before[name][0])
        assert found.kept is before[name][1] or torch.equal(found.kept, before[name][1])
    assert torch.equal(logits_of(model), expected)


def test_without_importance_the_gates_decide() -> None:
    model = gate(build(LM_ROW))
    quality = MaskedQuality(model, [inputs_of(model)])
    assert quality.plan(Shape(4, 4, 40)) == model.plan(Shape(4, 4, 40))


def test_what_has_no_gates_is_not_free() -> None:
    assert quality_of(LM_ROW, gates=("ffn",)).free == ("ffn",)
    assert quality_of(LM_ROW).free == ("heads", "ffn", "layers")


def test_bad_quality_input_is_refused() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(HawAdaError, match="no calibration batches"):
        MaskedQuality(model, [])
    with pytest.raises(InvalidPlanError, match="gates that the model lacks"):
        MaskedQuality(model, [inputs_of(model)], {"other": torch.ones(1)})


def test_padding_does_not_count() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    batch = inputs_of(model)
    mask = torch.ones_like(batch["input_ids"])
    full = MaskedQuality(model, [batch | {"attention_mask": mask}])
    mask = mask.clone()
    mask[:, -2:] = 0
    part = MaskedQuality(model, [batch | {"attention_mask": mask}])
    shape = Shape(num_hidden_layers=2)
    assert part.evaluate(shape) != pytest.approx(full.evaluate(shape), rel=1e-6)


# -------------------------------------------------------------------------------------------------- all tied together


@pytest.mark.parametrize("twin", [False, True], ids=["as it is", "re-homed"])
def test_a_plan_is_found_for_a_budget_and_carried_all_the_way(twin: bool) -> None:
    model = get_peft_model(rehome(build(LM_ROW)) if twin else build(LM_ROW), HawAdaConfig())
    layout = locate(model.get_base_model())
    table = toy_table(layout.dense, launch=0.2, arithmetic=1.0, base_sizes=layout.base_sizes())
    budget = LatencyBudget(speedup=1.5, mode="prefill", seq_len=8)
    result = find_plan(model, budget, [inputs_of(model)], table=table, effort=once(by_table(table)))
    assert result.speedup >= 1.5
    assert result.plan.shape == result.best.shape
    model.apply_plan(result.plan)
    masked = logits_of(model)
    merged = model.merge_and_unload()
    assert locate(merged).dense == result.best.shape
    assert difference(logits_of(merged), masked) <= 1e-5


@pytest.mark.parametrize("refit", [True, False])
def test_fresh_gates_are_ranked_by_their_importance(refit: bool) -> None:
    """The first heads and channels are made to count least: keeping the first would be the worst choice."""
    base = build(LM_ROW)
    layout = locate(base)
    for layer in range(4):
        for end, part in ((layout.attention_out(layer), 32), (layout.ffn_out(layer), 48)):
            base.get_submodule(end).weight.data[:, :part] *= 1e-3
    model = get_peft_model(base, HawAdaConfig(gates=("heads", "ffn")))
    table = toy_table(layout.dense, launch=0.0, arithmetic=1.0, base_sizes=layout.base_sizes())
    budget = LatencyBudget(speedup=1.9, mode="prefill", seq_len=8)
    options = {"table": table, "effort": once(by_table(table)), "refit": refit}
    plan = find_plan(model, budget, [inputs_of(model)], **options).plan
    first = [sum(head < 4 for head in heads) for heads in plan.heads]
    assert max(len(channels) for channels in plan.channels) < 96
    assert all(np.mean(np.array(channels) < 48) < 0.3 for channels in plan.channels)
    assert sum(first) < sum(len(heads) for heads in plan.heads) / 2 or plan.shape.num_attention_heads == 8


def test_trained_gates_are_ranked_by_their_values() -> None:
    model = gate(build(LM_ROW), gates=("heads", "ffn", "layers"))
    table = toy_table(Shape(8, 4, 96, 4), launch=0.2, arithmetic=1.0)
    table = replace(table, base_sizes=locate(model.get_base_model()).base_sizes())
    budget = LatencyBudget(speedup=1.5, mode="prefill", seq_len=8)
    seen: list[str] = []

    def bars(**options: Any) -> Any:
        seen.append(options["desc"])
        return tqdm(**options, disable=True)

    options = {"table": table, "effort": once(by_table(table)), "refit": False, "rotate": False, "progress": bars}
    plan = find_plan(model, budget, [inputs_of(model)], **options).plan
    shape = plan.shape
    kept = dict(zip(plan.layers, plan.channels, strict=True))
    by_value = model.plan(replace(shape, num_hidden_layers=4))
    assert all(by_value.channels[layer] == channels for layer, channels in kept.items())
    assert seen == [
        "step 1 of 4: asking the dense model",
        "step 2 of 4: dropping layers",
        "step 3 of 4: judging shapes",
        "step 4 of 4: building and timing shapes",
    ]


def test_later_rounds_try_half_as_many_shapes() -> None:
    table, tried = toy_table(DENSE, launch=0.5, arithmetic=1.0), []
    machine = Machine(table, factor=1.3)

    def realise(shapes: Sequence[Shape]) -> dict[Shape, Timing]:
        tried.append(len(shapes))
        return machine(shapes)

    effort = Effort(candidates=4, search_rounds=40, instances=1)
    result = search(toy_space(), table, ToyQuality(), LatencyBudget(speedup=1.5), realise, effort=effort)
    assert result.speedup >= 1.5
    assert tried[0] == 4
    assert set(tried[1:]) == {2, 1}  # one at the end


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("luck", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("speedup", [1.2, 1.5])
def test_no_more_is_left_of_a_budget_than_steps_ask_for(speedup: float, luck: float, factor: float) -> None:
    """Where the machine is slower than its table, the first shape that meets the budget may be far below it."""
    table, asked = toy_table(DENSE, launch=0.1, arithmetic=1.0), list[Shape]()

    class Lucky(ToyQuality):
        def evaluate(self, shape: Shape) -> float | None:
            asked.append(shape)
            return luck * super().evaluate(shape)

    machine, space = Machine(table, factor), toy_space(ffn=range(64, 1025, 8))
    budget, effort = LatencyBudget(speedup=speedup), Effort(instances=1, search_rounds=20)
    result = search(space, table, Lucky(), budget, machine, effort=effort)
    assert 0.98 <= result.ms / result.limit_ms <= 1
    limit = machine.ms(DENSE) / speedup
    assert all(machine.ms(shape) <= limit for shape in asked)  # what is too slow is not judged


def test_layers_that_no_budget_needs_are_not_judged() -> None:
    quality = quality_of(LM_ROW)
    dense = quality.layout.dense
    table = toy_table(dense, launch=1.0, arithmetic=0.1)
    space = search_space(quality.layout, REGIME, multiple=8)
    law = by_table(table)
    asked: list[int] = []
    quality.predict = lambda space: asked.append(min(space.layers)) or MaskedQuality.predict(quality, space)

    def machine(shapes: Sequence[Shape]) -> dict[Shape, Timing]:
        return {shape: timing(table.estimate(shape)) for shape in (*shapes, dense)}

    mild = search(space, table, quality, LatencyBudget(speedup=1.15), machine)
    assert asked == [3]
    assert mild.shapes == len(space)
    hard = search(space, table, quality, LatencyBudget(speedup=2.5), machine)
    assert asked == [3, 1]
    assert hard.best.shape.num_hidden_layers == 1
    assert law.now() == 0.0


@pytest.mark.parametrize("speedup", [1.1, 1.3, 1.7, 2.5, 4.0])
def test_what_is_left_out_by_depth_is_never_the_best(speedup: float) -> None:
    table, space, quality = toy_table(DENSE, launch=0.5, arithmetic=1.0), toy_space(), ToyQuality()
    state = SearchState(space, table, LatencyBudget(speedup=speedup), Effort())
    fits = state.fits()
    best = space.shape(int(np.where(fits, quality.predict(space).ravel(), np.inf).argmin()))
    assert best.num_hidden_layers >= min(state.of_worthwhile_depth().spaces[0].layers)


def test_two_adapters_are_refused() -> None:
    model = gate(build(LM_ROW))
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InvalidPlanError, match="one adapter must be active"):
        MaskedQuality(model, [inputs_of(model)])


def test_a_table_is_measured_for_a_model_and_kept(tmp_path: Path) -> None:
    model = build(LM_ROW)
    law = toy_table(locate(model).dense, launch=0.2, arithmetic=1.0)
    effort = Effort(clock=by_table(law), cache=tmp_path)
    table = measure_table(model, REGIME, effort=effort)
    shape = Shape(4, 2, 40, 2)
    assert table.estimate(shape) == pytest.approx(law.estimate(shape), rel=0.02)
    kept = measure_table(model, REGIME, effort=replace(effort, clock=StoppedClock()))
    assert kept == table
    assert str(kept.path) in str(kept)
    assert measure_table(model, REGIME, effort=replace(effort, fresh=True)).path is None


@pytest.mark.parametrize("size", [1, 4, 5, 8, 15])
def test_all_weights_of_a_timed_model_are_random(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_models, "DRAWN", 4)
    values = torch.full((size,), 7.0)
    timed_models._fill(values)
    assert (values.abs() <= timed_models.SPREAD).all()
    assert values.any()
    assert torch.equal(values[4:], values[: max(0, size - 4)])


def test_the_regime_comes_from_the_model() -> None:
    model = get_peft_model(build(VISION_ROW, torch.bfloat16), HawAdaConfig())
    regime = regime_of(model, LatencyBudget(speedup=2, batch_size=4))
    assert (regime.mode, regime.dtype, regime.device) == ("forward", "bfloat16", "cpu")
    with pytest.raises(InvalidRegimeError, match="only transformers models"):
        dense_model(torch.nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------- hidden width


def narrowed(size: int) -> tuple[SearchSpace, LatencyTable]:
    """The toy space of a narrower residual stream, in which arithmetic takes so much less."""
    part = size / 64
    sizes = {"model_type": "toy", "head_dim": 4, **DENSE.sizes(), "hidden_size": size, "dense_hidden_size": 64}
    table = toy_table(DENSE, launch=0.05, arithmetic=1.0 * part, base_sizes=sizes)
    # Its dense_ms is that of the dense model, measured when the machine was half as fast.
    whole = toy_table(DENSE, launch=0.05, arithmetic=1.0)
    slow = {name: 2 * getattr(table, name) for name in ("fixed_ms", "layer_ms")}
    attention = tuple(tuple(2 * value for value in row) for row in table.attention_ms)
    ffn = tuple(2 * value for value in table.ffn_ms)
    slower = replace(table, dense_ms=2 * whole.dense_ms, attention_ms=attention, ffn_ms=ffn, **slow)
    return replace(toy_space(), hidden_size=size), slower


SMALL: dict[str, Any] = {"attention_sizes": 4, "ffn_sizes": 4, "whole_shapes": 2}


class WideQuality(ToyQuality):
    """Hidden width costs less than the other axes, so it is worth cutting."""

    def predict(self, space: SearchSpace) -> np.ndarray:
        return super().predict(space) + 0.2 * (1 - (space.hidden_size or 64) / 64) ** 2

    def evaluate(self, shape: Shape) -> float | None:
        return super().evaluate(shape) + 0.2 * (1 - (shape.hidden_size or 64) / 64) ** 2


def test_hidden_sizes_are_searched_together_with_the_rest() -> None:
    table, quality = toy_table(DENSE, launch=0.05, arithmetic=1.0), WideQuality()
    narrower = [narrowed(size) for size in (48, 32)]
    laws = {None: table} | {size: toy_table(DENSE, launch=0.05, arithmetic=size / 64) for size in (48, 32)}

    def ms(shape: Shape) -> float:
        return laws[shape.hidden_size].estimate(replace(shape, hidden_size=None))

    def machine(shapes: Sequence[Shape]) -> dict[Shape, Timing]:
        return {shape: timing(ms(shape)) for shape in (*shapes, DENSE)}

    space = toy_space()
    result = search(
        space,
        table,
        quality,
        LatencyBudget(speedup=2),
        machine,
        narrower=narrower,
        effort=Effort(margin=0, search_rounds=40),
    )
    assert result.best.shape.hidden_size in (48, 32)
    assert result.best.measured_ms == pytest.approx(ms(result.best.shape))
    best = min(
        quality.predict(each)[laws[each.hidden_size].estimate_sizes(*each.axes).numpy() <= table.dense_ms / 2].min()
        for each in (space, *(other for other, _ in narrower))
    )
    assert result.best.predicted_loss == pytest.approx(best, rel=0.02)
    assert {candidate.shape.hidden_size for candidate in result.frontier} >= {None, 48}


@pytest.mark.parametrize("name", ["llama", "dinov2"])
def test_parameters_of_a_narrower_model_are_those_of_the_built_one(name: str) -> None:
    model = build(ROWS[name])
    layout = locate(model)
    build_shape = realiser(layout, Regime())
    for size in narrower_sizes(layout, multiple=16)[:2]:
        space = search_space(layout, REGIME, multiple=16, hidden_size=size)
        for index in np.linspace(0, len(space) - 1, 5).astype(int):
            shape = space.shape(int(index))
            built = build_shape(shape)
            assert shape.hidden_size == locate(built).hidden_size == size
            assert space.parameters.ravel()[index] == built.num_parameters()
            assert space.index(shape) == index


def test_narrower_sizes_are_legal_steps() -> None:
    sizes = {name: narrower_sizes(locate(build(ROWS[name]))) for name in ("llama", "qwen3")}
    assert sizes == {"llama": [56, 48, 40, 32, 24], "qwen3": list(range(60, 23, -4))}
    model = build(LM_ROW)
    assert narrower_sizes(locate(model), multiple=16) == [48, 32]


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_a_class_that_wants_a_multiple_of_the_heads_leaves_as_many_narrower_sizes(multiple: int) -> None:
    fields = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8}
    sizes = narrower_sizes(locate(build(LM_ROW, **fields)), multiple=multiple)
    assert sizes == [504, 432, 360, 288, 216]  # of 576, multiples of 9 and of 8


def test_hidden_sizes_are_a_sixteenth_apart() -> None:
    fields = {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 8}
    assert narrower_sizes(locate(build(LM_ROW, **fields)), multiple=8) == list(range(360, 143, -24))


def test_the_loss_of_a_hidden_size_is_measured() -> None:
    quality = quality_of(LM_ROW, gates=("heads", "ffn", "layers", "hidden"))
    assert quality.free == ("heads", "ffn", "layers", "hidden")
    space = search_space(quality.layout, Regime(), multiple=8, hidden_size=48)
    top = replace(quality.layout.dense, hidden_size=48)
    loss = quality.predict(space).ravel()
    assert loss[space.index(top)] == pytest.approx(quality.evaluate(top), rel=1e-9)
    assert loss.min() == loss[space.index(top)] > 0
    kept = quality.plan(top).hidden
    importance = next(value for value in (quality.scores.hidden,) if value is not None)
    assert list(kept) == sorted(importance.argsort(descending=True, stable=True)[:48].tolist())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_a_plan_with_a_hidden_size_is_found(rotate: bool, refit: bool) -> None:
    """On a machine where nothing but the hidden size saves time; of channels, and of directions of a basis."""
    model = get_peft_model(build(LM_ROW), HawAdaConfig(gates=("heads", "ffn", "layers", "hidden"), rotate=rotate))
    seen: set[int | None] = set()

    def ms(shape: Shape) -> float:
        seen.add(shape.hidden_size)
        return 1.0 + (shape.hidden_size or 64) / 8

    batches = [{"input_ids": torch.randint(128, (6, 16), generator=torch.Generator().manual_seed(0))}]
    if rotate:
        init_basis(model, batches)
    budget = LatencyBudget(speedup=1.2, mode="prefill", seq_len=8)
    effort = once(by_shape(ms), **SMALL)
    result = find_plan(model, budget, batches, hidden_sizes=[48, 32], effort=effort, refit=refit)
    assert seen == {64, 48, 32}
    assert result.best.shape.hidden_size == 48
    assert result.speedup == pytest.approx(9 / 7)
    assert result.plan.shape == result.best.shape
    assert result.plan.rotated == rotate
    model.apply_plan(result.plan)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-5


def test_without_gates_on_it_no_hidden_size_is_timed() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    layout = locate(model.get_base_model())
    table = toy_table(layout.dense, launch=0.2, arithmetic=1.0, base_sizes=layout.base_sizes())
    seen: set[int | None] = set()

    def ms(shape: Shape) -> float:
        seen.add(shape.hidden_size)
        return table.estimate(replace(shape, hidden_size=None))

    budget = LatencyBudget(speedup=1.5, mode="prefill", seq_len=8)
    find_plan(model, budget, [inputs_of(model)], table=table, hidden_sizes=[48], effort=once(by_shape(ms)))
    assert seen == {64}


def test_a_hidden_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IllegalShapeError, match=r"LlamaConfig refuses.*\n.*nearest.*48"):
        measure_table(build(LM_ROW), REGIME, hidden_size=44)


class Shaky(ToyClock):
    """Every look at it takes another while."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.rng = 0.0, np.random.default_rng(0)

    def now(self) -> float:
        self.late += 1e-3 * self.rng.exponential()
        return super().now() + self.late


def test_a_search_warns_once_of_what_did_not_settle_and_where_it_was_called() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig())
    budget = LatencyBudget(max_parameters=120_000, mode="prefill", seq_len=8)
    effort = once(Shaky(), min_rounds=3, max_rounds=4, tolerance=1e-4)
    with pytest.warns(UnsettledTimingWarning, match=r"did not settle.*\. .*did not settle.*Stop other work") as caught:
        find_plan(model, budget, [inputs_of(model)], effort=effort, refit=False)
    told = [each.filename for each in caught if each.category is UnsettledTimingWarning]
    assert told == [__file__]
