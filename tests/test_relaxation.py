"""Relaxations of gates: what training multiplies by, and that nothing else ever sees it."""

from __future__ import annotations

import pytest
import torch
from conftest import LM_ROW, build, gate, logits_of, scattered_plan
from peft import PeftModel

from hawada_peft import collect_gates
from hawada_peft.gates.kinds import GateStart, SigmoidGate
from hawada_peft.gates.relaxation import RELAXATIONS, Closing, HardConcrete, Relaxation, StraightThrough

START = 3.75
LOGITS = torch.linspace(-6, 6, 13)
KEPT = torch.arange(13) % 2 == 0
DRAWS = 20_000


@pytest.fixture(params=RELAXATIONS)
def relaxation(request: pytest.FixtureRequest) -> Relaxation:
    return RELAXATIONS[request.param]


def relaxed(model: PeftModel, relaxation: Relaxation | None) -> PeftModel:
    for found in collect_gates(model).values():
        found.relaxation = relaxation
    return model


def gradient(relaxation: Relaxation, logits: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(relaxation.factor(logits, START, kept).sum(), logits)
    return found


@pytest.mark.parametrize("name", ["closing", "straight_through"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_an_untrained_unit_is_multiplied_by_exactly_one(name: str, progress: float) -> None:
    start = torch.full((5,), START)
    found = RELAXATIONS[name].at(progress).factor(start, START, torch.ones(5, dtype=torch.bool))
    assert torch.equal(found, torch.ones(5))


def test_an_untrained_unit_is_open(relaxation: Relaxation) -> None:
    found = relaxation.open_probability(torch.full((5,), START), START)
    torch.testing.assert_close(found, torch.ones(5), rtol=0, atol=0.01)


def test_a_penalty_reaches_gates_above_their_start(relaxation: Relaxation) -> None:
    logits = torch.tensor([START + 0.5, START, START - 0.5], requires_grad=True)
    relaxation.open_probability(logits, START).sum().backward()
    assert (logits.grad > 1e-3).all()


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_factors_and_probabilities_stay_in_their_ranges(relaxation: Relaxation, progress: float) -> None:
    now = relaxation.at(progress)
    factor, probability = now.factor(LOGITS, START, KEPT), now.open_probability(LOGITS, START)
    assert factor.shape == probability.shape == LOGITS.shape
    assert (factor >= 0).all()
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (probability.diff() >= 0).all()
    assert probability[0] < 0.1
    assert gradient(now, LOGITS, KEPT).isfinite().all()


def test_the_way_begins_as_it_is_and_ends_where_it_should() -> None:
    closing, concrete = Closing(), HardConcrete()
    assert [closing.at(progress).leak for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert closing.at(0.0) == closing
    assert StraightThrough().at(0.5) == StraightThrough()
    assert concrete.at(0.0) == concrete.at(1.0) == concrete


@pytest.mark.parametrize("relaxation", [Closing().at(1.0), StraightThrough().at(0.2)], ids=["closed", "masked"])
def test_without_a_leak_it_is_exactly_the_hard_mask(relaxation: Relaxation) -> None:
    found = SigmoidGate(13, relative=True).train()
    found.theta.data.copy_(LOGITS)
    found.set_plan(KEPT)
    found.relaxation = relaxation
    assert torch.equal(found.factor(hard=False), found.factor(hard=True))
    assert not found.factor(hard=False)[~KEPT].any()


@pytest.mark.parametrize("leak", [1.0, 0.3])
def test_closing_units_are_scaled_by_the_leak(leak: float) -> None:
    full = Closing().factor(LOGITS, START, None)
    found = Closing(leak=leak).factor(LOGITS, START, KEPT)
    torch.testing.assert_close(found, torch.where(KEPT, full, leak * full))
    assert torch.equal(Closing(leak=leak).factor(LOGITS, START, None), full)  # nothing is approached


@pytest.mark.parametrize("leak", [0.5, 0.0])
def test_gradient_of_closing_units(leak: float) -> None:
    plain = gradient(Closing(), LOGITS, None)
    torch.testing.assert_close(gradient(StraightThrough(), LOGITS, KEPT), plain)
    torch.testing.assert_close(gradient(Closing(leak), LOGITS, KEPT), torch.where(KEPT, plain, leak * plain))


@pytest.mark.parametrize("logit", [-2.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("beta", [0.5, 2 / 3])
def test_hard_concrete_gates_are_open_as_often_as_stated(logit: float, beta: float) -> None:
    relaxation, logits = HardConcrete(beta=beta), torch.full((DRAWS,), logit)
    drawn = relaxation.factor(logits, START, None)
    stated = float(relaxation.open_probability(logits[:1], START))
    assert float((drawn > 0).float().mean()) == pytest.approx(stated, abs=4 * 0.5 / DRAWS**0.5)
    # By the symmetry of the distribution a gate is exactly 1 as often as one of the opposite logit is exactly 0.
    opposite = float(relaxation.open_probability(-logits[:1], START))
    assert float((drawn == 1).float().mean()) == pytest.approx(1 - opposite, abs=4 * 0.5 / DRAWS**0.5)


def test_hard_concrete_gates_are_drawn_anew_and_by_the_global_seed() -> None:
    logits, relaxation = torch.zeros(64), HardConcrete()
    torch.manual_seed(5)
    first, second = relaxation.factor(logits, START, None), relaxation.factor(logits, START, None)
    torch.manual_seed(5)
    assert torch.equal(relaxation.factor(logits, START, None), first)
    assert not torch.equal(first, second)
    assert ((first == 0).any(), (first == 1).any(), ((first > 0) & (first < 1)).any()) == (True, True, True)


def test_hard_concrete_gates_far_out_are_certain_and_finite() -> None:
    logits = torch.tensor([-60.0, 60.0]).repeat_interleave(1000)
    drawn = HardConcrete().factor(logits, START, None)
    assert torch.equal(drawn, (logits > 0).float())
    assert gradient(HardConcrete(), logits, None).isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_gate_gives_its_relaxation_logits_and_not_theta(relaxation: Relaxation, temperature: float) -> None:
    unit, scaled = (gate_of(value, relaxation) for value in (1.0, temperature))
    scaled.theta.data.copy_(unit.theta.detach() * temperature)
    torch.testing.assert_close(scaled.logits(), unit.logits())
    torch.testing.assert_close(scaled.open_probability(), unit.open_probability(), rtol=0.01, atol=0.001)


def gate_of(temperature: float, relaxation: Relaxation) -> SigmoidGate:
    found = SigmoidGate(5, start=GateStart(temperature=temperature), relative=True)
    found.theta.data.copy_(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) * temperature)
    found.relaxation = relaxation
    return found


def test_evaluation_never_sees_it(relaxation: Relaxation) -> None:
    model = gate(build(LM_ROW))
    dense, plan = logits_of(model), scattered_plan(model, LM_ROW.slim)
    assert torch.equal(logits_of(relaxed(model, relaxation.at(0.5))), dense)
    model.apply_plan(plan)
    hard = logits_of(relaxed(model, None))
    assert torch.equal(logits_of(relaxed(model, relaxation.at(0.5))), hard)


def test_training_sees_it_until_the_plan_is_applied_there(relaxation: Relaxation) -> None:
    model = gate(build(LM_ROW))
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    plan = scattered_plan(model, LM_ROW.slim)
    model.set_masks(plan)
    plain = model.train()(**inputs).logits
    soft = relaxed(model, relaxation.at(0.5))(**inputs).logits
    assert not torch.allclose(soft, plain, atol=1e-3)
    model.apply_plan(plan, in_training=True)
    assert torch.equal(model(**inputs).logits, model.eval()(**inputs).logits)


def test_the_export_never_sees_it(relaxation: Relaxation) -> None:
    states = []
    for each in (None, relaxation.at(0.5)):
        model = gate(build(LM_ROW)).train()
        model.apply_plan(scattered_plan(model, LM_ROW.slim))
        states.append(relaxed(model, each).merge_and_unload().state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_merging_in_place_never_sees_it(relaxation: Relaxation) -> None:
    model = gate(build(LM_ROW))
    expected = logits_of(model)
    relaxed(model.train(), relaxation.at(0.5)).merge_adapter()
    torch.testing.assert_close(logits_of(model.eval()), expected, rtol=1e-4, atol=1e-4)
