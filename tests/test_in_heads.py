"""The size of heads as an axis of plans: exact, saved with the adapter, streamed, searched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LM_ROW, VISION_ROW, assert_same_state, build, difference, logits_of, scattered_plan, state_of
from gate_runs import trainer_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from test_narrow_heads import WITHOUT_ROTARY, batches_of, from_zoo, use_half
from test_stream import files_of
from toys import by_shape, once
from transformers import AutoModelForImageClassification, PreTrainedModel

from hawada_peft import (
    HawAdaConfig,
    LatencyBudget,
    Plan,
    SearchResult,
    Shape,
    find_plan,
    init_basis,
    slim,
    slim_checkpoint,
)
from hawada_peft.basis.attach import attach_in_heads, detach_in_heads
from hawada_peft.basis.bases import Bases, gated_bases, plan_turn
from hawada_peft.basis.heads.find import find_in_heads
from hawada_peft.basis.stored import load_basis, save_basis
from hawada_peft.errors import HawAdaError, IllegalShapeError, InvalidPlanError, UnsupportedModelError
from hawada_peft.gates.reading import head_maps
from hawada_peft.latency.build import random_shapes
from hawada_peft.latency.regime import Regime
from hawada_peft.race.candidates import searched
from hawada_peft.race.fits import no_larger
from hawada_peft.race.judge import Judge
from hawada_peft.search.narrow import NarrowTables
from hawada_peft.search.space import narrower_heads
from hawada_peft.search.timed import measure_table
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.legality import legal_head_shapes

CALL = Regime(mode="forward")


def gated(base: PreTrainedModel, **fields: Any) -> PeftModel:
    """With bases inside of its heads."""
    model = get_peft_model(base, HawAdaConfig(**{"narrow_heads": True, **fields}))
    init_basis(model, batches_of(base))
    return model


def narrowed(plan: Plan, head_dim: int) -> Plan:
    return replace(plan, head_dim=head_dim, dense=replace(plan.dense, head_dim=8))


def assert_same_weights(found: Path, expected: Path) -> None:
    assert files_of(found) == files_of(expected)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, gates with a plan of smaller heads in `adapter`, what it computes in `logits.pt`."""
    folder = tmp_path_factory.mktemp("adapted")
    base = build(VISION_ROW)
    base.save_pretrained(folder / "base")
    model = gated(base, init_weights=False, temperature=4.0)
    model.apply_plan(narrowed(scattered_plan(model, Shape(3, 3, 50)), 4))
    model.save_pretrained(folder / "adapter")
    torch.save(logits_of(model), folder / "logits.pt")
    return folder


# ------------------------------------------------------------------- exact


@pytest.mark.parametrize("name", WITHOUT_ROTARY)
def test_masked_and_slim_models_are_the_same_in_float64(name: str) -> None:
    base = from_zoo(name)
    before = state_of(base)
    model = gated(base, init_weights=False, temperature=4.0).double()
    heads, layers = base.config.num_attention_heads, base.config.num_hidden_layers
    plan = narrowed(scattered_plan(model, Shape(heads - 1, heads - 1, num_hidden_layers=layers - 1)), 5)
    model.apply_plan(plan)
    masked = logits_of(model)
    small = model.merge_and_unload()
    assert (small.config.head_dim, small.config.num_attention_heads) == (5, heads - 1)
    assert locate(small).head_dim == 5
    assert difference(logits_of(small), masked) <= 1e-12
    assert_same_state(state_of(base), before)
    shared = {tensor.untyped_storage().data_ptr() for tensor in base.state_dict().values()}
    assert shared.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in small.state_dict().values())


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_with_directions_of_the_stream(name: str) -> None:
    base = from_zoo(name)
    fields = {"gates": ("heads", "ffn", "layers", "hidden"), "rotate": True}
    model = gated(base, init_weights=False, temperature=4.0, **fields).double()
    plan = model.plan(Shape(6, 6, 96, hidden_size=48, head_dim=3))
    assert (plan.rotated, plan.head_dim) == (True, 3)
    model.apply_plan(plan)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-6  # float32 norms


