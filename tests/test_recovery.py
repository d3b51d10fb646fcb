"""Prune and recover in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    logits_of,
    scattered_plan,
    state_of,
)
from distil_runs import DATA, IMAGES, arguments, kl_of
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, TrainerCallback

from hawada_peft import HawAdaConfig, recover, save_slim
from hawada_peft.errors import BrokenGatesError, HawAdaError

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def planned(row: Row = LM_ROW, **options: Any) -> PeftModel:
    model = gate(build(row), gates=("heads", "ffn", "blocks", "layers"), **options)
    model.apply_plan(scattered_plan(model, row.slim))
    return model


class AtStart(TrainerCallback):
    """What the models compute when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.logits = logits_of(model)


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_training_starts_at_the_masked_model_and_comes_closer_to_the_dense_one(
    tmp_path: Path, lora: LoraConfig | None
) -> None:
    model = planned()
    masked, dense, start = logits_of(model), model.get_base_model(), AtStart()
    args = arguments(tmp_path / "out", max_steps=12, learning_rate=0.01)
    slim = recover(model, args, train_dataset=DATA, lora=lora, callbacks=[start]).model
    assert difference(start.logits, masked) <= 1e-5
    before = planned().merge_and_unload()
    assert kl_of(slim, dense) < 0.8 * kl_of(before, dense)
    assert slim.config.to_dict() == before.config.to_dict()
    assert all(parameter.requires_grad for parameter in slim.parameters())
    assert not slim.training
    if lora is not None:
        changed = {
            name for name, tensor in slim.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
        }
        assert {name.split(".")[-2] for name in changed} == set(LORA.target_modules)
    save_slim(slim, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert_same_state(loaded.state_dict(), slim.state_dict())


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged before"])
def test_the_base_is_the_dense_model_again_bit_for_bit(tmp_path: Path, merged: bool) -> None:
    model = planned()
    base = model.get_base_model()
    if merged:
        model.merge_adapter()
    recover(model, arguments(tmp_path, max_steps=1), train_dataset=DATA)
    dense = build(LM_ROW)
    assert_same_state(base.state_dict(), dense.state_dict())
    assert base.config.to_dict() == dense.config.to_dict()
    torch.testing.assert_close(logits_of(base), logits_of(dense), rtol=0, atol=0)


def test_a_dense_model_and_a_plan_will_do(tmp_path: Path) -> None:
    dense = build(LM_ROW)
    plan, before = scattered_plan(dense, LM_ROW.slim), state_of(dense)
    slim = recover(dense, arguments(tmp_path), train_dataset=DATA, plan=plan).model
    assert slim.config.num_hidden_layers == LM_ROW.slim.num_hidden_layers
    assert_same_state(dense.state_dict(), before)
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_a_plan_that_is_passed_takes_the_place_of_the_applied_one(tmp_path: Path) -> None:
    model = planned()
    plan = scattered_plan(model, LM_ROW.slim, seed=7)
    start = AtStart()
    recover(model, arguments(tmp_path, max_steps=1), train_dataset=DATA, plan=plan, callbacks=[start])
    expected = planned().merge_and_unload(plan=plan)
    torch.testing.assert_close(start.logits, logits_of(expected), rtol=0, atol=0)


def test_images_and_a_trained_head(tmp_path: Path) -> None:
    model = planned(VISION_ROW, modules_to_save=["classifier"])
    base = model.get_base_model()
    with torch.no_grad():
        base.classifier.modules_to_save["default"].bias += 1.0
    masked, start = logits_of(model), AtStart()
    slim = recover(model, arguments(tmp_path / "out"), train_dataset=IMAGES, callbacks=[start]).model
    assert difference(start.logits, masked) <= 1e-5
    assert_same_state(base.state_dict(), build(VISION_ROW).state_dict())
    slim.save_pretrained(tmp_path / "slim")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "slim")
    assert_same_state(loaded.state_dict(), slim.state_dict())


@pytest.mark.parametrize("gated", [True, False])
def test_calibration_gives_a_better_start(tmp_path: Path, gated: bool) -> None:
    model = planned() if gated else build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    tokens = torch.randint(3, 128, (64, 16), generator=torch.Generator().manual_seed(9))
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    batches = [{"input_ids": rows} for rows in tokens.split(8)]
    slim = recover(model, args, train_dataset=DATA, plan=plan, calibration=batches).model
    plain = planned().merge_and_unload(plan=plan) if gated else planned().merge_and_unload(plan=plan, fold=False)
    dense = build(LM_ROW)
    assert kl_of(slim, dense) < kl_of(plain, dense)
    base = model.get_base_model() if gated else model
    assert_same_state(base.state_dict(), dense.state_dict())


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_an_interrupted_recovery_is_resumed(tmp_path: Path, lora: LoraConfig | None) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = recover(planned(), arguments(tmp_path / "whole", **options), train_dataset=DATA, lora=lora).model
    resumed = recover(
        planned(),
        arguments(tmp_path / "resumed", **options),
        train_dataset=DATA,
        lora=lora,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )
    assert_same_state(resumed.model.state_dict(), whole.state_dict())


def test_all_that_is_wrong_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    before = state_of(model)
    with pytest.raises(HawAdaError) as error:
        recover(model, train_dataset=DATA, lora=HawAdaConfig(), kl_weight=-1.0)
    assert all(part in str(error.value) for part in ("apply_plan", "LoraConfig, got a HawAdaConfig", "kl_weight=-1.0"))
    assert_same_state(model.state_dict(), before)


def test_a_plan_that_keeps_everything_is_refused() -> None:
    model = gate(build(LM_ROW))
    with pytest.raises(HawAdaError, match="keeps everything"):
        recover(model, train_dataset=DATA, plan=model.plan(keep_ratio=1.0))


def test_a_narrower_stream_recovers(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), gates=("ffn", "hidden"))
    model.apply_plan(model.plan(keep_ratio={"hidden": 0.5}))
    masked, base = logits_of(model), model.get_base_model()
    slim = recover(model, arguments(tmp_path, max_steps=1, learning_rate=0.0), train_dataset=DATA).model
    assert difference(logits_of(slim), masked) <= 1e-5
    assert_same_state(base.state_dict(), build(LM_ROW).state_dict())


def test_broken_gates_leave_the_model_as_it_was() -> None:
    model = planned()
    next(parameter for name, parameter in model.named_parameters() if name.endswith("theta")).data.fill_(float("nan"))
    base = {name: tensor for name, tensor in state_of(model).items() if "theta" not in name}
    with pytest.raises(BrokenGatesError):
        recover(model, train_dataset=DATA)
    found = model.state_dict()
    assert_same_state({name: found[name] for name in base}, base)


class Stop(TrainerCallback):
    """Ctrl-C in the middle of training."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_recovery_leaves_the_gated_model(tmp_path: Path) -> None:
    model = planned()
    expected, state = logits_of(model), state_of(model)
    with pytest.raises(KeyboardInterrupt):
        recover(model, arguments(tmp_path, max_steps=2), train_dataset=DATA, callbacks=[Stop()])
    assert torch.equal(logits_of(model), expected)
    assert_same_state(state_of(model), state)
    recover(model, arguments(tmp_path, max_steps=1), train_dataset=DATA)
