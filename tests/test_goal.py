"""What gates are trained towards: shapes, and latencies on a machine that obeys a law."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EVERYTHING, LM_ROW, build, gate, scattered_plan
from peft import PeftModel
from toys import CLOCK, once, toy_table

from hawada_peft import LatencyBudget, Shape, collect_gates
from hawada_peft.errors import IncompatibleTableError, InfeasibleBudgetError, InvalidPlanError
from hawada_peft.gates.reading import axes_of
from hawada_peft.gates.relaxation import RELAXATIONS
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.toy import ToyClock
from hawada_peft.training.goal import ShapeGoal
from hawada_peft.training.latency_goal import LatencyGoal
from hawada_peft.vanilla.family import locate

DENSE, SLIM = Shape(8, 4, 96, 4), Shape(4, 2, 40, 2)
BUDGET = LatencyBudget(speedup=1.5, mode="prefill", seq_len=8)


class Machine(ToyClock):
    """Three times slower than when the table was made, and `factor` times for anything but the dense shape."""

    def __init__(self, table: LatencyTable, factor: float = 1.0) -> None:
        super().__init__(lambda model, regime: 3.0 * self.ms(locate(model).dense))
        self.table, self.factor, self.calls = table, factor, 0

    def ms(self, shape: Shape) -> float:
        self.calls += 1
        return self.table.estimate(shape) * (1.0 if shape == DENSE else self.factor)


def table_of(model: PeftModel) -> LatencyTable:
    layout = locate(model.get_base_model())
    return toy_table(layout.dense, launch=0.2, arithmetic=1.0, model=layout.fingerprint())


@pytest.fixture
def machine() -> Machine:
    return Machine(table_of(gate(build(LM_ROW))))


def latency_goal(
    budget: LatencyBudget = BUDGET,
    relaxation: str = "sigmoid",
    machine: ToyClock = CLOCK,
    effort: Effort | None = None,
) -> LatencyGoal:
    model = gate(build(LM_ROW), shuffle=False, gates=("heads", "ffn", "layers"))
    for found in collect_gates(model).values():
        found.relaxation = RELAXATIONS[relaxation]
    return LatencyGoal(model, budget, table_of(model), effort=effort or Effort(clock=machine))


def close(model: PeftModel, shape: Shape, softness: float = 30.0) -> None:
    model.set_masks(scattered_plan(model, shape))
    for found in collect_gates(model).values():
        kept = torch.ones_like(found.theta, dtype=torch.bool) if found.kept is None else found.kept
        found.theta.data.copy_(torch.where(kept, softness, -softness))
    model.set_masks(None)


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


def test_a_shape_is_where_it_is() -> None:
    goal = ShapeGoal(gate(build(LM_ROW)), SLIM)
    before = goal.state_dict()
    goal.step(1)
    assert goal.current_shape() == goal.final_shape() == SLIM
    assert goal.figures() == {}
    assert goal.state_dict() == before


def test_axes_are_drawn_to_their_ratios_which_fall_with_progress() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    goal = ShapeGoal(model, SLIM)
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
    ShapeGoal(model, Shape(8, 4, 48, 4)).penalty(1.0).backward()
    for axis, gates in axes_of(model).items():
        assert [found.theta.grad is not None for found in gates] == [axis == "intermediate_size"] * len(gates)


def test_nothing_is_drawn_to_the_dense_shape() -> None:
    penalty = ShapeGoal(gate(build(LM_ROW)), DENSE).penalty(1.0)
    assert float(penalty) == 0.0


def test_a_shape_survives_json() -> None:
    model = gate(build(LM_ROW), shuffle=False)
    goal, other = ShapeGoal(model, SLIM), ShapeGoal(model, DENSE)
    other.load_state_dict(json.loads(json.dumps(goal.state_dict())))
    assert other.final_shape() == SLIM
    assert torch.equal(other.penalty(0.5), goal.penalty(0.5))


def test_fresh_gates_are_nearest_to_the_dense_shape_and_decided_ones_to_their_own() -> None:
    goal = latency_goal()
    assert goal.current_shape() == DENSE
    for shape in (Shape(4, 2, 48, 2), Shape(2, 1, 24, 4), Shape(8, 4, 96, 1)):
        close(goal.model, shape)
        assert goal.current_shape() == shape


def test_the_nearest_shape_is_nearest_of_all() -> None:
    goal = latency_goal()
    generator = torch.Generator().manual_seed(0)
    for found in collect_gates(goal.model).values():
        found.theta.data.copy_(2 * torch.randn(found.theta.shape, generator=generator))
    mean = goal._quality().sizes.mean()
    dense = np.array(list(DENSE.sizes().values()))

    def distance(shape: Shape) -> float:
        return float((((np.array(list(shape.sizes().values())) - mean) / dense) ** 2).sum())

    shapes = [goal.space.shape(index) for index in range(len(goal.space))]
    assert distance(goal.current_shape()) == pytest.approx(min(map(distance, shapes)))


def test_quality_of_cutting_what_is_closed_is_free_and_of_the_rest_is_not() -> None:
    goal = latency_goal()
    close(goal.model, Shape(4, 2, 48, 2))
    quality, space = goal._quality(), goal.space
    loss = quality.predict(space).ravel()
    assert loss.shape == (len(space),)
    assert loss.min() == 0
    at = {shape: float(loss[space.index(shape)]) for shape in map(space.shape, range(len(space)))}
    own = at[Shape(4, 2, 48, 2)]
    for shape in (Shape(2, 1, 48, 2), Shape(4, 2, 40, 2), Shape(4, 2, 48, 1)):
        assert at[shape] > own + 0.01  # cuts what is open
    for shape in (Shape(8, 4, 48, 2), Shape(4, 2, 96, 2), Shape(4, 2, 48, 4)):
        assert own - 0.02 < at[shape] <= own  # keeps what is closed


def test_quality_ranks_by_the_gates_and_measures_nothing() -> None:
    goal = latency_goal()
    close(goal.model, SLIM)
    quality = goal._quality()
    assert quality.plan(SLIM) == goal.model.plan(SLIM) == scattered_plan(goal.model, SLIM)
    assert quality.evaluate(SLIM) is None


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("close_to", [None, SLIM, Shape(4, 2, 96, 4)])
def test_the_final_shape_meets_the_limit(machine: Machine, factor: float, close_to: Shape | None) -> None:
    machine.factor = factor
    goal = latency_goal(machine=machine)
    if close_to is not None:
        close(goal.model, close_to)
    limit = BUDGET.limit_ms(machine.ms(DENSE))
    shape = goal.final_shape()
    assert machine.ms(shape) <= limit
    assert goal.constraint.measured_ms == pytest.approx(machine.ms(shape), rel=1e-6)
    if close_to is not None and factor == 1.0 and machine.ms(close_to) <= limit:
        assert all(
            size >= least for size, least in zip(shape.sizes().values(), close_to.sizes().values(), strict=True)
        )


def test_the_final_shape_keeps_what_is_open(machine: Machine) -> None:
    """Gates that have closed what the limit wants closed are rounded to just that."""
    found = []
    for closed in (Shape(8, 4, 96, 2), Shape(8, 4, 16, 4)):
        goal = latency_goal(replace(BUDGET, speedup=machine.ms(DENSE) / machine.ms(closed) / 1.02), machine=machine)
        close(goal.model, closed)
        found.append(goal.final_shape())
    assert found[0].num_hidden_layers == 2
    assert (found[1].num_hidden_layers, found[1].num_attention_heads) == (4, 8)


def test_effort_is_handed_on(machine: Machine) -> None:
    goal = latency_goal(effort=once(machine, candidates=1, search_rounds=1, instances=2))
    goal.final_shape()
    few = machine.calls
    goal = latency_goal(effort=once(machine, candidates=4, search_rounds=4, instances=4))
    goal.final_shape()
    assert machine.calls - few > few


def test_penalty_and_ascent_follow_the_gates() -> None:
    goal = latency_goal()
    goal.penalty(1.0)
    goal.step(1)
    assert goal.constraint.multiplier == pytest.approx(0.5, rel=1e-4)  # dense over the limit, less 1
    close(goal.model, Shape(2, 1, 24, 1))
    assert goal.penalty(1.0).item() < 0
    goal.step(1)
    assert goal.constraint.multiplier < 0.5


def test_a_measurement_is_relative_to_the_dense_shape_beside_it(machine: Machine) -> None:
    goal = latency_goal(machine=machine)
    close(goal.model, Shape(4, 2, 48, 2))
    machine.factor = 1.5
    shape, measured = goal.measure()
    assert shape == Shape(4, 2, 48, 2)
    assert measured == pytest.approx(1.5 * goal.constraint.table.estimate(shape))  # the machine is 3 times slower now
    goal.anchor(shape, measured)
    assert goal.constraint.scale == pytest.approx(1.25)
    figures = goal.figures()
    assert figures["measured_ms"] == measured
    assert figures["estimate_ms"] == pytest.approx(1.25 * goal.constraint.table.estimate(shape), rel=1e-4)


def test_a_measurement_leaves_the_random_state(machine: Machine) -> None:
    goal = latency_goal(machine=machine)
    close(goal.model, Shape(4, 2, 48, 2))
    state = torch.get_rng_state()
    goal.measure()
    assert torch.equal(torch.get_rng_state(), state)  # training draws from it


def test_a_latency_survives_json(machine: Machine) -> None:
    budget = LatencyBudget(speedup=1.1, mode="prefill", seq_len=8)
    goal, other = latency_goal(machine=machine), latency_goal(budget)
    goal.penalty(1.0)
    goal.step(1)
    goal.anchor(*goal.measure())
    other.load_state_dict(json.loads(json.dumps(goal.state_dict())))
    assert other.state_dict() == goal.state_dict()
    assert other.figures() == goal.figures()
    assert torch.equal(other.penalty(0.5), goal.penalty(0.5))


def test_what_cannot_be_trained_is_refused_at_once() -> None:
    with pytest.raises(InfeasibleBudgetError, match="binding: latency"):
        latency_goal(LatencyBudget(speedup=1000, mode="prefill", seq_len=8))
    model = gate(build(LM_ROW), gates=("heads", "hidden"))
    with pytest.raises(InvalidPlanError, match="'hidden'"):
        LatencyGoal(model, BUDGET, table_of(model))
    with pytest.raises(IncompatibleTableError, match="something else"):
        LatencyGoal(gate(build(LM_ROW)), BUDGET, replace(table_of(model), device_name="another"))


def test_only_what_has_gates_is_cut(machine: Machine) -> None:
    model = gate(build(LM_ROW), gates=("ffn", "layers"), shuffle=False)
    shape = LatencyGoal(model, BUDGET, table_of(model), effort=Effort(clock=machine)).final_shape()
    assert (shape.num_attention_heads, shape.num_key_value_heads) == (8, 4)
