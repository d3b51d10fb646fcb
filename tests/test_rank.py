"""From gates to plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, Row, build, gate, shuffle_gates
from peft import PeftModel

from hawada_peft import HawAdaConfig, Shape, collect_gates
from hawada_peft.errors import BrokenGatesError, IllegalShapeError, InvalidPlanError
from hawada_peft.planning.sizes import ffn_multiple
from hawada_peft.vanilla.family import locate


def set_gate(model: PeftModel, name: str, logits: list[float]) -> None:
    theta = next(g.theta for key, g in collect_gates(model).items() if name in key)
    theta.data[: len(logits)] = torch.tensor(logits)


def opened(**options: Any) -> PeftModel:
    """A model with grouped attention whose gates are all open."""
    model = gate(build(LM_ROW), **options)
    for found in collect_gates(model).values():
        found.theta.data.fill_(3.0)
    return model


def test_a_fresh_adapter_keeps_everything(row: Row) -> None:
    assert gate(build(row), shuffle=False).plan().keeps_all


def test_plan_has_the_shape_asked_for(row: Row) -> None:
    model = gate(build(row))
    plan = model.plan(row.slim)
    assert plan.shape == row.slim
    assert plan.dense == locate(model.get_base_model()).dense


def test_planning_changes_nothing(row: Row) -> None:
    model = gate(build(row))
    before = {name: (g.theta.clone(), g.kept) for name, g in collect_gates(model).items()}
    model.plan(row.slim)
    assert all(torch.equal(g.theta, before[name][0]) and g.kept is None for name, g in collect_gates(model).items())
    assert model.peft_config["default"].plan is None


def test_the_best_channels_stay(row: Row) -> None:
    model = gate(build(row), gates=("ffn",))
    plan = model.plan(Shape(intermediate_size=row.slim.intermediate_size))
    for kept, found in zip(plan.channels, collect_gates(model).values(), strict=True):
        assert sorted(found.theta.topk(len(kept)).indices.tolist()) == list(kept)


def test_the_best_layers_stay() -> None:
    model = opened()
    for layer, logit in enumerate([-1.0, 2.0, -2.0, 1.0]):
        set_gate(model, f"layers.{layer}.self_attn.o_proj.hawada_layer", [logit])
    assert model.plan(Shape(num_hidden_layers=2)).layers == (1, 3)


def test_groups_stay_by_the_sum_of_their_heads() -> None:
    model = opened(gates=("heads",))
    set_gate(model, "layers.1.", [5, -5, 1, 1, 0.2, 0.2, -9, -9])
    plan = model.plan(Shape(4, 2))
    assert plan.heads[1] == (2, 3, 4, 5)
    assert plan.kv_groups[1] == (1, 2)


def test_within_a_group_the_best_heads_stay() -> None:
    model = opened(gates=("heads",))
    set_gate(model, "layers.2.", [1, 0, 0, 1, 1, 0, 0, 1])
    assert model.plan(Shape(4, 4)).heads[2] == (0, 3, 4, 7)


def test_of_equals_the_first_stay() -> None:
    plan = opened().plan(Shape(4, 2, 32, 2))
    assert plan.layers == (0, 1)
    assert plan.heads == ((0, 1, 2, 3),) * 2
    assert plan.channels == (tuple(range(32)),) * 2


def test_channels_of_a_group_stay_together() -> None:
    plan = gate(build(LM_ROW), group_size=8).plan(Shape(intermediate_size=40))
    assert all(len({c // 8 for c in row}) == 5 for row in plan.channels)


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [
        (1.0, Shape(8, 4, 96, 4)),
        (0.5, Shape(4, 4, 48, 4)),
        ({"heads": 0.25}, Shape(2, 2, 96, 4)),
        ({"ffn": 0.7}, Shape(8, 4, 68, 4)),
        ({"layers": 0.6}, Shape(8, 4, 96, 2)),
        ({"heads": 0.01, "ffn": 0.001, "layers": 0.001}, Shape(1, 1, 4, 1)),
    ],
)
def test_keep_ratio_is_rounded_to_legal_sizes(keep_ratio: Any, expected: Shape) -> None:
    assert gate(build(LM_ROW)).plan(keep_ratio=keep_ratio).shape == expected


def test_without_a_shape_closed_gates_go() -> None:
    model = opened()
    set_gate(model, "layers.1.self_attn.o_proj.hawada_layer", [-1])
    for layer in (0, 2, 3):
        set_gate(model, f"layers.{layer}.self_attn.o_proj.hawada_units", [-1, 1, -1, 1, -1, 1, -1, 1])
        set_gate(model, f"layers.{layer}.mlp.down_proj", [-1.0] * 30)
    plan = model.plan()
    assert plan.layers == (0, 2, 3)
    assert plan.heads == ((1, 3, 5, 7),) * 3
    assert plan.shape == Shape(4, 4, 68, 3)  # 66 channels are open; sizes step by 4


def test_when_every_gate_is_closed_one_of_each_stays() -> None:
    model = opened()
    for found in collect_gates(model).values():
        found.theta.data.fill_(-3.0)
    assert model.plan().shape == Shape(1, 1, 4, 1)


def test_adapters_count_together() -> None:
    model = opened(gates=("heads",))
    model.add_adapter("other", HawAdaConfig(gates=("heads",)))
    set_gate(model, "layers.0.self_attn.o_proj.hawada_units.default", [0, 0, 0, 0, 9, 9, 9, 9])
    set_gate(model, "layers.0.self_attn.o_proj.hawada_units.other", [0, 0, 0, 0, -9, -9, 2, 2])
    assert model.plan(Shape(2, 1), adapter_names=["default"]).kv_groups[0] == (2,)
    assert model.plan(Shape(2, 1), adapter_names=["default", "other"]).kv_groups[0] == (3,)


@pytest.mark.parametrize(
    ("dense", "group", "multiple"), [(96, 1, 4), (1024, 1, 64), (8192, 1, 64), (96, 16, 16), (97, 1, 1), (768, 3, 96)]
)
def test_step_of_ffn_sizes(dense: int, group: int, multiple: int) -> None:
    assert ffn_multiple(dense, locate(build(VISION_ROW)), group) == multiple


@pytest.mark.parametrize(
    ("gates", "shape", "axis"),
    [
        (("ffn", "layers"), Shape(num_attention_heads=4), "heads"),
        (("heads", "layers"), Shape(intermediate_size=40), "ffn"),
        (("heads", "ffn"), Shape(num_hidden_layers=2), "layers"),
    ],
)
def test_cutting_what_has_no_gates_is_refused(gates: tuple[str, ...], shape: Shape, axis: str) -> None:
    with pytest.raises(InvalidPlanError, match=rf"no gates on {axis}. Add '{axis}' to the config's `gates`"):
        gate(build(LM_ROW), gates=gates).plan(shape)


def test_gates_on_some_layers_do_not_choose_for_all() -> None:
    model = gate(build(LM_ROW), layers_to_transform=[0, 1])
    with pytest.raises(InvalidPlanError, match="layer 2 has no gates on ffn"):
        model.plan(Shape(intermediate_size=40))


def test_size_that_splits_groups_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="multiple of the gates' group_size 8, got 36"):
        gate(build(LM_ROW), group_size=8).plan(Shape(intermediate_size=36))


@pytest.mark.parametrize(
    ("keep_ratio", "facts"),
    [
        (0, r"heads must be a number in \(0, 1\], got 0\n.*ffn"),
        (1.5, "got 1.5"),
        ({"depth": 0.5}, "unknown axis 'depth'.*layers"),
    ],
)
def test_bad_keep_ratios_are_refused(keep_ratio: Any, facts: str) -> None:
    with pytest.raises(InvalidPlanError, match=facts):
        gate(build(VISION_ROW)).plan(keep_ratio=keep_ratio)


def test_shape_and_ratio_together_are_refused() -> None:
    with pytest.raises(InvalidPlanError, match="either `shape` or `keep_ratio`"):
        gate(build(VISION_ROW)).plan(Shape(), keep_ratio=0.5)


def test_illegal_shape_is_refused() -> None:
    with pytest.raises(IllegalShapeError, match="possible"):
        gate(build(LM_ROW)).plan(Shape(6, 3))


def test_unknown_adapter_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match=r"no adapter \['x'\]; there are \['default'\]"):
        gate(build(VISION_ROW)).plan(Shape(), adapter_names=["x"])


@pytest.mark.parametrize("shape", [None, Shape(), Shape(intermediate_size=40)])
def test_nan_gates_are_refused(shape: Shape | None) -> None:
    model = shuffle_gates(opened())
    set_gate(model, "layers.3.mlp", [float("nan")])
    with pytest.raises(BrokenGatesError, match="NaN"):
        model.plan(shape)
