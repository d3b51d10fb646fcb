"""The latency constraint: expected sizes, the estimate, the multiplier."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, Row, build, gate, scattered_plan
from peft import PeftModel
from toys import toy_table

from hawada_peft import Shape, collect_gates
from hawada_peft.gates.reading import ExpectedSizes, expected_sizes
from hawada_peft.gates.relaxation import RELAXATIONS
from hawada_peft.latency.table import LatencyTable
from hawada_peft.training.constraint import LatencyConstraint
from hawada_peft.vanilla.family import locate


def sizes_of(model: PeftModel) -> ExpectedSizes:
    base = model.get_base_model()
    return expected_sizes(base, locate(base), "default")


def table_of(model: PeftModel) -> LatencyTable:
    layout = locate(model.get_base_model())
    return toy_table(layout.dense, launch=0.2, arithmetic=1.0, model=layout.fingerprint())


def constraint(**options: float) -> LatencyConstraint:
    table = toy_table(Shape(8, 4, 96, 4), launch=0.2, arithmetic=1.0)
    return LatencyConstraint(table, table.dense_ms / 2, **options)


def close(model: PeftModel, shape: Shape) -> None:
    """Logits far out, as a random plan of a shape says."""
    model.set_masks(scattered_plan(model, shape))
    for found in collect_gates(model).values():
        kept = torch.ones_like(found.theta, dtype=torch.bool) if found.kept is None else found.kept
        found.theta.data.copy_(torch.where(kept, 30.0, -30.0))
    model.set_masks(None)


@pytest.mark.parametrize("gates", [EVERYTHING, ("heads", "layers"), ("ffn",)])
def test_fresh_gates_expect_the_dense_sizes(row: Row, gates: tuple[str, ...]) -> None:
    model = gate(build(row), shuffle=False, gates=gates)
    found, dense = sizes_of(model), locate(model.get_base_model()).dense.sizes()
    expected = torch.tensor(list(dense.values()), dtype=torch.float32)
    torch.testing.assert_close(torch.tensor(found.mean(), dtype=torch.float32), expected)
    for axis, size in zip((found.heads, found.kv_groups, found.ffn), expected, strict=False):
        torch.testing.assert_close(axis, size.expand(dense["num_hidden_layers"]))
    torch.testing.assert_close(found.layers, torch.ones(dense["num_hidden_layers"]))


@pytest.mark.parametrize("relaxation", [name for name, each in RELAXATIONS.items() if each.draws_to_size])
@pytest.mark.parametrize("gates", [("heads", "ffn", "layers"), ("heads", "ffn", "blocks")])
def test_decided_gates_expect_the_sizes_of_their_plan(row: Row, relaxation: str, gates: tuple[str, ...]) -> None:
    model = gate(build(row), gates=gates)
    for found in collect_gates(model).values():
        found.relaxation = RELAXATIONS[relaxation]
    close(model, row.slim)
    wanted = row.slim.complete(locate(model.get_base_model()).dense).sizes()
    sizes = sizes_of(model)
    torch.testing.assert_close(
        torch.tensor(sizes.mean()), torch.tensor(list(wanted.values())).double(), rtol=1e-4, atol=1e-4
    )
    assert int((sizes.layers > 0.5).sum()) == wanted["num_hidden_layers"]


def test_the_estimate_of_decided_gates_is_that_of_their_shape() -> None:
    model = gate(build(LM_ROW))
    close(model, LM_ROW.slim)
    held = LatencyConstraint(table_of(model), 1.0)
    expected = held.table.estimate(LM_ROW.slim.complete(locate(model.get_base_model()).dense))
    assert held.estimate(sizes_of(model)).item() == pytest.approx(expected, rel=1e-4)


def test_a_group_stays_as_likely_as_its_likeliest_head() -> None:
    model = gate(build(LM_ROW), gates=("heads",), shuffle=False)  # 8 heads in 4 groups
    for found in collect_gates(model).values():
        found.theta.data.copy_(torch.tensor([30.0, -30.0, -30.0, -30.0, 30.0, 30.0, 0.0, -30.0]))
    sizes = sizes_of(model)
    start = torch.sigmoid(torch.tensor(found.start.theta))
    torch.testing.assert_close(sizes.heads, (3 + 0.5 / start).expand(4))
    torch.testing.assert_close(sizes.kv_groups, (2 + 0.5 / start).expand(4))


def test_gates_that_are_shared_or_missing(row: Row) -> None:
    both = gate(build(row), gates=("blocks",), shuffle=False)
    for name, found in collect_gates(both).items():
        if "o_proj" in name or "attention" in name:
            found.theta.data.fill_(0.0)
    start = torch.sigmoid(torch.tensor(found.start.theta))
    torch.testing.assert_close(sizes_of(both).layers, (0.5 / start).expand(4))  # the product of both blocks


def test_every_gate_feels_the_estimate() -> None:
    model = gate(build(LM_ROW), shuffle=True, gates=EVERYTHING)
    held = LatencyConstraint(table_of(model), 1.0)
    held.estimate(sizes_of(model)).backward()
    for name, found in collect_gates(model).items():
        assert found.theta.grad is not None, name
        assert found.theta.grad.isfinite().all(), name
        assert found.theta.grad.any(), name
        assert (found.theta.grad >= 0).all(), name  # closing is what makes it faster


def test_the_limit_falls_from_the_dense_latency_to_the_one_asked_for() -> None:
    held = constraint()
    dense = torch.tensor(held.table.dense_ms)
    assert [float(held.violation(dense, progress)) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0, 1 / 3, 1])
    assert float(held.violation(dense / 2, 1.0)) == pytest.approx(0)


def test_a_limit_above_the_dense_latency_is_no_limit() -> None:
    held = LatencyConstraint(constraint().table, 1e6)
    assert float(held.violation(torch.tensor(held.table.dense_ms), 1.0)) == pytest.approx(0)


@pytest.mark.parametrize(("violation", "expected"), [(0.5, 0.2 * 0.5 + 4 / 2 * 0.25), (-0.5, -0.1), (0.0, 0.0)])
def test_the_penalty_is_the_augmented_lagrangian(violation: float, expected: float) -> None:
    held = constraint(curvature=4.0)
    held.multiplier = 0.2
    assert float(held.penalty(torch.tensor(violation))) == pytest.approx(expected)


def test_the_multiplier_climbs_while_violated_and_falls_to_zero_otherwise() -> None:
    held = constraint(rate=0.5)
    climb = []
    for _ in range(3):
        held.ascend(0.2)
        climb.append(held.multiplier)
    assert climb == pytest.approx([0.1, 0.2, 0.3])
    held.ascend(-0.2)
    assert held.multiplier == pytest.approx(0.2)
    held.ascend(-10.0)
    assert held.multiplier == 0.0


def test_anchors_move_the_scale_half_way_each() -> None:
    held, shape = constraint(), Shape(4, 2, 48, 4)
    sizes = ExpectedSizes(torch.full((4,), 4.0), torch.full((4,), 2.0), torch.full((4,), 48.0), torch.ones(4))
    before = float(held.estimate(sizes))
    true = 1.4 * held.table.estimate(shape)
    found = []
    for _ in range(3):
        held.anchor(shape, true)
        found.append(held.scale)
    assert found == pytest.approx([1.2, 1.3, 1.35])
    assert held.measured_ms == true
    assert float(held.estimate(sizes)) == pytest.approx(1.35 * before)


def test_dual_ascent_meets_the_limit() -> None:
    """With gates that want to be open: the estimate ends at the limit, where a penalty alone would stay above it."""
    model = gate(build(LM_ROW), shuffle=False)
    held = LatencyConstraint(table_of(model), table_of(model).dense_ms / 1.5, rate=0.2)
    thetas = [found.theta for found in collect_gates(model).values()]
    optimizer, highest = torch.optim.Adam(thetas, lr=0.1), 0.0
    for step in range(120):
        violation = held.violation(held.estimate(sizes_of(model)), min(1.0, step / 50))
        loss = held.penalty(violation) - 0.3 * torch.cat([theta.flatten() for theta in thetas]).sigmoid().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        held.ascend(violation.item())
        highest = max(highest, held.multiplier)
    assert held.estimate(sizes_of(model)).item() == pytest.approx(held.limit_ms, rel=0.1)
    assert highest > 0


def test_state_survives_json() -> None:
    held = constraint(rate=0.3, curvature=2.0, momentum=0.25)
    held.ascend(0.7)
    held.anchor(Shape(4, 2, 48, 4), 3.0)
    loaded = LatencyConstraint.from_state_dict(json.loads(json.dumps(held.state_dict())))
    assert loaded.state_dict() == held.state_dict()
    assert (loaded.table, loaded.multiplier, loaded.scale) == (held.table, held.multiplier, held.scale)
    for each in (held, loaded):
        each.ascend(1 / 3)
        each.anchor(Shape(2, 1, 48, 4), math.pi)
    assert loaded.state_dict() == held.state_dict()
