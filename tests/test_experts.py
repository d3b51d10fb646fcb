"""Mixtures of experts: experts and their channels are gated, ranked, cut and exported like everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM, Row, assert_same_state, build, difference, gate, inputs_of, logits_of, shuffle_gates, state_of
from families import MIXTURES, SMALL
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hawada_peft import (
    Effort,
    LatencyBudget,
    Plan,
    Shape,
    collect_gates,
    find_plan,
    init_gates,
    save_slim,
    slim_checkpoint,
)
from hawada_peft.errors import HawAdaError, IllegalShapeError, InvalidPlanError, UnsupportedModelError
from hawada_peft.gates.adapter import EXPERT_UNITS
from hawada_peft.gates.concrete import RouterAdapter
from hawada_peft.gates.kinds import ExpertGate
from hawada_peft.gates.reading import are_fresh
from hawada_peft.latency.toy import ToyClock
from hawada_peft.planning import expert_outputs, gate_importance
from hawada_peft.vanilla.family import locate

ALL = ("heads", "ffn", "experts", "layers")
AXES = {
    "heads": Shape(4, 2),
    "ffn": Shape(intermediate_size=12),
    "experts": Shape(num_experts=5),
    "layers": Shape(num_hidden_layers=2),
}


@pytest.fixture(params=MIXTURES)
def row(request: pytest.FixtureRequest) -> Row:
    return MIXTURES[request.param]


def mixture(row: Row, dtype: torch.dtype = torch.float64) -> Any:
    model = build(row, dtype)
    model.set_experts_implementation("eager")  # the others do not know float64
    return model


def test_a_fresh_adapter_changes_nothing(row: Row) -> None:
    model = mixture(row)
    dense = logits_of(model)
    gated = gate(model, shuffle=False, gates=ALL)
    assert are_fresh(gated)
    assert torch.equal(logits_of(gated), dense)
    with gated.disable_adapter():
        assert torch.equal(logits_of(gated), dense)


@pytest.mark.parametrize("axis", AXES)
def test_each_axis_alone_goes_exactly(row: Row, axis: str) -> None:
    model = gate(mixture(row), gates=(axis,))
    dense = logits_of(model)
    model.apply_plan(model.plan(AXES[axis]))
    masked = logits_of(model)
    assert difference(masked, dense) > 1e-3
    assert difference(logits_of(model.merge_and_unload()), masked) < 1e-12


def test_all_at_once_as_a_folder_and_from_files_with_the_same_bytes(row: Row, tmp_path: Path) -> None:
    base = mixture(row, torch.float32)
    base.save_pretrained(tmp_path / "dense")
    model = gate(base, gates=ALL)
    plan = model.plan(row.slim)
    model.apply_plan(plan)
    model.save_pretrained(tmp_path / "adapter")
    masked = logits_of(model)
    loaded = PeftModel.from_pretrained(mixture(row, torch.float32), tmp_path / "adapter").eval()
    assert loaded.applied_plan() == plan
    assert torch.equal(logits_of(loaded), masked)
    small = model.merge_and_unload()
    assert difference(logits_of(small), masked) < 1e-5
    assert locate(small).num_experts == 5
    save_slim(small, tmp_path / "slim", reference=masked, inputs=inputs_of(small))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert_same_state(state_of(auto), state_of(small))
    slim_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "streamed")
    streamed, saved = (load_file(tmp_path / each / "model.safetensors") for each in ("streamed", "slim"))
    assert_same_state(streamed, saved)


def test_another_expert_would_be_noticed() -> None:
    model = gate(mixture(MIXTURES["mixtral"]), gates=("experts",))
    plan = model.plan(Shape(num_experts=5))
    model.apply_plan(plan)
    masked = logits_of(model)
    first, *others = plan.experts
    spare = next(expert for expert in range(8) if expert not in first)
    wrong = Plan(
        plan.dense, plan.layers, plan.heads, plan.channels, experts=(tuple(sorted([*first[1:], spare])), *others)
    )
    assert difference(logits_of(model.merge_and_unload(plan=wrong)), masked) > 1e-6


def test_plans_with_experts_are_json() -> None:
    plan = gate(mixture(MIXTURES["mixtral"]), gates=ALL).plan(SMALL)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.shape.num_experts == 5
    assert "num_experts 5/8" in str(plan)
    with pytest.raises(InvalidPlanError, match=r"dense\.num_experts must be given together"):
        Plan(plan.dense, plan.layers, plan.heads, plan.channels)
    for damaged in ("zz", [1], ["fff"]):
        with pytest.raises(InvalidPlanError, match="experts"):
            Plan.from_dict(plan.to_dict() | {"experts": damaged})


def test_ratios_and_open_gates_find_legal_numbers() -> None:
    model = gate(mixture(MIXTURES["mixtral"]), gates=("experts",), shuffle=False)
    assert model.plan(keep_ratio={"experts": 0.5}).shape.num_experts == 4
    assert model.plan(keep_ratio={"experts": 0.01}).shape.num_experts == 2  # as many as a token is given
    assert model.plan().shape.num_experts is None
    for layer, found in enumerate(collect_gates(model).values()):
        found.theta.data[: 3 + layer % 2] = -4.0
    plan = model.plan()
    assert plan.shape.num_experts == 5
    assert plan.experts[0] == (3, 4, 5, 6, 7)
    for count in (1, 9):
        with pytest.raises(IllegalShapeError, match="num_experts must be 2"):
            model.plan(Shape(num_experts=count))


def test_a_closed_expert_is_never_chosen_and_a_soft_one_less() -> None:
    model = gate(mixture(MIXTURES["mixtral"]), gates=("experts",), shuffle=False)
    router = next(module for module in model.modules() if isinstance(module, RouterAdapter))
    x = torch.randn(64, 64, dtype=torch.float64)
    before = router(x)[0]
    found = router.gates("default")[EXPERT_UNITS]
    assert isinstance(found, ExpertGate)
    found.theta.data[3] = 0.0  # from .9 to .5
    torch.testing.assert_close(
        (router(x)[0] - before)[:, 3], torch.full((64,), 0.5 / 0.9).double().log(), rtol=2e-3, atol=0
    )
    kept = torch.ones(8, dtype=torch.bool)
    kept[[1, 3]] = False
    found.set_plan(kept)
    _, weights, chosen = router(x)
    assert not {1, 3} & {*chosen.unique().tolist()}
    torch.testing.assert_close(weights.sum(-1).double(), torch.ones(64, dtype=torch.float64))


def test_soft_experts_are_not_folded_silently() -> None:
    with pytest.raises(InvalidPlanError, match="weighs experts against each other"):
        gate(mixture(MIXTURES["mixtral"]), gates=("experts",)).merge_and_unload()


def test_gates_on_experts_are_trained_and_ranked(row: Row) -> None:
    model = gate(mixture(row, torch.float32), gates=ALL, shuffle=False)
    inputs = inputs_of(model)
    importance = gate_importance(model, [inputs])
    assert importance.keys() == collect_gates(model).keys()
    assert all(float(each.max()) > 0 for each in importance.values())
    labelled = inputs | {"labels": inputs["input_ids"]}
    optimizer = torch.optim.Adam([found.theta for found in collect_gates(model).values()], lr=0.1)
    losses = []
    for _ in range(6):
        loss = model(**labelled).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_two_adapters_gate_the_same_experts() -> None:
    model = gate(mixture(MIXTURES["gpt_oss"]), gates=ALL)
    first = logits_of(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert difference(logits_of(shuffle_gates(model, "second", seed=9)), first) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)


def test_experts_where_there_are_none_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="names no `router`"):
        gate(build(Row("LlamaForCausalLM", "LlamaConfig", LM, SMALL)), gates=("experts",))
    with pytest.raises(IllegalShapeError, match="names no router"):
        gate(build(Row("LlamaForCausalLM", "LlamaConfig", LM, SMALL))).plan(Shape(num_experts=2))


def test_outputs_of_experts_are_weighted_by_the_router(row: Row) -> None:
    model = gate(mixture(row), shuffle=False, gates=("experts",))
    base, layout = model.get_base_model(), locate(model.get_base_model())
    inputs = inputs_of(model) | {"attention_mask": torch.ones_like(inputs_of(model)["input_ids"])}
    inputs["attention_mask"][0, -4:] = 0
    found, routed = expert_outputs(model, [inputs]), expert_outputs(model, [inputs], routed=True)
    assert found.keys() == {*collect_gates(model)}
    calls: dict[str, tuple[torch.Tensor, ...]] = {}
    experts = base.get_submodule(layout.ffn_out(1))
    handle = experts.register_forward_pre_hook(lambda _, args: calls.update(at=args))
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    handle.remove()
    hidden, index, weights = calls["at"]
    total, tokens = torch.zeros(2, layout.num_experts or 0, dtype=torch.float64)
    for token in inputs["attention_mask"].flatten().nonzero().flatten().tolist():
        for slot, expert in enumerate(index[token].tolist()):
            alone = experts(hidden[token][None], index[token, slot][None, None], torch.ones(1, 1, dtype=hidden.dtype))
            total[expert] += weights[token, slot].double() * alone.detach().double().norm()
            tokens[expert] += 1
    name = next(name for name in found if f"{layout.stack}.1." in name)
    torch.testing.assert_close(found[name], total / inputs["attention_mask"].sum())
    torch.testing.assert_close(routed[name], total / tokens.clamp_min(1))


def test_outputs_of_experts_need_gates_on_them(row: Row) -> None:
    with pytest.raises(HawAdaError, match="add 'experts'"):
        expert_outputs(gate(mixture(row), gates=("layers",)), [inputs_of(build(row))])
    with pytest.raises(HawAdaError, match="no calibration batches"):
        expert_outputs(gate(mixture(row), gates=("experts",)), [])


def test_gates_on_experts_start_by_what_experts_add(row: Row) -> None:
    model = gate(mixture(row), shuffle=False, gates=("experts",))
    batches = [inputs_of(model)]
    expected = expert_outputs(model, batches)
    init_gates(model, batches)
    for name, found in collect_gates(model).items():
        ranks = found.theta.detach().argsort(stable=True)
        assert expected[name][ranks].diff().min() >= 0


def test_a_budget_is_met_by_what_is_no_expert() -> None:
    """Experts are no linear maps to refit, so shapes are judged by closed gates."""
    base = build(MIXTURES["mixtral"])
    batches = [{"input_ids": rows} for rows in inputs_of(base)["input_ids"].split(1)]
    model = gate(base, shuffle=False, gates=ALL)
    effort = Effort(clock=ToyClock(), cache=False, candidates=2, search_rounds=1)
    found = find_plan(model, LatencyBudget(speedup=1.1, seq_len=8), batches, effort=effort)
    assert found.speedup >= 1.1
    assert found.plan.shape.num_experts in (None, locate(model.get_base_model()).dense.num_experts)
    model.apply_plan(found.plan)
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) < 1e-4
