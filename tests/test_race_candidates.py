"""Plans that enter a race, on tiny models and a toy clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from conftest import LM_ROW, Row, build, difference, inputs_of, logits_of, scattered_plan
from heads import HEADS
from transformers import PreTrainedModel

from hawada_peft import LatencyBudget, Plan, Shape, slim
from hawada_peft.basis.bases import Bases
from hawada_peft.basis.find import find_basis
from hawada_peft.errors import HawAdaError, InfeasibleBudgetError
from hawada_peft.race import GENERATORS, GIVEN, Candidate, Fits, Judge, field_of, fits_of, no_larger, searched
from hawada_peft.race.candidates import (
    DIRECTIONS,
    RUNS,
    deepest,
    directions,
    greedy,
    influence,
    neighbours,
    runs,
    swaps,
    widths,
)
from hawada_peft.race.fits import largest
from hawada_peft.refit.fidelity import divergence
from hawada_peft.search.result import Candidate as Timed
from hawada_peft.search.result import SearchResult
from hawada_peft.vanilla.resize import parameters_at

LAYERS, HIDDEN = 8, 64
BATCHES = [
    {"input_ids": rows} for rows in torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(4)).split(4)
]


def toy_ms(shape: Shape) -> float:
    """A fixed cost, one of each layer's attention, and one of its channels."""
    return 1.0 + shape.num_hidden_layers * (0.5 + 0.5 * shape.intermediate_size / 96)


class Clock:
    """Times by the toy, on a machine whose speed changes, and counts."""

    def __init__(self, dense: Shape) -> None:
        self.dense, self.timed = dense, list[Shape]()

    def __call__(self, shapes: list[Shape]) -> dict[Shape, float]:
        self.timed += shapes
        speed = 1 + 0.1 * len(self.timed)
        return {shape: speed * toy_ms(shape) for shape in (*shapes, self.dense)}


def model_of(row: Row = LM_ROW) -> PreTrainedModel:
    return build(row, num_hidden_layers=LAYERS)


def fits_at(judge: Judge, speedup: float, **options: object) -> Fits:
    dense = judge.layout.dense
    return Fits(dense, Clock(dense), LatencyBudget(speedup=speedup).limit_ms, **options)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(model_of(), BATCHES)


def dropped(candidate: Candidate | Plan) -> list[int]:
    plan = candidate if isinstance(candidate, Plan) else candidate.plan
    return [layer for layer in range(LAYERS) if layer not in plan.layers]


@pytest.mark.parametrize("speedup", [1.3, 1.5, 2.0])
def test_all_that_enters_meets_the_budget_and_depth_alone_is_among_it(judge: Judge, speedup: float) -> None:
    fits = fits_at(judge, speedup)
    field = field_of(judge, fits, most=8)
    limit = toy_ms(judge.layout.dense) / speedup
    assert all(toy_ms(each.plan.shape) <= limit * (1 + 1e-9) for each in field)
    scale = fits.dense_ms / toy_ms(judge.layout.dense)  # of the first timing, though the machine slows down
    assert all(each.ms == pytest.approx(scale * toy_ms(each.plan.shape)) for each in field)
    plans = [each.plan for each in field]
    assert len(set(plans)) == len(plans) <= 8
    assert field[0].depth_only
    assert {each.source for each in field} <= set(GENERATORS)
    assert field[0].loss <= min(map(judge.loss, runs(judge, fits)))


def test_runs_are_all_of_the_fewest_layers_that_must_go(judge: Judge) -> None:
    fits = fits_at(judge, 1.5)
    kept = deepest(judge, fits)
    whole = replace(judge.layout.dense, num_hidden_layers=kept)
    assert toy_ms(whole) <= toy_ms(judge.layout.dense) / 1.5 < toy_ms(replace(whole, num_hidden_layers=kept + 1))
    found = [dropped(plan) for plan in runs(judge, fits)]
    gone = LAYERS - kept
    assert found == [list(range(start, start + gone)) for start in range(kept + 1)]


