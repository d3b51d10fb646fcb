"""Directions of the residual stream in a search: gates that come with it, and stay if the plan is about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BARE_ROW, LM_ROW, VISION_ROW, Row, assert_same_state, build, difference, logits_of, state_of
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from test_basis import calibration
from test_trainer import trainer_of
from toys import REGIME, StoppedClock, by_shape, once

from hawada_peft import HawAdaConfig, LatencyBudget, SearchResult, Shape, collect_gates, find_plan, slim_checkpoint
from hawada_peft.basis.attach import attach_directions, detach_directions
from hawada_peft.basis.basis import basis_gate
from hawada_peft.basis.find import find_basis
from hawada_peft.errors import HawAdaError, IllegalShapeError, UnsupportedModelError
from hawada_peft.latency.build import random_shapes
from hawada_peft.search.narrow import NarrowTables
from hawada_peft.search.space import search_space
from hawada_peft.search.timed import measure_table
from hawada_peft.vanilla.family import FAMILIES, locate, register_family
from hawada_peft.vanilla.legality import legal_head_shapes

pytestmark = pytest.mark.filterwarnings("ignore::hawada_peft.errors.UntiedEmbeddingsWarning")
two_rows = pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])


def by_width(shape: Shape) -> float:
    """Only a narrower stream, or fewer layers, make it faster."""
    return (shape.num_hidden_layers or 0) * (1 + 8 * (shape.hidden_size or 0) / 64)


def searched(model: PeftModel, batches: Sequence[Any], **options: Any) -> SearchResult:
    small = {"attention_sizes": 2, "ffn_sizes": 2, "whole_shapes": 1, "depth": 2}
    given = {"effort": once(by_shape(by_width), **small), "refit": False, "hidden_sizes": [48, 32]} | options
    seq_len = None if "pixel_values" in batches[0] else 8
    return find_plan(model, LatencyBudget(speedup=1.15, seq_len=seq_len), batches, **given)


def hidden(size: int) -> Shape:
    return Shape(hidden_size=size)


def keys_of(model: PeftModel) -> set[str]:
    return set(get_peft_model_state_dict(model))


def fresh(row: Row, *gates: str) -> PeftModel:
    return get_peft_model(build(row), HawAdaConfig(gates=gates or ("ffn",)))


# ------------------------------------------------------------------- attach


@two_rows
def test_gates_come_and_go(row: Row) -> None:
    model = fresh(row)
    before, config, logits = keys_of(model), model.peft_config["default"].to_dict(), logits_of(model)
    attach_directions(model, "default")
    assert torch.equal(logits_of(model), logits)
    same = get_peft_model(build(row), HawAdaConfig(gates=("ffn", "hidden"), rotate=True))
    assert keys_of(model) == keys_of(same)
    assert model.peft_config["default"].to_dict() == same.peft_config["default"].to_dict()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in same.named_parameters() if parameter.requires_grad}
    detach_directions(model, "default")
    assert keys_of(model) == before
    assert model.peft_config["default"].to_dict() == config
    assert_same_state(state_of(model.unload()), state_of(build(row)))


def test_another_adapters_gates_stay() -> None:
    model = fresh(LM_ROW, "hidden")
    model.add_adapter("second", HawAdaConfig(gates=("ffn",)))
    model.set_adapter("second")
    before = keys_of(model)
    attach_directions(model, "second")
    detach_directions(model, "second")
    assert keys_of(model) == before
    assert {name.split(".")[-1] for name in collect_gates(model)} == {"default", "second"}
    assert list(model.active_adapters) == ["second"]
    assert len(logits_of(model))


def test_gates_of_some_layers_get_none_on_the_stream() -> None:
    model = get_peft_model(build(LM_ROW), HawAdaConfig(gates=("ffn",), layers_to_transform=[0]))
    with pytest.raises(UnsupportedModelError, match="one for all layers"):
        attach_directions(model, "default")


# ------------------------------------------------------------------- search


@two_rows
def test_a_search_finds_hidden_sizes_by_itself(row: Row, tmp_path: Path) -> None:
    """Whoever has the original base and the adapter loads, merges and streams what the search has found."""
    base = build(row)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, HawAdaConfig(gates=("ffn",)))
    dense = logits_of(model)
    result = searched(model, calibration(model))
    assert result.plan.rotated
    assert result.best.shape.hidden_size == 48
    assert "by directions" in result.steps["hidden_size"]
    assert difference(logits_of(model), dense) <= 1e-5
    model.apply_plan(result.plan)
    masked = logits_of(model)
    assert difference(masked, dense) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build(row), tmp_path / "adapter")
    assert torch.equal(logits_of(again), masked)
    merged = again.merge_and_unload()
    assert locate(merged).full.hidden_size == 48
    assert difference(logits_of(merged), masked) <= 1e-5
    slim_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "slim", card=None)
    merged.save_pretrained(tmp_path / "merged")
    streamed, whole = (tmp_path / name / "model.safetensors" for name in ("slim", "merged"))
    assert streamed.read_bytes() == whole.read_bytes()


def test_the_basis_is_that_of_the_batches() -> None:
    model = fresh(LM_ROW)
    searched(model, calibration(model))
    gate = basis_gate(model.get_base_model(), locate(model.get_base_model()), "default")
    assert gate is not None
    assert torch.equal(gate.vectors, find_basis(build(LM_ROW), calibration(model)).vectors)


@pytest.mark.parametrize("forbid", ["rotate", "budget"])
def test_an_adapter_without_a_use_for_directions_stays_as_it_is(forbid: str) -> None:
    model = fresh(LM_ROW, "ffn", "layers")
    before, config = keys_of(model), model.peft_config["default"].to_dict()
    seen: set[int] = set()

    def law(shape: Shape) -> float:
        seen.add(shape.hidden_size or 0)
        return shape.num_hidden_layers or 0  # a narrower stream is no use

    options = {"rotate": False} if forbid == "rotate" else {"effort": once(by_shape(law), whole_shapes=1)}
    result = searched(model, calibration(model), **options)
    assert not result.plan.rotated
    assert keys_of(model) == before
    assert model.peft_config["default"].to_dict() == config
    assert seen == (set() if forbid == "rotate" else {64, 48, 32})


def test_directions_are_left_out_where_too_little_is_known_of_them() -> None:
    model = fresh(LM_ROW, "layers")
    few = [{"input_ids": calibration(model)[0]["input_ids"][:2, :8]}]
    result = searched(model, few)
    assert not result.plan.rotated
    assert "16 positions" in result.steps["hidden_size"]
    with pytest.raises(HawAdaError, match="16 positions"):
        searched(model, few, rotate=True)
    assert "hidden" not in model.peft_config["default"].gates


def test_directions_are_left_out_where_they_are_not_exact(rows_of_families: None) -> None:
    register_family("llama", replace(FAMILIES["llama"], hidden_norms=(), final_norm="", twin="", twin_fields=()))
    model = fresh(LM_ROW, "layers")
    result = searched(model, calibration(model), hidden_sizes=None)
    assert not result.plan.rotated
    assert "hidden_norms" in result.steps["hidden_size"]
    with pytest.raises(UnsupportedModelError, match="hidden_norms"):
        searched(model, calibration(model), rotate=True)


def test_gates_on_channels_stay_what_they_are() -> None:
    model = fresh(LM_ROW, "hidden")
    assert not searched(model, calibration(model)).plan.rotated
    with pytest.raises(UnsupportedModelError, match="gates channels"):
        searched(model, calibration(model), rotate=True)


def test_a_search_that_fails_leaves_no_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = fresh(LM_ROW)
    before = keys_of(model)
    monkeypatch.setattr("hawada_peft.search.budgeted.search_all_sizes", fail)
    with pytest.raises(KeyboardInterrupt):
        searched(model, calibration(model))
    assert keys_of(model) == before


def test_a_model_without_a_head_is_searched_too() -> None:
    model = fresh(BARE_ROW)
    assert searched(model, calibration(model)).plan.rotated


# ------------------------------------------------------------------ trainer


def test_a_training_for_a_budget_has_directions_and_goes_on(tmp_path: Path) -> None:
    def trainer() -> Any:
        small = {"attention_sizes": 2, "ffn_sizes": 2, "whole_shapes": 1, "depth": 2}
        return trainer_of(
            tmp_path,
            fresh(LM_ROW, "ffn"),
            shape=None,
            budget=LatencyBudget(speedup=1.15, seq_len=8),
            effort=once(by_shape(by_width), **small),
            hidden_sizes=[48],
            refit=False,
            args={"save_steps": 3, "save_strategy": "steps", "calibration_examples": 16},
        )

    first = trainer()
    first.train()
    plan = first.gated.applied_plan()
    assert plan.rotated
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.gated.applied_plan() == plan
    found, expected = (get_peft_model_state_dict(each.gated) for each in (second, first))
    assert_same_state(dict(found), dict(expected))


@pytest.mark.parametrize("constant", [False, True])
def test_what_is_untied_counts(constant: bool) -> None:
    """A budget of parameters is met by the model that is exported."""
    base = build(LM_ROW, tie_word_embeddings=True)
    if constant:
        base.model.norm.weight.data.fill_(0.5)
    model = get_peft_model(base, HawAdaConfig(gates=("ffn",)))
    result = searched(model, calibration(model))
    assert result.best.shape.hidden_size == 48
    model.apply_plan(result.plan)
    small = model.merge_and_unload()
    assert small.num_parameters() == result.best.parameters
    assert small.config.tie_word_embeddings == constant


# ------------------------------------------------------------------ latency


def narrow_law(shape: Shape) -> float:
    """Hidden and inner sizes multiply."""
    heads, _, ffn, layers = shape.sizes().values()
    hidden = shape.hidden_size or 64
    return 0.3 + layers * (0.05 + hidden * (8 * heads * 3 + 3 * ffn) / 20_000 + hidden / 400)


def test_estimates_of_narrower_streams_are_as_good_as_others() -> None:
    """As a search has them: one hidden size is measured, and those between it and the dense one follow."""
    sizes, model = (56, 48, 40, 32, 24), build(LM_ROW)
    seen: dict[int, set[Shape]] = {size: set() for size in (64, *sizes)}

    def law(shape: Shape) -> float:
        seen[shape.hidden_size or 64].add(shape)
        return narrow_law(shape)

    layout, effort = locate(model), once(by_shape(law), whole_shapes=2)
    tables = NarrowTables(model, measure_table(model, REGIME, effort=effort), [*map(hidden, sizes)], effort)
    for size in sizes:
        for table in (tables.expected(hidden(size)), tables(hidden(size))):
            heads = legal_head_shapes(layout, size)
            shapes = random_shapes(layout.narrowed(size), heads, table.multiple, 30, seed=7)
            assert {shape.hidden_size for shape in shapes} == {size}
            errors = [abs(table.estimate(shape) / narrow_law(shape) - 1) for shape in shapes]
            assert np.median(errors) <= 0.03
            assert np.percentile(errors, 95) <= 0.08
            assert table.dense_ms == pytest.approx(narrow_law(layout.dense), rel=1e-3)
    assert [len(seen[size]) for size in sizes[:-1]] == [3] * 4
    assert len(seen[24]) < len(seen[64])


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        ({"speedup": 1.1}, [40, 24]),
        ({"speedup": 2}, [24]),
        ({"speedup": 9}, []),
        ({"max_parameters": 10**9}, [56, 40, 24]),
    ],
    ids=str,
)
def test_hidden_sizes_that_meet_a_budget_by_themselves_are_known(budget: dict[str, Any], met: list[int]) -> None:
    sizes, model, effort = (56, 40, 24), build(LM_ROW), once(by_shape(narrow_law), whole_shapes=2)
    tables = NarrowTables(model, measure_table(model, REGIME, effort=effort), [*map(hidden, sizes)], effort)
    spaces = [search_space(locate(model), REGIME, multiple=8, hidden_size=size) for size in sizes]
    found = [space.hidden_size for space in spaces if tables.meets(LatencyBudget(**budget), space)]
    assert found == met


def test_tables_of_narrower_streams_are_kept(tmp_path: Path) -> None:
    model = build(LM_ROW)
    effort = replace(once(by_shape(narrow_law), whole_shapes=2), cache=tmp_path)
    table = measure_table(model, REGIME, effort=effort)
    sizes = [hidden(48), hidden(32)]
    first = NarrowTables(model, table, sizes, effort)
    found = [first(size) for size in sizes]
    again = NarrowTables(model, table, sizes, replace(effort, clock=StoppedClock()))
    assert [again(size) for size in sizes] == found
    assert [each.base_sizes["hidden_size"] for each in found] == [48, 32]


def test_a_narrower_stream_that_does_not_exist_is_refused_before_any_work() -> None:
    model, effort = build(LM_ROW), once(StoppedClock())
    table = measure_table(model, REGIME, effort=once(by_shape(narrow_law)))
    with pytest.raises(IllegalShapeError, match="nearest"):
        NarrowTables(model, table, [hidden(48), hidden(44)], effort)
