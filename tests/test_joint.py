"""Gates and LoRA trained together: one adapter, one export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    EVERYTHING,
    LM_ROW,
    ROWS,
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
from distil_runs import DATA, arguments, kl_of
from gate_runs import arguments as gate_arguments
from peft import LoraConfig, PeftModel

from hawada_peft import HawAdaConfig, HawAdaTrainer, Shape, collect_gates, recover, save_slim
from hawada_peft.distil import get_teacher_logits
from hawada_peft.errors import BrokenGatesError, HawAdaError, UnsupportedModelError

LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)


def joint(row: Row = LM_ROW, *, lora: Any = LORA, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Gates and LoRA, both far from their start."""
    model = gate(build(row, dtype), lora=lora, gates=EVERYTHING, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def names_of(model: PeftModel, part: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if part in name]


def test_gates_and_lora_are_trainable_and_nothing_else() -> None:
    model = joint()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {*names_of(model, ".hawada_"), *names_of(model, ".lora_")}
    assert names_of(model, "o_proj.base_layer.lora_A")  # below the gate
    assert names_of(model, "q_proj.lora_A")


def test_a_fresh_adapter_changes_nothing() -> None:
    model = gate(build(LM_ROW), shuffle=False, lora=LORA)
    torch.testing.assert_close(logits_of(model), logits_of(build(LM_ROW)), rtol=0, atol=0)


def test_every_part_gets_a_gradient() -> None:
    model = joint()
    model(**inputs_of(model)).logits.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
def test_the_teacher_is_exactly_the_dense_model(row: Row) -> None:
    model = joint(row).train()
    expected = logits_of(build(row))
    torch.testing.assert_close(get_teacher_logits(model, inputs_of(model)), expected, rtol=0, atol=0)
    assert difference(logits_of(model), expected) > 0.01
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *names_of(model, ".hawada_"),
        *names_of(model, ".lora_"),
    }


def test_unload_gives_the_dense_model_back() -> None:
    model = joint()
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    assert_same_state(model.unload().state_dict(), build(LM_ROW).state_dict())


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite", "vit", "dinov2"])
def test_the_slim_model_computes_what_the_masked_one_does(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    model = joint(row, dtype=torch.float64)
    model.apply_plan(scattered_plan(model, row.slim))
    masked = logits_of(model)
    slim = model.merge_and_unload()
    assert type(slim) is type(build(row))
    assert slim.num_parameters() < build(row).num_parameters()
    assert difference(logits_of(slim), masked) <= 1e-12
    save_slim(slim, tmp_path / "slim", reference=masked, inputs=inputs_of(slim))


def test_a_narrower_stream_is_exact_too() -> None:
    model = gate(build(LM_ROW, torch.float64), lora=LORA, gates=("heads", "ffn", "layers", "hidden"))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.apply_plan(model.plan(keep_ratio={"heads": 0.5, "ffn": 0.5, "hidden": 0.5}))
    masked = logits_of(model)
    slim = model.merge_and_unload()
    assert slim.config.hidden_size == 32
    assert difference(logits_of(slim), masked) <= 1e-12


def test_dora_is_merged_too() -> None:
    model = joint(lora=LoraConfig(r=2, target_modules=["v_proj", "down_proj"], use_dora=True), dtype=torch.float64)
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload()), masked) <= 1e-12


def test_without_a_plan_everything_is_folded() -> None:
    model = joint(dtype=torch.float64)
    soft = logits_of(model)
    with pytest.warns(UserWarning, match="removed nothing"):
        merged = model.merge_and_unload()
    assert difference(logits_of(merged), soft) <= 1e-12
    assert merged.state_dict().keys() == build(LM_ROW).state_dict().keys()


def test_without_folding_the_gates_lora_is_still_merged() -> None:
    model = joint(dtype=torch.float64)
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    for found in collect_gates(model).values():
        found.theta.data.fill_(found.start.theta)  # soft values of 1
    masked = logits_of(model)
    assert difference(logits_of(model.merge_and_unload(fold=False)), masked) <= 1e-12


