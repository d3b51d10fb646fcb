"""The plan: its checks and its JSON form."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import Export

from hawada_peft import Plan, Shape
from hawada_peft.errors import HawAdaError, IncompatibleBaseError, InvalidPlanError

DENSE = Shape(8, 4, 12, 3)
PLAN = Plan(DENSE, layers=(0, 2), heads=((0, 3), (4, 6)), channels=((0, 5, 11), (1, 2, 3)))


def test_shape_and_groups_follow_from_the_indices() -> None:
    assert PLAN.kv_groups == ((0, 1), (2, 3))
    assert PLAN.shape == Shape(2, 2, 3, 2)
    assert not PLAN.keeps_all


def test_keep_all_removes_nothing() -> None:
    plan = Plan.keep_all(DENSE)
    assert plan.keeps_all
    assert plan.shape == plan.dense == DENSE


def test_round_trip(exported: Export) -> None:
    assert Plan.from_json(exported.plan.to_json()) == exported.plan


@pytest.mark.parametrize("plan", [PLAN, Plan.keep_all(DENSE)])
def test_dict_is_plain_json(plan: Plan) -> None:
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert Plan.from_dict(plan.to_dict()) == plan


def test_text_names_sizes_and_dropped_layers() -> None:
    assert "num_attention_heads 2/8" in str(PLAN)
    assert "dropped layers [1]" in str(PLAN)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"layers": ()}, "layers: at least one"),
        ({"layers": (2, 0)}, "layers: kept indices must rise and lie in 0..2, got \\[2, 0\\]"),
        ({"layers": (0, 3)}, "0..2, got \\[0, 3\\]"),
        ({"heads": ((0, 3),)}, "heads must have one entry per kept layer \\(2\\), got 1"),
        ({"heads": ((0, 3), (4, 6, 7))}, "same number of heads, got \\[2, 3\\]"),
        ({"heads": ((0, 8), (4, 6))}, "heads of layer 0.*0..7"),
        ({"heads": ((-1, 3), (4, 6))}, "heads of layer 0.*0..7"),
        ({"heads": ((0, 1, 2), (0, 1, 2))}, "every kept group the same number"),
        ({"heads": ((0, 1), (4, 6))}, "same number of KV groups"),
        ({"channels": ((0, 0, 1), (1, 2, 3))}, "channels of layer 0.*must rise"),
        ({"channels": ((), ())}, "channels of layer 0: at least one"),
        ({"channels": ((0, 12), (1, 2))}, "0..11"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], facts: str) -> None:
    with pytest.raises(InvalidPlanError, match=facts):
        replace(PLAN, **changes)


def test_all_contradictions_are_reported_at_once() -> None:
    with pytest.raises(InvalidPlanError) as caught:
        replace(PLAN, layers=(0, 3), channels=((0, 12), (1,)))
    assert {"layers", "channels"} <= set(str(caught.value).replace(":", "").split())


def test_plan_for_another_base_is_refused() -> None:
    PLAN.check_base(DENSE)
    with pytest.raises(IncompatibleBaseError, match="intermediate_size: plan 12, model 16; num_hidden_layers: plan 3"):
        PLAN.check_base(Shape(8, 4, 16, 4))


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        ({}, "format None; this version reads 1"),
        ({"format": 2}, "format 2"),
        ({"format": 1, "layers": [0]}, "lacks \\['channels', 'dense', 'heads'\\]"),
    ],
)
def test_unreadable_plans_are_refused(data: dict[str, Any], facts: str) -> None:
    with pytest.raises(InvalidPlanError, match=facts):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "change", [{"channels": ["zz", "e"]}, {"heads": [0, 1]}, {"layers": "ab"}, {"layers": [0.5, 1]}]
)
def test_damaged_plans_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlanError):
        Plan.from_dict(PLAN.to_dict() | change)


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="not JSON"):
        Plan.from_json("channels: all")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


NO_JSON_OF_A_PLAN = [5, 2.5, True, "abc", [], {}, [[]], [1.5], ["a"], [True], {"a": 1}, [-1], nested(50), nested(5000)]


@pytest.mark.parametrize("value", NO_JSON_OF_A_PLAN, ids=range(len(NO_JSON_OF_A_PLAN)))
@pytest.mark.parametrize("field", ["dense", "layers", "heads", "channels", "hidden", "roundings", "format"])
def test_fields_of_other_types_are_refused_with_what_is_allowed(field: str, value: Any) -> None:
    data = Plan.keep_all(DENSE).to_dict() | {field: value}
    if (field, value) in (("roundings", []), ("format", True)):
        return
    with pytest.raises(HawAdaError) as caught:
        Plan.from_dict(data)
    assert field.removesuffix("s") in str(caught.value) or "sizes" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_masks_that_are_none_are_refused() -> None:
    data = Plan.keep_all(DENSE).to_dict()
    for mask in ("-1", "0x1", "", " 1", "f" * 10_000, "g"):
        with pytest.raises(InvalidPlanError, match="channels must be a list of bit masks"):
            Plan.from_dict(data | {"channels": [mask] * len(data["layers"])})


def test_json_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="not JSON"):
        Plan.from_json("[" * 100_000)


def test_what_a_notebook_shows_of_a_plan_is_short() -> None:
    dense = Shape(32, 8, 8192, 16)
    assert len(repr(Plan.keep_all(dense))) < 300
    assert repr(Plan.keep_all(dense)) == str(Plan.keep_all(dense))
