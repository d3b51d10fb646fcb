"""What became of sizes that were asked for, and why: told with the plan, and nothing the plan is compared by."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import LM_ROW, VISION_ROW, Row, build, gate

from hawada_peft import Plan, Shape
from hawada_peft.planning.reasons import AS_ASKED


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["groups", "no groups"])
@pytest.mark.parametrize(
    "ratios", [{"heads": 0.6, "ffn": 0.41, "layers": 0.6}, {"heads": 0.5, "ffn": 0.5, "layers": 0.5}]
)
def test_a_keep_ratio_is_told_beside_what_it_became(row: Row, ratios: dict[str, float]) -> None:
    model = gate(build(row))
    plan = model.plan(keep_ratio=ratios)
    dense, slim = plan.dense.to_dict(), plan.shape.to_dict()
    names = {"heads": "num_attention_heads", "ffn": "intermediate_size", "layers": "num_hidden_layers"}
    assert {each.axis: each.asked for each in plan.roundings} == {
        name: pytest.approx(ratios[axis] * dense[name]) for axis, name in names.items()
    }
    for each in plan.roundings:
        assert each.chosen == slim[each.axis]
        assert each.source == "keep ratio"
        assert (each.reason == AS_ASKED) == (each.asked == each.chosen)


def test_the_config_class_says_why_heads_are_not_legal() -> None:
    plan = gate(build(LM_ROW)).plan(keep_ratio={"heads": 6 / 8})
    (heads,) = plan.roundings
    assert heads.asked == pytest.approx(6)
    assert heads.chosen != 6
    assert "LlamaConfig refuses" in heads.reason


def test_the_config_class_says_why_a_hidden_size_is_not_legal() -> None:
    model = build(LM_ROW, hidden_size=144, num_attention_heads=9, num_key_value_heads=3, head_dim=16)
    (hidden,) = gate(model, gates=("hidden",)).plan(keep_ratio={"hidden": 0.72}).roundings
    assert (hidden.asked, hidden.chosen) == (pytest.approx(103.68), 72)
    assert "multiples of 8" in hidden.reason
    assert "The hidden size (104) is not a multiple of the number of attention heads (9)" in hidden.reason


def test_gates_are_given_room() -> None:
    plan = gate(build(LM_ROW)).plan()
    assert {each.axis for each in plan.roundings} == set(plan.dense.to_dict())
    assert all(each.source == "gates" and each.chosen >= each.asked for each in plan.roundings)


def test_a_shape_was_not_rounded() -> None:
    assert gate(build(LM_ROW)).plan(Shape(num_hidden_layers=2)).roundings == ()


def test_roundings_travel_with_the_plan_and_do_not_tell_plans_apart() -> None:
    plan = gate(build(LM_ROW)).plan(keep_ratio=0.5)
    read = Plan.from_json(plan.to_json())
    assert read.roundings == plan.roundings != ()
    bare = dataclasses.replace(plan, roundings=())
    assert (bare, hash(bare)) == (plan, hash(plan))
    assert "roundings" not in bare.to_dict()