def test_one_folder_holds_both_and_gives_the_same_model_back(tmp_path: Path) -> None:
    model = joint()
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora"]
    assert saved == {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
    loaded = PeftModel.from_pretrained(build(LM_ROW), tmp_path)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert_same_state(loaded.state_dict(), state_of(model))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    trainable = PeftModel.from_pretrained(build(LM_ROW), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        *names_of(model, ".hawada_"),
        *names_of(model, ".lora_"),
    }


def trainer_of(folder: Path, **options: Any) -> HawAdaTrainer:
    model = gate(build(LM_ROW), shuffle=False, lora=LORA)
    fixed = {"max_steps": 6, "learning_rate": 0.01, "soft_fraction": 0.5, "gate_learning_rate": 0.3}
    args = gate_arguments(folder, **(fixed | options))
    return HawAdaTrainer(model, args, train_dataset=DATA, shape=Shape(4, 2, 40, 2))


def test_the_trainer_of_gates_trains_both(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=12)
    before = state_of(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved <= {*names_of(trainer.model, ".hawada_"), *names_of(trainer.model, ".lora_")}
    assert any(".hawada_" in name for name in moved)
    assert any(".lora_B" in name for name in moved)
    masked = logits_of(trainer.model)
    gates_only = PeftModel.from_pretrained(build(LM_ROW), save(trainer, tmp_path))
    for name, parameter in gates_only.named_parameters():
        if ".lora_B" in name:
            parameter.data.zero_()
    assert kl_of(trainer.model, build(LM_ROW)) < kl_of(gates_only, build(LM_ROW))
    assert difference(logits_of(trainer.model.merge_and_unload()), masked) <= 1e-5


def save(trainer: HawAdaTrainer, folder: Path) -> Path:
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter"


def test_joint_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole, resumed = trainer_of(tmp_path / "whole", **options), trainer_of(tmp_path / "resumed", **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.model.applied_plan() == whole.model.applied_plan()


def test_recovery_starts_with_lora_merged_and_leaves_the_dense_model(tmp_path: Path) -> None:
    model = joint()
    plan = scattered_plan(model, LM_ROW.slim)
    model.apply_plan(plan)
    masked, base = logits_of(model), model.get_base_model()
    slim = recover(model, arguments(tmp_path, max_steps=1, learning_rate=0.0), train_dataset=DATA).model
    assert difference(logits_of(slim), masked) <= 1e-5
    assert_same_state(base.state_dict(), build(LM_ROW).state_dict())


def test_reconstruction_refits_to_the_dense_model_without_lora() -> None:
    model = joint()
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    base = model.get_base_model()
    tokens = torch.randint(3, 128, (64, 16), generator=torch.Generator().manual_seed(9))
    slimmed = model.slim(calibration=[{"input_ids": tokens}])
    slim = slimmed.model
    plain = joint()
    plain.apply_plan(scattered_plan(plain, LM_ROW.slim))
    dense = build(LM_ROW)
    assert slimmed.reconstruction.applied
    assert kl_of(slim, dense) < kl_of(plain.merge_and_unload(), dense)
    assert_same_state(base.state_dict(), dense.state_dict())


def test_a_second_adapter_without_lora_switches_it_off(tmp_path: Path) -> None:
    model = joint()
    both = logits_of(model)
    model.add_adapter("other", HawAdaConfig(gates=EVERYTHING))
    model.set_adapter("other")
    torch.testing.assert_close(logits_of(model), logits_of(build(LM_ROW)), rtol=0, atol=0)
    model.set_adapter("default")
    torch.testing.assert_close(logits_of(model), both, rtol=0, atol=0)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert names_of(model, ".lora_") == []
    torch.testing.assert_close(logits_of(model), logits_of(build(LM_ROW)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        (LoraConfig(bias="all"), "bias"),
        (LoraConfig(init_lora_weights="pissa"), "pissa"),
        (LoraConfig(modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(trainable_token_indices=[1]), "trainable_token_indices"),
        ({"rank": 8}, "rank"),
    ],
)
def test_lora_that_would_change_the_teacher_is_refused(lora: Any, named: str) -> None:
    with pytest.raises(HawAdaError, match=named):
        HawAdaConfig(lora=lora)


def test_lora_with_gates_placed_by_name_is_refused() -> None:
    with pytest.raises(HawAdaError, match="target_modules"):
        HawAdaConfig(lora=LORA, target_modules=["o_proj"])


def test_lora_on_tied_weights_is_refused_and_leaves_the_model() -> None:
    model = build(ROWS["smollm3"])
    before = state_of(model)
    with pytest.warns(UserWarning, match="tie_word"), pytest.raises(UnsupportedModelError, match="lm_head"):
        gate(model, lora=LoraConfig(target_modules=["lm_head"]))
    assert_same_state(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_cannot_come_after_gates() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(UnsupportedModelError, match="first"):
        model.add_adapter("other", HawAdaConfig(lora=LORA))


def test_another_base_is_refused_before_lora_is_put_on_it() -> None:
    config = dataclasses.replace(joint().peft_config["default"])
    other = build(LM_ROW, intermediate_size=80)
    before = state_of(other)
    with pytest.raises(HawAdaError, match="another base"):
        PeftModel(other, config)
    assert_same_state(other.state_dict(), before)


def test_merging_in_place_and_mixed_batches_are_refused() -> None:
    model = joint()
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="row by row"):
        model(**inputs_of(model), adapter_names=["default", "__base__"])


def test_broken_lora_is_refused_before_anything_is_changed() -> None:
    model = joint()
    model.apply_plan(scattered_plan(model, LM_ROW.slim))
    last = [parameter for name, parameter in model.named_parameters() if ".lora_B" in name][-1]
    last.data.fill_(float("nan"))
    before = {name: tensor for name, tensor in state_of(model).items() if "base_layer.weight" in name}
    with pytest.raises(BrokenGatesError, match="LoRA"):
        model.merge_and_unload()
    assert_same_state({name: model.state_dict()[name] for name in before}, before)
