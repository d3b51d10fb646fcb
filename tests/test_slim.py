"""The slim model in memory: what it keeps besides weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LM_ROW,
    MIXED_ROW,
    VISION_ROW,
    Row,
    assert_same_state,
    build,
    difference,
    gate,
    inputs_of,
    logits_of,
    scattered_plan,
    state_of,
)
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, GenerationConfig

from hawada_peft import Plan, Shape, save_slim, slim
from hawada_peft.errors import IncompatibleBaseError, UnsupportedModelError
from hawada_peft.vanilla.family import locate

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_dense_model_is_left_alone_and_shares_no_memory(row: Row) -> None:
    model = build(row)
    before, config = state_of(model), model.config.to_dict()
    small = slim(model, scattered_plan(model, row.slim))
    for tensor in small.state_dict().values():
        tensor.fill_(7)
    assert_same_state(state_of(model), before)
    assert model.config.to_dict() == config


def test_keep_all_is_a_copy(row: Row) -> None:
    model = build(row)
    copied = slim(model, Plan.keep_all(locate(model).dense))
    assert_same_state(state_of(copied), state_of(model))
    assert torch.equal(logits_of(copied), logits_of(model))


def test_everything_is_on_the_device_trainable_and_in_the_mode_of_the_dense_model(row: Row) -> None:
    model = build(row).train()
    small = slim(model, scattered_plan(model, row.slim))
    assert small.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in small.parameters())
    assert not [name for name, buffer in small.named_buffers() if buffer.is_meta]


def test_weights_are_the_dense_ones_at_the_kept_indices() -> None:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    small = slim(model, plan)
    for new, old in enumerate(plan.layers):
        rows = [8 * head + i for head in plan.heads[new] for i in range(8)]
        groups = [8 * group + i for group in plan.kv_groups[new] for i in range(8)]
        mine, dense = small.model.layers[new], model.model.layers[old]
        assert torch.equal(mine.self_attn.q_proj.weight, dense.self_attn.q_proj.weight[rows])
        assert torch.equal(mine.self_attn.v_proj.weight, dense.self_attn.v_proj.weight[groups])
        assert torch.equal(mine.self_attn.o_proj.weight, dense.self_attn.o_proj.weight[:, rows])
        assert torch.equal(mine.mlp.up_proj.weight, dense.mlp.up_proj.weight[list(plan.channels[new])])
        assert torch.equal(mine.input_layernorm.weight, dense.input_layernorm.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["text", "vision"])
def test_dtype_survives(row: Row, dtype: torch.dtype, tmp_path: Path) -> None:
    model = gate(build(row, dtype))
    model.apply_plan(scattered_plan(model, row.slim))
    small = model.merge_and_unload()
    save_slim(small, tmp_path / "slim")
    auto = AutoModelForCausalLM if small.can_generate() else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path / "slim")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_state(state_of(loaded), state_of(small))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_the_masked_model_by_rounding(dtype: torch.dtype) -> None:
    model = gate(build(LM_ROW, dtype))
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 16 * torch.finfo(dtype).eps


def test_generation_config_survives(tmp_path: Path) -> None:
    model = build(LM_ROW)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, max_new_tokens=7, eos_token_id=5)
    small = slim(model, scattered_plan(model, LM_ROW.slim))
    assert small.generation_config is not model.generation_config
    save_slim(small, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim").generation_config
    assert (loaded.temperature, loaded.max_new_tokens, loaded.eos_token_id) == (0.3, 7, 5)


def test_labels_survive(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = build(VISION_ROW, id2label=names, label2id={name: i for i, name in names.items()})
    save_slim(slim(model, scattered_plan(model, VISION_ROW.slim)), tmp_path / "slim")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "slim").config.id2label == names


def test_lists_per_layer_follow_non_adjacent_layers() -> None:
    model = build(MIXED_ROW)
    dense = model.config.layer_types
    assert len(set(dense)) == 2
    everything = Plan.keep_all(locate(model).dense)
    for layers in [(0, 3), (1, 2), (0, 1), (3,)]:
        plan = Plan(everything.dense, layers, everything.heads[: len(layers)], everything.channels[: len(layers)])
        assert slim(model, plan).config.layer_types == [dense[layer] for layer in layers]


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 777.0}, 777.0, None),
        (LLAMA3_ROPE, 500000.0, {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}),
    ],
    ids=["default", "llama3"],
)
def test_rope_is_written_for_transformers_4_too(
    rope: dict[str, Any], theta: float, scaling: Any, tmp_path: Path
) -> None:
    model = build(LM_ROW, rope_parameters=rope)
    small = slim(model, scattered_plan(model, LM_ROW.slim))
    save_slim(small, tmp_path / "slim")
    written = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert (written["rope_theta"], written.get("rope_scaling")) == (theta, scaling)
    assert written["rope_parameters"] == rope
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert loaded.config.rope_parameters == rope
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_survives(implementation: str) -> None:
    model = build(LM_ROW, attn_implementation=implementation)
    assert slim(model, scattered_plan(model, LM_ROW.slim)).config._attn_implementation == implementation


def test_slim_model_can_be_slimmed_again() -> None:
    model = build(LM_ROW, torch.float64)
    once = slim(model, scattered_plan(model, Shape(8, 4, 80, 3)))
    gated = gate(once)
    gated.apply_plan(scattered_plan(gated, Shape(4, 2, 40, 2)))
    masked = logits_of(gated)
    assert difference(logits_of(gated.merge_and_unload()), masked) <= 1e-12


def test_slim_model_trains(row: Row) -> None:
    model = build(row)
    small = slim(model, scattered_plan(model, row.slim)).train()
    small(**inputs_of(small))[0].square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in small.parameters())


def test_plan_for_another_base_is_refused() -> None:
    plan = scattered_plan(build(LM_ROW), LM_ROW.slim)
    with pytest.raises(IncompatibleBaseError, match="intermediate_size: plan 96, model 128"):
        slim(build(LM_ROW, intermediate_size=128), plan)


def test_gated_model_is_refused() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(UnsupportedModelError, match=r"adapters in it: use `model\.slim\(plan"):
        slim(model, scattered_plan(model, LM_ROW.slim))


def test_model_with_gates_inside_is_refused() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(ValueError, match=r"merge_and_unload|unload"):
        slim(model.get_base_model(), scattered_plan(model, LM_ROW.slim))
