"""The trainer of gates, in real runs of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, assert_same_state, build, difference, gate, scattered_plan
from gate_runs import DATA, LABELLED, TARGET, StopAt, arguments, logged, thetas, trainer_of
from peft import PeftModel

from hawada_peft import HawAdaTrainer, Shape, collect_gates
from hawada_peft.distil.divergence import kl_divergence


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> HawAdaTrainer:
    options = {"mse_weight": 0.1, "relaxation": "hard_concrete", "calibration_examples": 0}
    trainer = trainer_of(tmp_path_factory.mktemp("trained"), **options)
    trainer.train()
    return trainer


def test_training_ends_with_the_target_plan_applied(trained: HawAdaTrainer) -> None:
    assert trained.decided
    assert trained.model.applied_plan().shape == trained.target == TARGET
    assert trained.model.peft_config["default"].plan_in_training


def test_gates_move_and_nothing_else_does(trained: HawAdaTrainer) -> None:
    fresh = gate(build(LM_ROW), shuffle=False)
    before, after = thetas(fresh), thetas(trained.model)
    assert not [name for name, theta in after.items() if torch.equal(theta, before[name])]
    base = {name: tensor for name, tensor in trained.model.state_dict().items() if not name.endswith("theta")}
    expected = {name: tensor for name, tensor in fresh.state_dict().items() if not name.endswith("theta")}
    assert_same_state(base, expected)


def test_terms_of_the_loss_are_logged(trained: HawAdaTrainer) -> None:
    assert len(logged(trained, "kl")) == len(logged(trained, "mse")) == 6
    assert len(logged(trained, "size")) == 3  # the soft half
    first = trained.state.log_history[0]
    assert first["loss"] == pytest.approx(first["kl"] + 0.1 * first["mse"] + 10 * first["size"], rel=1e-4)


def test_evaluation_is_that_of_the_slim_model(trained: HawAdaTrainer) -> None:
    tokens = torch.stack([row["input_ids"] for row in DATA])
    found = trained.evaluate()["eval_loss"]
    model = PeftModel.from_pretrained(build(LM_ROW), save(trained)).eval()
    with torch.no_grad():
        with model.disable_adapter():
            teacher = model(input_ids=tokens).logits
        masked = model(input_ids=tokens).logits
        student = model.merge_and_unload()(input_ids=tokens).logits
    assert difference(student, masked) <= 1e-5
    expected = kl_divergence(student, teacher) + 0.1 * (student - teacher).square().mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_evaluation_needs_no_labels(trained: HawAdaTrainer) -> None:
    with_labels = trained.evaluate()["eval_loss"]
    assert trained.evaluate(DATA)["eval_loss"] == pytest.approx(with_labels)


def save(trainer: HawAdaTrainer) -> Path:
    folder = Path(trainer.args.output_dir) / "adapter"
    trainer.save_model(str(folder))
    return folder


def test_saved_adapter_holds_the_plan(trained: HawAdaTrainer) -> None:
    loaded = PeftModel.from_pretrained(build(LM_ROW), save(trained))
    assert loaded.applied_plan() == trained.model.applied_plan()
    torch.testing.assert_close(thetas(loaded), thetas(trained.model), rtol=0, atol=0)


def test_training_lowers_the_divergence_under_the_plan(tmp_path: Path) -> None:
    args = {"max_steps": 20, "learning_rate": 0.1}
    trainer = trainer_of(tmp_path, gate(build(LM_ROW)), soft_fraction=0.0, args=args)
    trainer.train()
    kl = logged(trainer, "kl")
    assert sum(kl[-5:]) < 0.9 * sum(kl[:5])


@pytest.mark.parametrize(("fraction", "soft"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_soft_fraction_says_when_the_gates_decide(tmp_path: Path, fraction: float, soft: int) -> None:
    trainer = trainer_of(tmp_path, soft_fraction=fraction, relaxation="hard_concrete")
    trainer.train()
    assert len(logged(trainer, "size")) == soft
    assert trainer.decided


def test_size_penalty_closes_gates(tmp_path: Path) -> None:
    options = {"soft_fraction": 1.0, "relaxation": "hard_concrete", "calibration_examples": 0}
    means = []
    for weight in (0.0, 10.0):
        trainer = trainer_of(tmp_path, size_weight=weight, **options)
        trainer.train()
        means.append(torch.cat([found.value().flatten() for found in collect_gates(trainer.model).values()]).mean())
    assert means[1] < means[0] - 0.05


@pytest.mark.parametrize("keep_ratio", [0.5, {"heads": 0.5, "layers": 0.5}])
def test_keep_ratio_instead_of_a_shape(tmp_path: Path, keep_ratio: Any) -> None:
    trainer = trainer_of(tmp_path, shape=None, keep_ratio=keep_ratio, args={"max_steps": 2})
    expected = trainer.model.plan(keep_ratio=keep_ratio).shape
    trainer.train()
    assert trainer.model.applied_plan().shape == trainer.target == expected


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for batch, accumulation in ((4, 1), (2, 2)):
        args = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "max_steps": 3,
        }
        options = {"train_dataset": LABELLED, "relaxation": "closing"}  # without random draws
        trainer = trainer_of(tmp_path, gate(build(LM_ROW)), args=args, **options)
        trainer.train()
        found.append((thetas(trainer.model), logged(trainer, "loss")))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


@pytest.mark.parametrize("interrupted", [2, 4], ids=["while soft", "after the decision"])
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path, interrupted: int) -> None:
    args = {"save_strategy": "steps", "save_steps": interrupted, "lr_scheduler_type": "linear"}
    whole = trainer_of(tmp_path / "whole", args=args)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{interrupted}"))
    assert resumed.model.applied_plan() == whole.model.applied_plan()
    torch.testing.assert_close(thetas(resumed.model), thetas(whole.model), rtol=0, atol=0)


def test_best_model_at_the_end_is_the_one_that_was_best(tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = trainer_of(tmp_path, args=steps | {"load_best_model_at_end": True})
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)


def test_a_trainer_on_a_planned_adapter_ends_at_its_own_target(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))
    model.apply_plan(scattered_plan(model, Shape(8, 4, 80, 4)))
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert trainer.model.applied_plan().shape == TARGET


def test_an_interrupted_training_is_decided_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[StopAt(1)], soft_fraction=1.0)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.model.applied_plan().shape == TARGET


def test_images_train_as_well(tmp_path: Path) -> None:
    model = gate(build(VISION_ROW), shuffle=False, gates=("heads", "ffn", "blocks", "layers"))
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": 0} for _ in range(4)]
    trainer = HawAdaTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=data, shape=Shape(4, 4, 40, 2))
    trainer.train()
    assert trainer.model.merge_and_unload().config.num_hidden_layers == 2


def test_the_config_is_the_base_models(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = trainer.model.config.to_dict() | {"use_cache": True}
    trainer.train()
    assert trainer.model.config.to_dict() == before