@pytest.mark.parametrize("fold", [True, False])
def test_with_lora_below_and_after_a_merge_in_place(fold: bool) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    plain = narrowed(Plan.keep_all(locate(build(VISION_ROW)).dense), 4)
    model = gated(build(VISION_ROW, torch.float64), lora=lora).double()
    model.apply_plan(plain)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload(fold=fold)), masked) <= 1e-10
    model = gated(build(VISION_ROW, torch.float64), init_weights=False, temperature=4.0).double()
    model.apply_plan(plain)
    masked = logits_of(model)
    model.merge_adapter()
    assert difference(logits_of(model), masked) <= 1e-10
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), masked)
    with model.disable_adapter():
        assert difference(logits_of(model), logits_of(build(VISION_ROW, torch.float64))) <= 1e-10


def test_heads_that_need_no_more_features_lose_nothing() -> None:
    base = build(VISION_ROW, torch.float64)
    use_half(base)
    expected, model = logits_of(base), gated(base)
    for size, most in ((4, 1e-5), (3, 1)):
        model.apply_plan(model.plan(Shape(head_dim=size)))
        assert difference(logits_of(model), expected) <= most
    assert difference(logits_of(model), expected) > 1e-3
    model.apply_plan(None)
    assert torch.equal(logits_of(model), expected)


def test_every_row_has_its_own_adapter() -> None:
    model = gated(build(VISION_ROW)).eval()
    model.add_adapter("wide", HawAdaConfig())
    model.apply_plan(model.plan(Shape(head_dim=3)))
    narrow, inputs = logits_of(model), batches_of(model.get_base_model(), 1)[0]
    images = inputs["pixel_values"].expand(2, -1, -1, -1)
    with torch.no_grad():
        alone = model(pixel_values=images[:1]).logits
        found = model(pixel_values=images, adapter_names=["default", "wide"]).logits
        model.set_adapter("wide")
        wide = model(pixel_values=images[:1]).logits
    assert difference(found, torch.cat([alone, wide])) <= 1e-5
    assert difference(alone, wide) > 1e-3
    assert len(narrow)


# ------------------------------------------------------------------- saved


def test_whoever_has_the_base_and_the_adapter_has_the_slim_model(adapted: Path, tmp_path: Path) -> None:
    masked, base = torch.load(adapted / "logits.pt"), build(VISION_ROW)
    model = PeftModel.from_pretrained(base, adapted / "adapter")
    assert difference(logits_of(model), masked) <= 1e-6
    bases = gated_bases(base, locate(base), ["default"])
    assert bases.heads is not None
    saved = get_peft_model_state_dict(model)
    assert bases.heads.nbytes == sum(t.nbytes for name, t in saved.items() if "in_heads" in name) - 4 * 64 * 4
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "expected")
    assert again.config.head_dim == 4
    assert difference(logits_of(again), masked) <= 1e-5
    slim_checkpoint(adapted / "base", adapted / "adapter", tmp_path / "slim", card=None, verify="full")
    assert_same_weights(tmp_path / "slim", tmp_path / "expected")


def test_a_plan_with_its_basis_in_a_file_needs_no_adapter(adapted: Path, tmp_path: Path) -> None:
    base = build(VISION_ROW)
    model = PeftModel.from_pretrained(base, adapted / "adapter")
    plan, bases = model.applied_plan(), gated_bases(base, locate(base), ["default"])
    assert Plan.from_json(plan.to_json()) == plan
    save_basis(bases, tmp_path / "basis")
    found = load_basis(tmp_path / "basis")
    dense = build(VISION_ROW)
    slim(dense, plan, turn=plan_turn(dense, plan, found)).save_pretrained(tmp_path / "expected")
    slim_checkpoint(adapted / "base", None, tmp_path / "slim", plan=plan, basis=found, card=None, verify="full")
    assert_same_weights(tmp_path / "slim", tmp_path / "expected")
    refitted = slim_checkpoint(
        adapted / "base", None, tmp_path / "refitted", plan=plan, basis=found, calibration=batches_of(dense)
    )
    assert locate(refitted.model).head_dim == 4
    with pytest.raises(InvalidPlanError, match="pass it as `basis`"):
        slim_checkpoint(adapted / "base", None, tmp_path / "other", plan=plan, card=None)


def test_a_refit_wins_back_what_heads_have_in_common(adapted: Path) -> None:
    model = PeftModel.from_pretrained(build(VISION_ROW), adapted / "adapter")
    report = model.slim(calibration=batches_of(model.get_base_model())).reconstruction
    assert report.after < report.before


