"""torch.compile: gated and slim models are one graph, traced anew where a phase or a plan asks for it and no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import EVERYTHING, LM_ROW, VISION_ROW, Row, build, gate, inputs_of, scattered_plan
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hawada_peft import collect_gates, slim
from hawada_peft.distil import get_teacher_logits
from hawada_peft.gates.relaxation import RELAXATIONS

STEPS = 4
FIELDS = {"num_hidden_layers": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[LM_ROW, VISION_ROW], ids=["llama", "vit"])
def row(request: pytest.FixtureRequest) -> Row:
    """A text and a vision family."""
    return request.param


class Compiled:
    """A model in one graph, and how often it has been traced."""

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.model, self.inputs = model, inputs_of(model)
        self.counter = CompileCounterWithBackend(backend)
        self.compiled = torch.compile(model, backend=self.counter, fullgraph=True)

    def step(self) -> torch.Tensor:
        """A step, and what it gave; the eager model gives the same."""
        output = self.compiled(**self.inputs)["logits"]
        if self.model.training:
            output.square().mean().backward()
        return output.detach()

    def traced(self) -> int:
        """How often since it was asked last."""
        count, self.counter.frame_count = self.counter.frame_count, 0
        return count


@pytest.mark.parametrize("gates", [EVERYTHING, ("hidden",)], ids=["everything", "hidden"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_gated_model_is_one_graph_and_computes_the_same(row: Row, training: bool, gates: tuple[str, ...]) -> None:
    model = gate(build(row, **FIELDS), gates=gates).train(training)
    compiled = Compiled(model, "aot_eager")
    torch.testing.assert_close(compiled.step(), model(**compiled.inputs)["logits"], rtol=1e-4, atol=1e-5)
    if training:
        found = {name: each.theta.grad.clone() for name, each in collect_gates(model).items()}
        model.zero_grad()
        model(**compiled.inputs)["logits"].square().mean().backward()
        expected = {name: each.theta.grad for name, each in collect_gates(model).items()}
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    for _ in range(STEPS):
        compiled.step()
    assert compiled.traced() == 1


def test_a_plan_is_traced_once_and_so_is_its_end(row: Row) -> None:
    model = gate(build(row, **FIELDS)).train()
    compiled = Compiled(model)
    compiled.step()
    assert compiled.traced() == 1
    for plan in (scattered_plan(model, row.slim), scattered_plan(model, row.slim, seed=4), None):
        model.apply_plan(plan, in_training=True)
        for _ in range(STEPS):
            compiled.step()
        assert compiled.traced() <= 1
        torch.testing.assert_close(compiled.step(), model(**compiled.inputs)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RELAXATIONS)
def test_the_soft_phase_is_traced_once_whatever_its_progress(name: str) -> None:
    model = gate(build(LM_ROW, **FIELDS)).train()
    model.set_masks(scattered_plan(model, LM_ROW.slim))
    compiled = Compiled(model)
    for step in range(STEPS):
        for each in collect_gates(model).values():
            each.relaxation = RELAXATIONS[name].at(step / STEPS)
        compiled.step()
    assert compiled.traced() == 1


def test_a_compiled_model_is_its_own_teacher_too() -> None:
    model = gate(build(LM_ROW, **FIELDS)).train()
    compiled = Compiled(model)
    for _ in range(STEPS):
        found = get_teacher_logits(compiled.compiled, compiled.inputs)
        torch.testing.assert_close(found, get_teacher_logits(model, compiled.inputs), rtol=1e-4, atol=1e-5)
        compiled.step()
    assert compiled.traced() == 2


def test_the_teachers_pass_in_between_costs_nothing() -> None:
    model = gate(build(LM_ROW, **FIELDS)).train()
    compiled = Compiled(model)
    for _ in range(STEPS):
        get_teacher_logits(model, compiled.inputs)
        compiled.step()
    assert compiled.traced() == 1


def test_a_slim_model_is_one_graph(row: Row) -> None:
    dense = build(row, **FIELDS)
    for training in (True, False):
        compiled = Compiled(slim(dense, scattered_plan(dense, row.slim)).train(training))
        for _ in range(STEPS):
            compiled.step()
        assert compiled.traced() == 1
