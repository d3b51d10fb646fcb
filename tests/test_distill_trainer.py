"""The trainer of slim models, in real runs of a few steps."""

from __future__ import annotations

import json
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
    logits_of,
    state_of,
)
from distil_runs import DATA, IMAGES, kl_of, logged, slimmed, trainer_of
from pairs import in_two
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)

from hawada_peft import DistillTrainer
from hawada_peft.errors import HawAdaError, IncompatibleBaseError

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DistillTrainer:
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_of(folder, mse_weight=0.1, args={"max_steps": 12, "save_strategy": "steps", "save_steps": 12})
    trainer.train()
    return trainer


def test_training_lowers_the_divergence_from_the_teacher(trained: DistillTrainer) -> None:
    teacher = build(LM_ROW)
    assert kl_of(trained.model, teacher) < 0.8 * kl_of(slimmed(), teacher)


def test_terms_of_the_loss_are_logged(trained: DistillTrainer) -> None:
    assert len(logged(trained, "kl")) == len(logged(trained, "mse")) == 12
    for entry in trained.state.log_history[:12]:
        assert entry["loss"] == pytest.approx(entry["kl"] + 0.1 * entry["mse"], rel=1e-4)


def test_the_first_loss_is_that_of_the_slim_model_over_all_positions(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, args={"max_steps": 1, "per_device_train_batch_size": 8})
    expected = kl_of(slimmed(), build(LM_ROW))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)


def test_evaluation_reports_the_same_loss_and_its_terms(trained: DistillTrainer) -> None:
    trained.args.per_device_eval_batch_size = 8
    metrics = trained.evaluate()
    teacher = build(LM_ROW)
    assert metrics["eval_loss"] == pytest.approx(kl_of(trained.model, teacher, mse_weight=0.1), rel=1e-4)
    assert metrics["eval_kl"] == pytest.approx(kl_of(trained.model, teacher), rel=1e-4)
    assert metrics["eval_mse"] > 0


def test_labels_change_nothing(trained: DistillTrainer) -> None:
    labelled = [row | {"labels": row["input_ids"]} for row in DATA]
    assert trained.evaluate(labelled)["eval_loss"] == pytest.approx(trained.evaluate(DATA)["eval_loss"])


def test_the_teacher_stays_as_it_is(trained: DistillTrainer) -> None:
    untouched = build(LM_ROW)
    assert_same_state(trained.teacher.state_dict(), state_of(untouched))
    assert trained.teacher.config.to_dict() == untouched.config.to_dict()
    assert not trained.teacher.training
    assert all(parameter.grad is None for parameter in trained.teacher.parameters())
    owned = {id(p) for group in trained.optimizer.param_groups for p in group["params"]}
    assert owned.isdisjoint(map(id, trained.teacher.parameters()))


def test_the_teacher_makes_no_cache_of_keys_and_values(tmp_path: Path) -> None:
    teacher, made = build(LM_ROW), []
    teacher.register_forward_hook(lambda _module, _inputs, output: made.append(output.past_key_values))
    trainer_of(tmp_path, teacher=teacher, args={"max_steps": 1}).train()
    assert made == [None, None]  # one row to see what it gives, and the step


def test_checkpoint_is_a_vanilla_model_folder(trained: DistillTrainer) -> None:
    folder = Path(trained.args.output_dir) / "checkpoint-12"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_state(loaded.state_dict(), trained.model.state_dict())
    assert loaded.config.use_cache is True
    assert set(load_file(folder / "model.safetensors")) <= set(slimmed().state_dict())


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "lora"])
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path, lora: bool) -> None:
    args = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    ends = []
    for folder, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        student = slimmed()
        if lora:
            student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        trainer = trainer_of(tmp_path / folder, student, args=args)
        trainer.train(resume_from_checkpoint=resume)
        ends.append((student.state_dict(), logged(trainer, "kl")))
    assert_same_state(ends[1][0], ends[0][0])
    assert ends[1][1] == ends[0][1]


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "packed"])
def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path: Path, padding: bool) -> None:
    data = DATA if padding else [{"input_ids": row["input_ids"]} for row in DATA]
    ends = []
    for batch, accumulation in ((8, 1), (2, 4)):
        args = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = trainer_of(tmp_path, args=SGD | args, train_dataset=data)
        trainer.train()
        ends.append((state_of(trainer.model), logged(trainer, "loss"), logged(trainer, "kl")))
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-4, atol=1e-5)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)
    assert ends[1][2] == pytest.approx(ends[0][2], rel=1e-4)