def test_bases_stay_float32() -> None:
    model = gated(build(VISION_ROW, torch.bfloat16)).half()
    base = model.get_base_model()
    assert {each.into.dtype for pair in head_maps(base, locate(base), "default") for each in pair} == {torch.float32}


# ------------------------------------------------------------------- come and go


@pytest.mark.parametrize("gates", [("ffn",), ("heads", "layers")], ids=str)
def test_bases_come_and_go(gates: tuple[str, ...], tmp_path: Path) -> None:
    model = get_peft_model(build(VISION_ROW), HawAdaConfig(gates=gates))
    before, config, logits = get_peft_model_state_dict(model), model.peft_config["default"].to_dict(), logits_of(model)
    attach_in_heads(model, "default")
    init_basis(model, batches_of(model.get_base_model()))
    assert torch.equal(logits_of(model), logits)
    model.apply_plan(model.plan(Shape(head_dim=4)))
    masked = logits_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(build(VISION_ROW), tmp_path)), masked)
    model.apply_plan(None)
    detach_in_heads(model, "default")
    assert set(get_peft_model_state_dict(model)) == set(before)
    assert model.peft_config["default"].to_dict() == config
    assert_same_state(state_of(model.unload()), state_of(build(VISION_ROW)))


# ------------------------------------------------------------------- search


def by_features(shape: Shape) -> float:
    """Only smaller heads, or fewer layers, make it faster."""
    return (shape.num_hidden_layers or 0) * (1 + (shape.head_dim or 0))


def by_all(shape: Shape) -> float:
    sizes = shape.to_dict()
    inner = 4 * sizes["num_attention_heads"] * sizes["head_dim"] + 2 * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * (1 + sizes["hidden_size"] * inner / 10**4)


SMALL = {"attention_sizes": 2, "ffn_sizes": 2, "whole_shapes": 1, "depth": 2}


OPTIONS = {"effort": once(by_shape(by_features), **SMALL), "hidden_sizes": []}
BUDGET = LatencyBudget(speedup=1.15)


@pytest.fixture(scope="module")
def searched_model() -> tuple[PeftModel, SearchResult]:
    """Gates on FFN channels alone, and what a search for a budget that these cannot meet has found."""
    model = get_peft_model(build(VISION_ROW), HawAdaConfig(gates=("ffn",)))
    return model, find_plan(model, BUDGET, batches_of(build(VISION_ROW)), **OPTIONS)


def test_a_search_finds_sizes_of_heads_by_itself(searched_model: tuple[PeftModel, SearchResult]) -> None:
    model, result = searched_model
    assert result.plan.head_dim == result.best.shape.head_dim == 6
    assert "basis inside each head" in result.steps["head_dim"]
    dense = logits_of(build(VISION_ROW))
    assert difference(logits_of(model), dense) <= 1e-5
    model.apply_plan(result.plan)
    masked = logits_of(model)
    assert difference(masked, dense) > 1e-4
    with model.base_model.beside() as (_, small):
        assert difference(logits_of(small), masked) <= 1e-5


def test_a_search_without_bases_leaves_the_adapter_as_it_is() -> None:
    model = get_peft_model(build(VISION_ROW), HawAdaConfig(gates=("ffn",)))
    config = model.peft_config["default"].to_dict()
    with pytest.raises(HawAdaError, match="no legal shape"):
        find_plan(model, BUDGET, batches_of(build(VISION_ROW)), **OPTIONS, rotate=False)
    few = [{"pixel_values": batches_of(build(VISION_ROW))[0]["pixel_values"][:2]}]  # positions for no basis
    with pytest.raises(HawAdaError, match="no legal shape"):
        find_plan(model, BUDGET, few, **OPTIONS)
    assert model.peft_config["default"].to_dict() == config


def test_tables_of_narrower_heads_and_streams_are_as_good_as_others() -> None:
    model = build(VISION_ROW)
    effort = once(by_shape(by_all), whole_shapes=2)
    one = [Shape(hidden_size=size) for size in (56, 48, 40)]
    other = [Shape(head_dim=size) for size in narrower_heads(locate(model))]
    assert other == [Shape(head_dim=size) for size in (6, 4, 2)]
    tables = NarrowTables(model, measure_table(model, CALL, effort=effort), [*one, *other], effort)
    both = [replace(mine, head_dim=theirs.head_dim) for mine in one for theirs in other]
    layout = locate(model)
    for size in [*one, *other, *both]:
        table = tables(size)
        widest = replace(layout.narrowed(size.hidden_size), head_dim=size.head_dim)
        shapes = random_shapes(widest, legal_head_shapes(layout, size.hidden_size), table.multiple, 20, seed=7)
        errors = [abs(table.estimate(shape) / by_all(shape.complete(layout.full)) - 1) for shape in shapes]
        assert np.percentile(errors, 95) <= 0.01
        assert table.dense_ms == pytest.approx(by_all(layout.full), rel=1e-3)


