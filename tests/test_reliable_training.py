"""Trainings that can be relied on: numbers that are none, checkpoints that lack something, folders in use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, ROWS, build, gate, scattered_plan
from filelock import FileLock
from gate_runs import DATA, TARGET, arguments, logged, thetas, trainer_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hawada_peft import DistillTrainer, HawAdaConfig, collect_gates, recover, slim
from hawada_peft.errors import CheckpointError, DivergedError, HawAdaError
from hawada_peft.files.locking import LOCK_FILE
from hawada_peft.training.saved_state import STATE_FILE

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


class Breaks(TrainerCallback):
    """Puts a number that is none into a tensor before a step."""

    def __init__(self, step: int, tensor: torch.Tensor, value: float) -> None:
        self.step, self.tensor, self.value = step, tensor, value

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.tensor.data.view(-1)[0] = self.value


def distiller(folder: Path, lora: bool = False, **args: Any) -> DistillTrainer:
    teacher = build(LM_ROW)
    student: Any = slim(teacher, scattered_plan(teacher, TARGET))
    if lora:
        student = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"]))
    return DistillTrainer(student, arguments(folder, **args), teacher=teacher, train_dataset=DATA)


def gates_of(folder: Path, **args: Any) -> Any:
    return trainer_of(folder, gate(build(LM_ROW)), args=args)


Begun = Callable[[Callable[..., Trainer], Path], None]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """Puts a training's checkpoint after one step into a folder; each kind of training is run once."""
    made: dict[Callable[..., Trainer], Path] = {}

    def copy(make: Callable[..., Trainer], folder: Path) -> None:
        if make not in made:
            made[make] = tmp_path_factory.mktemp("begun")
            make(made[make], **SAVED | {"max_steps": 1}).train()
        shutil.copytree(made[make], folder, dirs_exist_ok=True)

    return copy


def a_gate(trainer: Trainer) -> tuple[str, torch.Tensor]:
    name, found = next(iter(collect_gates(trainer.model).items()))
    return name, found.theta


def a_weight(trainer: Trainer) -> tuple[str, torch.Tensor]:
    name, found = next((name, p) for name, p in trainer.model.named_parameters() if "down_proj" in name)
    return name.removesuffix(".base_layer.weight"), found


def a_lora(trainer: Trainer) -> tuple[str, torch.Tensor]:
    return next((name, p) for name, p in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 3], ids=["while soft", "after the decision"])
