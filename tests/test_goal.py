"""What gates are trained towards."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, build, gate

from hawada_peft import Shape, collect_gates
from hawada_peft.gates.reading import axes_of
from hawada_peft.training.goal import Goal

DENSE, SLIM = Shape(8, 4, 96, 4), Shape(4, 2, 40, 2)


def test_axes_hold_every_gate_once() -> None:
    model = gate(build(LM_ROW), gates=(*EVERYTHING, "hidden"))
    axes = axes_of(model)
    assert {name: len(gates) for name, gates in axes.items()} == {
        "num_attention_heads": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 12,
        "hidden_size": 1,
    }
    assert {id(found) for gates in axes.values() for found in gates} == set(map(id, collect_gates(model).values()))


def test_only_the_active_adapter_counts() -> None:
    model = gate(build(LM_ROW), gates=("ffn",))
    model.add_adapter("other", model.peft_config["default"])
    gates = set(map(id, collect_gates(model, "default").values()))
    assert {id(found) for found in axes_of(model)["intermediate_size"]} == gates


def test_axes_are_drawn_to_their_ratios_which_fall_with_progress() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    goal = Goal(model, SLIM)
    ratios = {"num_attention_heads": 4 / 8, "intermediate_size": 40 / 96, "num_hidden_layers": 2 / 4}
    for progress in (0.25, 1.0):
        expected = sum((progress * (1 - ratio)) ** 2 for ratio in ratios.values())
        assert goal.penalty(progress).item() == pytest.approx(expected)
    for axis, gates in axes_of(model).items():
        thetas = torch.cat([found.theta.detach().flatten() for found in gates])
        thetas[round(ratios[axis] * len(thetas)) :] = -30.0
        for found, part in zip(gates, thetas.split([found.units for found in gates]), strict=True):
            found.theta.data.copy_(part)
    assert goal.penalty(1.0).item() == pytest.approx(0, abs=1e-6)


def test_axes_that_stay_are_not_drawn() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    Goal(model, Shape(8, 4, 48, 4)).penalty(1.0).backward()
    for axis, gates in axes_of(model).items():
        assert [found.theta.grad is not None for found in gates] == [axis == "intermediate_size"] * len(gates)


def test_nothing_is_drawn_to_the_dense_shape() -> None:
    penalty = Goal(gate(build(LM_ROW)), DENSE).penalty(1.0)
    assert float(penalty) == 0.0


def test_a_shape_survives_json() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    goal, other = Goal(model, SLIM), Goal(model, DENSE)
    other.load_state_dict(json.loads(json.dumps(goal.state_dict())))
    assert other.target == SLIM
    assert torch.equal(other.penalty(0.5), goal.penalty(0.5))