# ------------------------------------------------------------------- refused


def test_what_cannot_be_narrowed_is_not_searched_and_refused_if_asked_for() -> None:
    with pytest.raises(UnsupportedModelError, match="a shift of all keys"):
        get_peft_model(build(LM_ROW), HawAdaConfig(narrow_heads=True))
    model = get_peft_model(build(LM_ROW), HawAdaConfig(gates=("layers",)))
    batches = batches_of(build(LM_ROW))
    effort = once(by_shape(lambda shape: 1.0 + (shape.num_hidden_layers or 0)), **SMALL)
    options = {"effort": effort, "refit": False, "hidden_sizes": []}
    result = find_plan(model, LatencyBudget(speedup=1.15, seq_len=8), batches, **options)
    assert "head_dim" not in result.steps
    assert result.plan.head_dim is None


def test_plans_of_other_adapters_are_refused(adapted: Path) -> None:
    plan = PeftModel.from_pretrained(build(VISION_ROW), adapted / "adapter").applied_plan()
    model = get_peft_model(build(VISION_ROW), HawAdaConfig(init_weights=False))
    with pytest.raises(InvalidPlanError, match="narrow_heads=True"):
        model.apply_plan(plan)
    with pytest.raises(InvalidPlanError, match="narrow_heads=True"):
        model.plan(Shape(head_dim=4))
    with pytest.raises(InvalidPlanError, match="inside of each head"):
        slim(build(VISION_ROW), plan)
    with pytest.raises(InvalidPlanError, match="pass it as `basis`"):
        plan_turn(build(VISION_ROW), plan, Bases())
    with pytest.raises(IllegalShapeError, match="head_dim 9 exceeds 8"):
        gated(build(VISION_ROW)).plan(Shape(head_dim=9))
    with pytest.raises(InvalidPlanError, match="1 to 8"):
        replace(plan, head_dim=9)
    with pytest.raises(InvalidPlanError, match="given together"):
        replace(plan, head_dim=None)
    with pytest.raises(HawAdaError, match="all layers"):
        HawAdaConfig(narrow_heads=True, layers_to_transform=[0])


# ------------------------------------------------------------------- trained


def test_a_training_for_a_budget_has_narrow_heads_and_goes_on(tmp_path: Path) -> None:
    images = [{"pixel_values": image} for image in batches_of(build(VISION_ROW))[0]["pixel_values"][:16]]

    def trainer() -> Any:
        return trainer_of(
            tmp_path,
            get_peft_model(build(VISION_ROW), HawAdaConfig(gates=("ffn",))),
            shape=None,
            budget=LatencyBudget(speedup=1.15),
            effort=once(by_shape(by_features), **SMALL),
            hidden_sizes=[],
            refit=False,
            train_dataset=images,
            eval_dataset=None,
            args={"save_steps": 3, "save_strategy": "steps", "calibration_examples": 16},
        )

    first = trainer()
    first.train()
    plan = first.gated.applied_plan()
    assert plan.head_dim == 6
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.gated.applied_plan() == plan
    found, expected = (get_peft_model_state_dict(each.gated) for each in (second, first))
    assert_same_state(dict(found), dict(expected))


def test_a_race_takes_what_a_search_has_found(searched_model: tuple[PeftModel, SearchResult]) -> None:
    dense, batches = build(VISION_ROW), batches_of(build(VISION_ROW), 8)
    result = searched_model[1]
    judge = Judge(dense, batches, Bases(None, find_in_heads(dense, batches)))
    plans = list(searched(result)(judge, no_larger(dense, locate(dense).dense)))
    assert plans[0] == result.plan
    assert plans[0].head_dim == 6
    assert all(math.isfinite(judge.loss(plan)) for plan in plans)
    blind = Judge(dense, batches)
    assert all(plan.head_dim is None for plan in searched(result)(blind, no_larger(dense, locate(dense).dense)))