@pytest.mark.parametrize(
    ("make", "which"),
    [
        (gates_of, a_gate),
        (gates_of, a_weight),
        (distiller, a_weight),
        (lambda folder, **args: distiller(folder, lora=True, **args), a_lora),
    ],
    ids=["gate", "frozen weight", "student", "lora"],
)
def test_training_stops_at_numbers_that_are_none(
    tmp_path: Path, make: Callable[..., Trainer], which: Any, step: int, value: float
) -> None:
    trainer = make(tmp_path, **SAVED)
    name, tensor = which(trainer)
    trainer.add_callback(Breaks(step, tensor, value))
    with pytest.raises(DivergedError, match=rf"step {step + 1}: ") as caught:
        trainer.train()
    assert name in str(caught.value)
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{each}" for each in range(1, step + 1)]
    for path in tmp_path.glob("checkpoint-*/**/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_a_loss_that_is_none_stops_it_as_well(tmp_path: Path) -> None:
    trainer = distiller(tmp_path, **SAVED)
    trainer.teacher.lm_head.weight.data[0] = float("nan")
    with pytest.raises(DivergedError, match="step 1: the loss is nan"):
        trainer.train()


def test_large_finite_weights_are_no_reason_to_stop(tmp_path: Path) -> None:
    trainer = gates_of(tmp_path, max_steps=1)
    trainer.model.register_parameter("large", nn.Parameter(torch.full((3,), 3e38)))
    trainer.train()


def test_negative_rates_are_refused_by_every_trainer(tmp_path: Path) -> None:
    wrong = {"learning_rate": -1.0, "adam_beta1": 2.0, "gradient_accumulation_steps": 0}
    model = gate(build(LM_ROW))
    plan = scattered_plan(model, TARGET)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for name, value in wrong.items():
        setattr(args, name, value)
    for call in (
        lambda: trainer_of(tmp_path, model, args=wrong),
        lambda: DistillTrainer(build(LM_ROW), args, teacher=build(LM_ROW), train_dataset=DATA),
        lambda: recover(model, args, train_dataset=DATA, plan=plan),
    ):
        with pytest.raises(HawAdaError, match=r"(?s)'learning_rate': -1.*beta1': 2.*'gradient_accumulation_steps': 0"):
            call()


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("make", [gates_of, distiller], ids=["gates", "student"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused(
    begun: Begun, tmp_path: Path, make: Callable[..., Trainer], name: str
) -> None:
    begun(make, tmp_path)
    (tmp_path / "checkpoint-1" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        make(tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [gates_of, distiller], ids=["gates", "student"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"[1, 2]"], ids=["cut", "other"])
def test_a_damaged_checkpoint_is_refused_by_name(
    begun: Begun, tmp_path: Path, make: Callable[..., Trainer], damage: Callable[[bytes], bytes]
) -> None:
    begun(make, tmp_path)
    kept = ("README.md", "training_args.bin", "generation_config.json")  # not read
    paths = [path for path in (tmp_path / "checkpoint-1").iterdir() if path.name not in kept]
    assert len(paths) > 5
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(damage(data))
        with pytest.raises(CheckpointError, match=path.name):
            make(tmp_path, **SAVED).train(resume_from_checkpoint=True)
        path.write_bytes(data)
    make(tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [gates_of, distiller], ids=["gates", "student"])
@pytest.mark.parametrize("folder", [True, "nowhere", 3])
def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, make: Callable[..., Trainer], folder: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in|nowhere lacks|must be a folder"):
        make(tmp_path, **SAVED).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("field", ["goal", "phases", "history"])
@pytest.mark.parametrize("value", [None, 3, [3], {}, "x"])
def test_a_state_with_fields_of_other_types_is_refused(begun: Begun, tmp_path: Path, field: str, value: Any) -> None:
    begun(gates_of, tmp_path)
    path = tmp_path / "checkpoint-1" / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match="hawada_state"):
        gates_of(tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [gates_of, distiller], ids=["gates", "student"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_none_is_told_in_evaluation(tmp_path: Path, make: Callable[..., Trainer], value: float) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.eval_dataset = DATA
    trainer.train()
    assert trainer.args.logging_nan_inf_filter
    trainer.evaluate()
    dict(trainer.model.named_parameters())[a_head(trainer)].data[3, 0] = value
    with pytest.raises(DivergedError, match="evaluation data is"):
        trainer.evaluate()


def a_head(trainer: Trainer) -> str:
    return next(name for name, _ in trainer.model.named_parameters() if "lm_head" in name)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    for make, file in ((gates_of, "adapter_model.safetensors"), (distiller, "model.safetensors")):
        folder = tmp_path / make.__name__
        make(folder, **SAVED | {"max_steps": 1}).train()
        path = folder / "checkpoint-1" / file
        tensors = load_file(path)
        gone = next(name for name in tensors if "down_proj" in name)
        del tensors[gone]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="down_proj"):
            make(folder, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_state_is_refused(begun: Begun, tmp_path: Path, text: str) -> None:
    begun(gates_of, tmp_path)
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="hawada_state"):
        gates_of(tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make", [gates_of, distiller], ids=["gates", "student"])
def test_a_folder_has_one_training_at_a_time(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    with FileLock(tmp_path / LOCK_FILE), pytest.raises(HawAdaError, match="another training"):
        make(tmp_path, max_steps=1).train()
    make(tmp_path, max_steps=1).train()
    assert not (tmp_path / LOCK_FILE).exists()


# ------------------------------------------------------------------------------------------------- names of adapters


def named(beside: bool) -> PeftModel:
    """Fresh gates under another name than "default", alone or beside a first adapter."""
    if not beside:
        return get_peft_model(build(LM_ROW), HawAdaConfig(), adapter_name="mine")
    model = gate(build(LM_ROW))
    model.add_adapter("mine", HawAdaConfig())
    model.set_adapter("mine")
    return model


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_an_adapter_of_any_name_is_resumed(tmp_path: Path, beside: bool) -> None:
    whole = trainer_of(tmp_path / "whole", named(beside), args=SAVED)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", named(beside), args=SAVED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.model.applied_plan() == whole.model.applied_plan()
    torch.testing.assert_close(thetas(resumed.model), thetas(whole.model), rtol=0, atol=0)
    assert logged(resumed, "kl") == logged(whole, "kl")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_the_best_of_an_adapter_of_any_name_is_loaded(tmp_path: Path, beside: bool) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    model = named(beside)
    other = {name: theta for name, theta in thetas(model).items() if name.endswith(".default")}
    trainer = trainer_of(tmp_path, model, args=SAVED | steps)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    best = load_file(Path(trainer.state.best_model_checkpoint) / "mine" / "adapter_model.safetensors")
    now = {name: theta for name, theta in thetas(model).items() if name.endswith(".mine")}
    assert len(best) == len(now)
    assert all(any(torch.equal(theta, tensor) for tensor in best.values()) for theta in now.values())
    for name, theta in other.items():
        assert torch.equal(thetas(model)[name], theta), name


def test_gates_frozen_by_hand_stay_so_when_resumed(tmp_path: Path) -> None:
    def make(folder: Path) -> Any:
        model = gate(build(LM_ROW))
        for name, found in collect_gates(model).items():
            found.theta.requires_grad_("down_proj" in name)
        return trainer_of(folder, model, args=SAVED, relaxation="hard_concrete")  # all of its gates move

    before = thetas(make(tmp_path / "before").model)
    make(tmp_path / "whole").train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    trained = {name: found.theta.requires_grad for name, found in collect_gates(resumed.model).items()}
    assert trained == {name: "down_proj" in name for name in trained}
    for name, theta in thetas(resumed.model).items():
        assert torch.equal(theta, before[name]) == ("down_proj" not in name), name


def test_the_state_is_written_whole(begun: Begun, tmp_path: Path) -> None:
    begun(gates_of, tmp_path)
    folder = tmp_path / "checkpoint-1"
    assert json.loads((folder / STATE_FILE).read_text())["goal"]["shapes"]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_students_that_are_saved_under_other_names_are_resumed(tmp_path: Path, name: str) -> None:
    data = [{"pixel_values": torch.full((3, 16, 16), value)} for value in (0.0, 0.5, 1.0, -1.0)]

    def student(folder: Path, steps: int) -> DistillTrainer:
        teacher = build(ROWS[name])
        small = slim(teacher, scattered_plan(teacher, ROWS[name].slim))
        return DistillTrainer(
            small, arguments(folder, **SAVED | {"max_steps": steps}), teacher=teacher, train_dataset=data
        )

    whole = student(tmp_path / "whole", 4)
    whole.train()
    resumed = student(tmp_path / "whole", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key
