"""The tuner inside PEFT and transformers: saving, several adapters, training modes, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import (
    LM_ROW,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    shuffle_gates,
    state_of,
)
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_model_status, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from hawada_peft import HawAdaConfig, HawAdaModel, collect_gates, slim
from hawada_peft.errors import IncompatibleBaseError


def test_adapter_of_saved_base_loads_by_itself(tmp_path: Path) -> None:
    build(LM_ROW).save_pretrained(tmp_path / "base")
    model = gate(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), task_type="CAUSAL_LM")
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, HawAdaModel)
    assert torch.equal(logits_of(loaded), logits_of(model))
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, HawAdaConfig)
    assert config.plan == model.applied_plan().to_dict()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("in_training", [False, True])
def test_plan_travels_with_the_adapter(tmp_path: Path, low_cpu_mem_usage: bool, in_training: bool) -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, LM_ROW.slim), in_training=in_training)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LM_ROW), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.applied_plan() == model.applied_plan()
    assert torch.equal(logits_of(loaded), logits_of(model))
    with torch.no_grad():
        inputs = inputs_of(model)
        assert torch.equal(loaded.train()(**inputs).logits, model.train()(**inputs).logits)


@pytest.mark.parametrize("fields", [{"intermediate_size": 128}, {"num_hidden_layers": 3}, {"num_key_value_heads": 8}])
def test_adapter_for_another_base_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    gate(build(LM_ROW)).save_pretrained(tmp_path)
    ((name, size),) = fields.items()
    with pytest.raises(IncompatibleBaseError, match=rf"{name}: adapter {LM_ROW.fields[name]}, model {size}"):
        PeftModel.from_pretrained(build(LM_ROW, **fields), tmp_path)


def test_transformers_adds_saves_and_loads_an_adapter(tmp_path: Path) -> None:
    model = build(LM_ROW)
    dense = logits_of(model)
    model.add_adapter(HawAdaConfig(), "mine")
    shuffle_gates(model)
    gated = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = build(LM_ROW)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(loaded), gated)
    loaded.disable_adapters()
    assert torch.equal(logits_of(loaded), dense)


def test_gates_are_injected_in_place() -> None:
    model = inject_adapter_in_model(HawAdaConfig(gates=("heads",)), build(LM_ROW))
    assert len(collect_gates(shuffle_gates(model))) == 4
    assert type(model) is type(build(LM_ROW))


def test_status_names_the_tuner() -> None:
    status = get_model_status(gate(build(LM_ROW)))
    assert (status.adapter_model_type, status.peft_types) == ("HawAdaModel", {"default": "HAWADA"})
    assert status.num_adapter_layers == 8


def test_saved_modules_reach_the_slim_model(tmp_path: Path) -> None:
    model = gate(build(VISION_ROW), modules_to_save=["classifier"])
    head = model.get_base_model().classifier.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    model.apply_plan(scattered_plan(model, VISION_ROW.slim))
    masked = logits_of(model)
    model.save_pretrained(tmp_path)
    for found in (model, PeftModel.from_pretrained(build(VISION_ROW), tmp_path)):
        slimmed = found.merge_and_unload()
        assert torch.equal(slimmed.classifier.weight, head.weight)
        assert difference(logits_of(slimmed), masked) <= 1e-5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = gate(build(LM_ROW, torch.float64)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_of(model), use_cache=False).logits.square().mean().backward()
        gradients.append([g.theta.grad for g in collect_gates(model).values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_has_float32_gates_and_unchanged_output(dtype: torch.dtype) -> None:
    base = build(LM_ROW, dtype)
    dense = logits_of(base)
    model = gate(base, shuffle=False)
    assert {g.theta.dtype for g in collect_gates(model).values()} == {torch.float32}
    assert torch.equal(logits_of(model), dense)


def test_autocast_is_close_to_full_precision_and_trains(row: Row) -> None:
    model = gate(build(row))
    full = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs_of(model))[0]
        output.float().square().mean().backward()
    assert difference(output.detach().float(), full) <= 0.1
    assert all(g.theta.grad.isfinite().all() for g in collect_gates(model).values())


@pytest.mark.parametrize("cache", [None, "static"])
def test_slim_model_generates_what_the_masked_model_does(cache: str | None) -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    prompt = torch.randint(3, 128, (2, 5))
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    options |= {"eos_token_id": None}
    masked = model.generate(**options, cache_implementation=cache)
    without_cache = model.generate(**options, use_cache=False)
    found = model.merge_and_unload().generate(**options, cache_implementation=cache)
    assert masked.shape == (2, 13)
    assert torch.equal(found, masked)
    assert torch.equal(without_cache, masked)


def test_slimming_by_hand_is_what_merging_does() -> None:
    model = gate(build(LM_ROW))
    plan = scattered_plan(model, LM_ROW.slim)
    found = model.merge_and_unload(plan=plan, fold=False)
    assert_same_state(state_of(found), state_of(slim(build(LM_ROW), plan)))
