"""The phases of gate training: which gates are how open at which step."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import LM_ROW, build, gate, scattered_plan, shuffle_gates
from peft import PeftModel

from hawada_peft import Plan, Shape, collect_gates
from hawada_peft.gates.relaxation import RELAXATIONS
from hawada_peft.training.goal import Goal
from hawada_peft.training.phases import Phases

SLIM = Shape(4, 2, 40, 2)


def relaxations(model: PeftModel) -> set[object]:
    return {found.relaxation for found in collect_gates(model).values()}


def masks(model: PeftModel) -> list[torch.Tensor | None]:
    return [found.kept for found in collect_gates(model).values()]


def walk(phases: Phases, steps: int) -> list[tuple[float | None, bool]]:
    """For every step the progress that the gates see, None while they are open, and whether it is time to decide."""
    goal, seen = Goal(phases.model, SLIM), []
    for step in range(steps):
        due = phases.begin_step(goal, step, steps)
        (found,) = relaxations(phases.model)
        seen.append((None if found is None else 1.0 - found.leak, due))
    return seen


@pytest.mark.parametrize(
    ("warmup", "soft", "expected"),
    [
        (0.0, 0.5, [1 / 3, 2 / 3, 1.0, "due", "due", "due"]),
        (1 / 3, 2 / 3, [None, None, 0.5, 1.0, "due", "due"]),
        (0.0, 0.0, ["due"] * 6),
        (0.0, 1.0, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]),
        (1.0, 1.0, [None] * 6),
        (0.5, 0.5, [None, None, None, "due", "due", "due"]),
    ],
)
def test_which_phase_a_step_is_of(warmup: float, soft: float, expected: list[float | str | None]) -> None:
    found = walk(Phases(gate(build(LM_ROW)), "closing", warmup, soft), 6)
    assert [due for _, due in found] == [each == "due" for each in expected]
    for (progress, due), wanted in zip(found, expected, strict=True):
        if not due:
            assert progress == (wanted if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_products_of_floats_add_no_step(fraction: float) -> None:
    phases = Phases(gate(build(LM_ROW)), "hard_concrete", 0.0, fraction)
    goal = Goal(phases.model, SLIM)
    soft = [step for step in range(100) if not phases.begin_step(goal, step, 100)]
    assert soft == list(range(round(100 * fraction)))
    assert phases.progress(soft[-1], 100) == 1.0


@pytest.mark.parametrize("relaxation", [name for name, each in RELAXATIONS.items() if not each.draws_to_size])
def test_the_plan_that_is_approached_follows_the_gates_where_they_may_reorder(relaxation: str) -> None:
    model = gate(build(LM_ROW))
    phases, goal = Phases(model, relaxation, 0.0, 1.0), Goal(model, SLIM)
    phases.begin_step(goal, 0, 4)
    first = phases.approached
    assert first == model.plan(SLIM)
    shuffle_gates(model, seed=9)
    assert phases.approached == first != model.plan(SLIM)
    phases.begin_step(goal, 1, 4)
    assert phases.approached == (model.plan(SLIM) if RELAXATIONS[relaxation].reorders else first)
    assert phases.plan(SLIM) == phases.approached
    assert phases.plan(Shape(2, 1, 40, 2)) == model.plan(Shape(2, 1, 40, 2))  # another shape is another matter
    assert any(kept is not None and not kept.all() for kept in masks(model))


@pytest.mark.parametrize(("relaxation", "times"), [("straight_through", 8), ("closing", 1), ("hard_concrete", 0)])
def test_it_is_made_anew_at_every_step_or_once(monkeypatch: pytest.MonkeyPatch, relaxation: str, times: int) -> None:
    model, made = gate(build(LM_ROW)), []
    phases, goal = Phases(model, relaxation, 0.0, 1.0), Goal(model, SLIM)
    make = phases.plan
    monkeypatch.setattr(phases, "plan", lambda shape: made.append(shape) or make(shape))
    for step in range(8):
        phases.begin_step(goal, step, 8)
    assert made == [SLIM] * times


@pytest.mark.parametrize("relaxation", [name for name, each in RELAXATIONS.items() if each.draws_to_size])
def test_drawn_gates_approach_no_plan(relaxation: str) -> None:
    model = gate(build(LM_ROW))
    phases = Phases(model, relaxation, 0.0, 1.0)
    phases.begin_step(Goal(model, SLIM), 2, 4)
    assert phases.approached is None
    assert masks(model) == [None] * len(masks(model))
    assert relaxations(model) == {RELAXATIONS[relaxation].at(0.75)}


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_evaluation_under_the_plan_leaves_no_trace(relaxation: str) -> None:
    model = gate(build(LM_ROW))
    phases, goal = Phases(model, relaxation, 0.0, 1.0), Goal(model, SLIM)
    phases.begin_step(goal, 0, 4)
    approached, before = phases.approached, masks(model)
    shuffle_gates(model, seed=9)
    tokens = {"input_ids": torch.arange(3, 15)[None]}
    with phases.planned(goal), torch.no_grad():
        found = model.eval()(**tokens).logits
    assert phases.approached == approached
    for kept, mask in zip(masks(model), before, strict=True):
        assert kept is mask or torch.equal(kept, mask)
    model.apply_plan(phases.plan(SLIM))
    assert torch.equal(found, model(**tokens).logits)


def test_once_applied_a_plan_is_left_alone() -> None:
    model = gate(build(LM_ROW))
    phases, goal = Phases(model, "closing", 0.0, 1.0), Goal(model, SLIM)
    assert not phases.decided
    model.apply_plan(scattered_plan(model, SLIM), in_training=True)
    before = masks(model)
    assert phases.decided
    assert not phases.begin_step(goal, 0, 4)
    with phases.planned(goal):
        assert all(kept is mask for kept, mask in zip(masks(model), before, strict=True))
    assert relaxations(model) == {None}


def test_only_active_gates_are_relaxed() -> None:
    model = gate(build(LM_ROW))
    model.add_adapter("other", model.peft_config["default"])
    Phases(model, "hard_concrete", 0.0, 1.0).relax(RELAXATIONS["hard_concrete"])
    for name, relaxed in (("default", True), ("other", False)):
        assert {found.relaxation is not None for found in collect_gates(model, name).values()} == {relaxed}


def test_state_survives_json() -> None:
    model, other = gate(build(LM_ROW)), gate(build(LM_ROW))
    phases, loaded = Phases(model, "closing", 0.0, 1.0), Phases(other, "closing", 0.0, 1.0)
    phases.begin_step(Goal(model, SLIM), 0, 4)
    loaded.load_state_dict(json.loads(json.dumps(phases.state_dict())))
    assert isinstance(loaded.approached, Plan)
    assert loaded.approached == phases.approached
    for kept, expected in zip(masks(other), masks(model), strict=True):
        assert kept is expected or torch.equal(kept, expected)
    loaded.load_state_dict({"approached": None})  # what was there before is forgotten
    assert loaded.approached is None
    assert masks(other) == [None] * len(masks(other))