def test_wider_models_have_more_layers_and_the_widest_ffn_that_fits(judge: Judge) -> None:
    fits = fits_at(judge, 1.5)
    kept = deepest(judge, fits)
    for plan in widths(judge, fits):
        shape = plan.shape
        assert shape.num_hidden_layers > kept
        assert shape.intermediate_size < 96
        assert fits(shape)
        step = math.gcd(*(p.shape.intermediate_size for p in widths(judge, fits)), 96)
        assert not fits(replace(shape, intermediate_size=shape.intermediate_size + step))


def toy_hidden_ms(shape: Shape) -> float:
    """As `toy_ms`, and proportional to the hidden size."""
    return toy_ms(shape) * (shape.hidden_size or HIDDEN) / HIDDEN


@pytest.fixture(scope="module")
def rotating(judge: Judge) -> Judge:
    return Judge(judge.dense, BATCHES, Bases(find_basis(judge.dense, BATCHES)))


def test_directions_of_the_stream_are_cut_where_there_is_a_basis(judge: Judge, rotating: Judge) -> None:
    def fits() -> Fits:
        dense = judge.layout.dense
        time = lambda shapes: {shape: toy_hidden_ms(shape) for shape in (*shapes, dense)}  # noqa: E731
        return Fits(dense, time, LatencyBudget(speedup=1.6).limit_ms)

    assert list(directions(judge, fits())) == []
    found = list(directions(rotating, fits()))
    assert {plan.shape.num_hidden_layers for plan in found} >= {LAYERS}
    for plan in found:
        assert plan.rotated
        assert plan.hidden == tuple(range(plan.shape.hidden_size))
        assert fits()(plan.shape.complete(judge.layout.dense))
        small = slim(judge.dense, plan, turn=rotating.turn(plan))
        assert small.config.hidden_size == plan.shape.hidden_size
        assert rotating.loss(plan) == pytest.approx(divergence(judge.dense, small, BATCHES)[1], abs=0.05)
    field = field_of(rotating, fits(), most=4)
    assert DIRECTIONS in {each.source for each in field}
    assert RUNS in {each.source for each in field}
    assert not any(each.plan.rotated for each in field_of(judge, fits(), most=8))


def test_untied_embeddings_count_where_parameters_are_limited(judge: Judge, rotating: Judge) -> None:
    fits = no_larger(judge.dense, Shape(8, 4, 96, 5))
    unties = [plan for plan in directions(rotating, fits_at(judge, 1.5)) if rotating.unties(plan)]
    tied = judge.dense.get_output_embeddings().weight is judge.dense.get_input_embeddings().weight
    assert bool(unties) == tied
    assert not tied or list(directions(rotating, fits)) == []


def test_influence_drops_what_turns_the_stream_least() -> None:
    model = model_of()
    with torch.no_grad():  # layers 2 and 5 add next to nothing
        for layer in (2, 5):
            for out in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
                out.weight.mul_(1e-4)
    judge = Judge(model, BATCHES)
    fits = fits_at(judge, 1.25)
    assert deepest(judge, fits) == LAYERS - 2
    assert [dropped(plan) for plan in influence(judge, fits)] == [[2, 5]]
    field = field_of(judge, fits, few=3)
    assert dropped(min((each for each in field if each.depth_only), key=lambda each: each.loss)) == [2, 5]
    assert judge.loss(judge.without([2, 5])) < 1e-3


def test_exchanges_find_what_the_greedy_choice_misses() -> None:
    class Pairs(Judge):
        """Layer 3 is the cheapest alone, 1 and 6 are it together."""

        def loss(self, plan: Plan) -> float:
            gone = set(dropped(plan))
            return 0.5 if gone == {1, 6} else len(gone) + (3 not in gone) + 0.01 * sum(abs(each - 6) for each in gone)

    judge = Pairs(model_of(), BATCHES)
    fits = fits_at(judge, 1.25)
    assert [dropped(plan) for plan in greedy(judge, fits)] == [[3, 6]]
    assert [dropped(plan) for plan in swaps(judge, fits)] == [[1, 6]]


