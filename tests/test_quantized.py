"""Quantized bases: gates train on them, and the adapter is exported from unquantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LM_ROW,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hawada_peft import (
    GateTrainingArguments,
    HawAdaConfig,
    HawAdaTrainer,
    Shape,
    collect_gates,
    save_slim,
    slim,
)
from hawada_peft.distil import get_student_logits, get_teacher_logits
from hawada_peft.distil.divergence import kl_divergence
from hawada_peft.errors import UnsupportedModelError
from hawada_peft.gates import GateAdapter

SHAPE = Shape(4, 4, 64)
SCHEMES: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
schemes = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The folder of an unquantized model whose sizes are multiples of the quantization's blocks."""
    build(LM_ROW, intermediate_size=128).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load_quantized(folder: Path, scheme: str) -> PreTrainedModel:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(**SCHEMES[scheme])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # see docs/gates-and-adapters.md
    return model


def train(model: PeftModel, steps: int = 3) -> None:
    """A few steps towards other logits, so that all gates move."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    inputs = inputs_of(model)
    for _ in range(steps):
        teacher = get_teacher_logits(model, inputs).roll(1, -1)
        optimizer.zero_grad()
        kl_divergence(get_student_logits(model.train(), inputs), teacher).backward()
        optimizer.step()
    model.eval()


@schemes
def test_gates_train_on_a_quantized_base(dense: Path, scheme: str) -> None:
    base = load_quantized(dense, scheme)
    before = logits_of(base)
    model = get_peft_model(base, HawAdaConfig())
    assert torch.equal(logits_of(model), before)
    weights = [p.detach().clone() for name, p in model.named_parameters() if "hawada" not in name]
    starts = [found.theta.detach().clone() for found in collect_gates(model).values()]
    train(model)
    assert all(
        (found.theta != start).any() for found, start in zip(collect_gates(model).values(), starts, strict=True)
    )
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"theta"}
    after = [p for name, p in model.named_parameters() if "hawada" not in name]
    assert all(torch.equal(*pair) for pair in zip(weights, after, strict=True))
    assert torch.equal(get_teacher_logits(model, inputs_of(model)), before)
    assert difference(logits_of(model), before) > 0.01


@schemes
def test_trainer_runs_on_a_quantized_base(dense: Path, scheme: str, tmp_path: Path) -> None:
    model = get_peft_model(load_quantized(dense, scheme), HawAdaConfig())
    options = {"max_steps": 3, "learning_rate": 0.1, "soft_fraction": 0.7}
    arguments = GateTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    data = [{"input_ids": torch.arange(3, 15)}] * 8
    HawAdaTrainer(model, arguments, shape=SHAPE, train_dataset=data).train()
    assert model.applied_plan().shape.intermediate_size == SHAPE.intermediate_size
    assert all((found.theta != found.start.theta).any() for found in collect_gates(model).values())


@schemes
def test_adapter_of_a_quantized_base_is_exported_from_the_unquantized_one(
    dense: Path, scheme: str, tmp_path: Path
) -> None:
    model = get_peft_model(load_quantized(dense, scheme), HawAdaConfig())
    train(model)
    plan = model.plan(SHAPE)
    model.apply_plan(plan)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "adapter").eval()
    assert loaded.applied_plan() == plan
    pairs = zip(collect_gates(loaded).values(), collect_gates(model).values(), strict=True)
    assert all(torch.equal(found.theta, trained.theta) for found, trained in pairs)
    masked = logits_of(loaded)
    slimmed = loaded.merge_and_unload()
    assert difference(logits_of(slimmed), masked) <= 1e-5
    save_slim(slimmed, tmp_path / "slim", reference=masked, inputs=inputs_of(slimmed))


def test_weights_turned_back_in_place_are_those_that_were_trained_on(dense: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_quantized(dense, "4bit"), HawAdaConfig())
    train(model)
    model.apply_plan(model.plan(SHAPE))
    masked = logits_of(model)
    model.dequantize()
    slimmed = model.merge_and_unload()
    assert difference(logits_of(slimmed), masked) <= 1e-5
    save_slim(slimmed, tmp_path / "slim", reference=masked, inputs=inputs_of(slimmed))
    assert "quantization" not in (tmp_path / "slim" / "config.json").read_text()


@schemes
def test_export_from_quantized_weights_names_the_way_out(dense: Path, scheme: str) -> None:
    model = get_peft_model(load_quantized(dense, scheme), HawAdaConfig())
    model.apply_plan(model.plan(SHAPE))
    before = logits_of(model)
    for export in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(fold=False)):
        with pytest.raises(
            UnsupportedModelError, match=r"unquantized base.*PeftModel.from_pretrained.*dequantize\(\)"
        ):
            export()
    assert torch.equal(logits_of(model), before)
    plan = model.applied_plan()
    with pytest.raises(UnsupportedModelError, match="quantized"):
        slim(model.unload(), plan)


def test_a_single_quantized_weight_stops_the_export_before_anything_is_folded() -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    *_, last = (module for module in model.modules() if isinstance(module, GateAdapter))
    weight = torch.nn.Parameter(last.base_layer.weight.data.to(torch.int8), requires_grad=False)
    last.base_layer.weight = weight
    before = state_of(model)
    for export in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(fold=False)):
        with pytest.raises(UnsupportedModelError, match=r"'.*weight' is quantized \(torch.int8\)"):
            export()
        assert_same_state(state_of(model), before)