def test_gradient_checkpointing_computes_the_same(tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        args = SGD | {"max_steps": 2, "activation_checkpointing": checkpointing}
        trainer = trainer_of(tmp_path, args=args)
        calls = Counter(trainer.model.model.layers[0].mlp)
        trainer.train()
        assert calls.count == (4 if checkpointing else 2)  # once more in the backward pass
        ends.append(state_of(trainer.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


class Counter:
    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_a_teacher_of_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = build(LM_ROW).to(dtype)
    trainer = trainer_of(tmp_path, teacher=teacher, args={"bf16": True, "max_steps": 12})
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert teacher.dtype == dtype
    assert kl_of(trainer.model, build(LM_ROW)) < 0.8 * kl_of(slimmed(), build(LM_ROW))


def test_a_peft_teacher_is_its_dense_base(tmp_path: Path) -> None:
    teacher = get_peft_model(build(LM_ROW), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = trainer_of(tmp_path, teacher=teacher)
    expected = kl_of(trainer.model, build(LM_ROW))
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_images_train_as_well(tmp_path: Path) -> None:
    teacher = build(VISION_ROW)
    args = {"max_steps": 12, "learning_rate": 0.002, "per_device_train_batch_size": 8}
    data = {"train_dataset": IMAGES, "eval_dataset": IMAGES}
    trainer = trainer_of(tmp_path, slimmed(VISION_ROW), teacher=teacher, args=args, **data)
    trainer.train()
    assert logged(trainer, "kl")[-1] < 0.8 * logged(trainer, "kl")[0]
    trainer.save_model(str(tmp_path / "slim"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "slim")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model), rtol=0, atol=0)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    student = slimmed().requires_grad_(False)
    with pytest.raises(HawAdaError) as error:
        trainer_of(tmp_path, student, teacher=torch.nn.Linear(2, 2), kd_temperature=0.0)
    assert all(part in str(error.value) for part in ("Linear", "nothing to train", "kd_temperature"))


def test_a_model_is_not_its_own_teacher(tmp_path: Path) -> None:
    student = slimmed()
    with pytest.raises(HawAdaError, match="HawAdaTrainer"):
        trainer_of(tmp_path, student, teacher=student)


@pytest.mark.parametrize(
    ("row", "fields", "sizes"), [(LM_ROW, {"vocab_size": 120}, (128, 120)), (VISION_ROW, {"num_labels": 5}, (3, 5))]
)
def test_another_vocabulary_is_refused(tmp_path: Path, row: Row, fields: Any, sizes: tuple[int, int]) -> None:
    with pytest.raises(IncompatibleBaseError, match=rf"{sizes[0]} .* {sizes[1]}"):
        trainer_of(tmp_path, slimmed(row), teacher=build(row, **fields))


def process(folder: Path) -> None:
    """What each of two processes does."""
    trainer = trainer_of(folder, args=PARALLEL | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"})
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "slim"))
    if trainer.is_world_process_zero():
        logs = {"world": trainer.args.world_size, "eval_kl": metrics["eval_kl"], "eval_loss": metrics["eval_loss"]}
        logs |= {name: logged(trainer, name) for name in ("loss", "kl")}
        (folder / "logs.json").write_text(json.dumps(logs))


PARALLEL = SGD | {"max_steps": 2, "gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    in_two(process, tmp_path)
    two = json.loads((tmp_path / "logs.json").read_text())
    one = trainer_of(tmp_path / "one", args=PARALLEL)
    one.train()
    assert two["world"] == 2
    for name in ("loss", "kl"):
        assert two[name] == pytest.approx(logged(one, name), rel=1e-4)
    assert two["eval_kl"] == pytest.approx(two["eval_loss"], rel=1e-4)
    found, start = load_file(tmp_path / "slim" / "model.safetensors"), slimmed().state_dict()
    torch.testing.assert_close(found, state_of(one.model), rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(start[name], tensor, atol=1e-4) for name, tensor in found.items())