def test_exchanges_lose_no_more_than_the_greedy_choice(judge: Judge) -> None:
    fits = fits_at(judge, 2.0)
    [one], [other] = greedy(judge, fits), swaps(judge, fits)
    assert judge.loss(other) <= judge.loss(one)
    assert len(dropped(one)) == len(dropped(other)) == LAYERS - deepest(judge, fits)


def test_the_judges_loss_is_near_the_divergence(judge: Judge) -> None:
    plans = [judge.without([layer]) for layer in range(LAYERS)]
    exact = [divergence(judge.dense, slim(judge.dense, plan), BATCHES)[1] for plan in plans]
    found = [judge.loss(plan) for plan in plans]
    assert torch.corrcoef(torch.tensor([exact, found]))[0, 1] > 0.5
    assert abs(sum(found) - sum(exact)) < 0.5 * sum(exact)


def test_losses_are_computed_as_the_training_computes(judge: Judge) -> None:
    rough = Judge(judge.dense, BATCHES, bf16=True)
    plans = [judge.without([layer]) for layer in range(LAYERS)]
    exact, found = ([each.loss(plan) for plan in plans] for each in (judge, rough))
    assert found != exact
    assert found == pytest.approx(exact, rel=0.3, abs=3e-3)


def test_padding_does_not_count() -> None:
    model = model_of()
    tokens = BATCHES[0]["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 10:] = 0
    other = torch.where(mask.bool(), tokens, 5)
    batches = [[{"input_ids": each, "attention_mask": mask}] for each in (tokens, other)]
    first, second = (Judge(model, batch) for batch in batches)
    assert first.influence == pytest.approx(second.influence)
    half = Shape(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    assert first.at(half, ()) == second.at(half, ())


def test_what_stays_carries_most(judge: Judge) -> None:
    model = model_of()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-3  # every second channel is next to nothing
            layer.self_attn.o_proj.weight[:, :32] *= 1e-3  # and so are heads 0..3
    plan = Judge(model, BATCHES).at(Shape(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48), ())
    assert all(row == tuple(range(1, 96, 2)) for row in plan.channels)
    assert all(row == (4, 5, 6, 7) for row in plan.heads)
    assert difference(logits_of(slim(model, plan)), logits_of(model)) < 1e-2


def test_given_plans_enter_unless_they_miss_the_budget(judge: Judge) -> None:
    fits = fits_at(judge, 1.5)
    small = scattered_plan(judge.dense, Shape(8, 4, 40, 4))
    large = scattered_plan(judge.dense, Shape(8, 4, 88, LAYERS))
    field = field_of(judge, fits, given=[small, large], most=3)
    assert [each.plan for each in field if each.source == GIVEN] == [small]
    assert len(field) == 3
    assert any(each.depth_only for each in field)


def test_duplicates_and_dominated_plans_stay_out(judge: Judge) -> None:
    kept = tuple(range(LAYERS - 4))
    whole = judge.without(range(LAYERS - 4, LAYERS))
    narrow = judge.at(Shape(intermediate_size=80, num_hidden_layers=4), range(LAYERS - 4, LAYERS))
    assert narrow.layers == whole.layers == kept
    fits = Fits(judge.layout.dense, lambda shapes: dict.fromkeys((*shapes, judge.layout.dense), 1.0))
    generators = {"narrow": lambda *_: [narrow, narrow], "whole": lambda *_: [whole, narrow]}
    assert [each.plan for each in field_of(judge, fits, generators)] == [whole]
    faster = Fits(judge.layout.dense, Clock(judge.layout.dense))
    assert {each.plan for each in field_of(judge, faster, generators)} == {whole, narrow}


def test_neighbours_lie_on_both_sides_of_the_budget(judge: Judge) -> None:
    fits = fits_at(judge, 1.5)
    kept = deepest(judge, fits)
    slower, faster = neighbours(judge, fits)
    assert [each.plan.shape.num_hidden_layers for each in (slower, faster)] == [kept + 1, kept - 1]
    assert slower.ms > fits.limit_ms > faster.ms


def test_a_tolerance_lets_in_what_is_a_hair_too_slow(judge: Judge) -> None:
    dense = judge.layout.dense
    speedup = toy_ms(dense) / toy_ms(replace(dense, num_hidden_layers=6)) * 1.004
    assert [deepest(judge, fits_at(judge, speedup, tolerance=part)) for part in (0.0, 0.01)] == [5, 6]


def test_no_shape_is_timed_twice(judge: Judge) -> None:
    fits = fits_at(judge, 1.5)
    field_of(judge, fits)
    neighbours(judge, fits)
    timed = fits.time.timed
    assert len(set(timed)) == len(timed) < 25


def test_a_budget_out_of_reach_says_so(judge: Judge) -> None:
    with pytest.raises(InfeasibleBudgetError, match="no plan meets the budget"):
        field_of(judge, fits_at(judge, 50.0))


def test_without_a_budget_parameters_are_the_limit(judge: Judge) -> None:
    shape = Shape(8, 4, 96, 5)
    fits = no_larger(judge.dense, shape)
    field = field_of(judge, fits, most=8)
    most = parameters_at(judge.layout, shape)
    assert all(slim(judge.dense, each.plan).num_parameters() <= most and each.ms is None for each in field)
    assert math.isinf(fits.limit_ms)


def test_sizes_are_limits_too(judge: Judge) -> None:
    parameters = parameters_at(judge.layout, replace(judge.layout.dense, num_hidden_layers=6))
    fits = fits_of(judge.dense, LatencyBudget(max_parameters=parameters, seq_len=16))
    assert fits.time is None
    assert deepest(judge, fits) == 6
    memory = fits_of(judge.dense, LatencyBudget(max_memory=4 * parameters, seq_len=16))
    assert 0 < deepest(judge, memory) < 6  # the cache needs room as well


@pytest.mark.parametrize(("fits", "found"), [(lambda v: v < 5, 4), (lambda v: True, 7), (lambda v: False, None)])
def test_largest(fits: Callable[[int], bool], found: int | None) -> None:
    assert largest(range(1, 8), fits) == found


@pytest.mark.parametrize("head", ["llama-bare", "vit-multi"])
def test_outputs_that_are_not_one_class_of_several_are_compared_as_they_are(head: str) -> None:
    model = build(HEADS[head].row)
    batches = [inputs_of(model)]
    judge = Judge(model, batches)
    plan = judge.without([1])
    assert judge.loss(plan) == pytest.approx(divergence(model, slim(model, plan).eval(), batches)[1], rel=1e-5)
    assert judge.loss(plan) > 0


def test_without_batches_nothing_is_judged() -> None:
    with pytest.raises(HawAdaError, match="no calibration batches"):
        Judge(model_of(), [])


def test_a_search_gives_its_answer_and_the_best_of_what_it_timed(judge: Judge) -> None:
    dense = judge.layout.dense
    shapes = [replace(dense, num_hidden_layers=6, intermediate_size=size) for size in (32, 48, 64, 96)]
    timed = [
        Timed(shape, 1.0, 0.0, 1, 1.0, measured_ms=1.0, measured_loss=loss)
        for shape, loss in zip(shapes, (0.4, 0.3, 0.2, 0.1), strict=True)
    ]
    answer = judge.at(shapes[1], (2, 5))
    result = SearchResult(
        LatencyBudget(speedup=1.5, seq_len=16),
        timed[1],
        answer,
        9.0,
        6.0,
        (),
        tuple(timed),
        table=cast(Any, None),
        rounds=1,
    )
    fits = fits_at(judge, 1.5)
    found = list(searched(result)(judge, fits))
    assert found[0] == answer
    assert [plan.shape for plan in found[1:]] == [shape for shape in (shapes[2], shapes[0]) if fits(shape)]
    assert not fits(shapes[3])
    least = sorted(sorted(range(LAYERS), key=lambda layer: judge.influence[layer])[:2])
    assert all(dropped(plan) == least for plan in found[1:])
