"""Trained gates are never worse than their start: what is compared, what is kept, what a checkpoint holds of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, assert_same_state, build, difference, gate, logits_of, scattered_plan, state_of
from gate_runs import TARGET, thetas, trainer_of
from peft import LoraConfig, PeftModel
from torch.utils.data import IterableDataset

from hawada_peft import HawAdaTrainer, Shape, init_gates
from hawada_peft.errors import CheckpointError
from hawada_peft.processes import of_this_rank
from hawada_peft.refit.fidelity import divergence
from hawada_peft.training.comparison import START_FILE, Comparison, StartingPoint, set_aside
from hawada_peft.training.history import HISTORY_FILE

TEXT = [{"input_ids": torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(i))} for i in range(24)]
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True)


def compared(folder: Path, model: PeftModel | None = None, *, args: Any = None, **options: Any) -> HawAdaTrainer:
    options = {"train_dataset": TEXT, "keep_better": "both", "calibration_examples": 12} | options
    model = gate(build(LM_ROW), shuffle=False) if model is None else model
    return trainer_of(folder, model, args={"max_steps": 4, "logging_steps": 10} | (args or {}), **options)


def started(trainer: HawAdaTrainer) -> dict[str, torch.Tensor]:
    """What the same trainer starts from."""
    model = gate(build(LM_ROW), shuffle=False)
    init_gates(model, trainer._calibration(), shape=TARGET)
    return thetas(model)


@pytest.mark.parametrize("lora", [None, LORA], ids=["gates", "with lora"])
def test_a_training_that_ruins_the_gates_ends_with_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraConfig | None
) -> None:
    model = gate(build(LM_ROW), shuffle=False, lora=lora)
    trainer = compared(tmp_path, model, args={"learning_rate": 5.0})
    right = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: -right(*args, **kwargs))
    trainer.train()
    comparison = trainer.comparison
    assert comparison.kept == "start"
    assert comparison.trained["sliced"] > comparison.start["sliced"]
    expected = started(trainer)
    assert all(torch.equal(theta, expected[name]) for name, theta in thetas(model).items())
    fresh = gate(build(LM_ROW), shuffle=False)
    init_gates(fresh, trainer._calibration(), shape=TARGET)
    fresh.apply_plan(fresh.plan(TARGET))
    assert model.applied_plan() == fresh.applied_plan()
    assert difference(logits_of(model), logits_of(fresh)) <= 1e-6  # whatever LoRA had learned is gone too
    assert difference(logits_of(model.merge_and_unload()), logits_of(fresh)) <= 1e-5


def test_a_training_that_improves_the_gates_is_kept(tmp_path: Path) -> None:
    model = gate(build(LM_ROW))  # gates that are far from any use
    args = {"max_steps": 24, "learning_rate": 0.1}
    trainer = compared(tmp_path, model, keep_better="sliced", soft_fraction=0.0, args=args)
    trainer.train()
    comparison = trainer.comparison
    assert comparison.kept == "trained"
    assert comparison.trained["sliced"] < 0.9 * comparison.start["sliced"]
    assert set(comparison.trained) == {"sliced"}
    before = thetas(gate(build(LM_ROW)))
    assert any(not torch.equal(theta, before[name]) for name, theta in thetas(model).items())


def test_the_losses_are_those_of_the_slim_models_on_what_was_set_aside(tmp_path: Path) -> None:
    trainer = compared(tmp_path)
    trainer.train()
    dense, batches = build(LM_ROW), trainer._held_out()
    assert sum(len(batch["input_ids"]) for batch in batches) == trainer.comparison.examples == 3
    model = trainer.gated
    kept = trainer.comparison.trained if trainer.comparison.kept == "trained" else trainer.comparison.start
    with model.beside() as (view, small):
        sliced = divergence(view, small, batches, of_this_rank)
    assert sliced == (trainer.comparison.metric, pytest.approx(kept["sliced"], rel=1e-4))
    small = model.merge_and_unload(calibration=trainer._calibration())
    assert divergence(dense, small, batches, of_this_rank)[1] == pytest.approx(kept["refitted"], rel=1e-3)


def test_comparing_changes_nothing_but_what_is_kept(tmp_path: Path) -> None:
    trainer = compared(tmp_path / "one", args={"learning_rate": 0.0})
    trainer.train()
    before = state_of(trainer.gated)
    drawn = torch.get_rng_state()
    trainer._end()
    assert trainer.comparison.kept == "trained"  # the same, which is not worse
    assert trainer.comparison.start == pytest.approx(trainer.comparison.trained)
    assert_same_state(state_of(trainer.gated), before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_nothing_that_was_set_aside_is_trained_on(tmp_path: Path) -> None:
    trainer = compared(tmp_path)
    held = {tuple(row["input_ids"].tolist()) for row in trainer.set_aside}
    seen = {tuple(row.tolist()) for batch in trainer.get_train_dataloader() for row in batch["input_ids"]}
    assert len(held) == 3
    assert not held & seen
    assert len(held | seen) == len(TEXT)


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(24, 3, 3), (24, 16, 3), (7, 4, 0), (100, 16, 12), (24, 0, 0)]
)
def test_at_most_one_of_eight_is_set_aside(total: int, count: int, expected: int) -> None:
    data = list(range(total))
    left, held = set_aside(data, count)
    found = [] if held is None else list(held)
    assert len(found) == expected
    assert sorted([*left, *found]) == data


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from TEXT * 4


@pytest.mark.parametrize(
    "options", [{"keep_better": "never"}, {"calibration_examples": 0}, {"train_dataset": Endless()}]
)
def test_what_cannot_be_compared_is_left_as_it_was_trained(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = compared(tmp_path, args={"save_strategy": "steps", "save_steps": 2}, **options)
    trainer.train()
    assert trainer.comparison is None
    assert trainer.set_aside is None
    assert not list(tmp_path.rglob(START_FILE))


@pytest.mark.parametrize("gates", [("heads", "ffn"), ("hidden",)], ids=["width", "hidden"])
def test_what_cannot_be_refitted_is_compared_as_sliced(tmp_path: Path, gates: tuple[str, ...]) -> None:
    model = gate(build(LM_ROW), shuffle=False, gates=gates)
    hidden = gates == ("hidden",)
    shape = Shape(hidden_size=32) if hidden else Shape(4, 2, 40)
    trainer = compared(tmp_path, model, shape=shape, keep_better="refitted")
    trainer.train()
    assert set(trainer.comparison.start) == ({"sliced"} if hidden else {"sliced", "refitted"})


def test_a_refit_that_fails_loses_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # of the start, when the trained gates have been measured already
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("hawada_peft.training.comparison.refit_model", fail)
    trainer = compared(tmp_path)
    trainer.train()
    assert set(trainer.comparison.start) == set(trainer.comparison.trained) == {"sliced"}
    assert "no memory" in caplog.text


@pytest.mark.parametrize(
    ("keep", "sliced", "refitted", "kept"),
    [
        ("both", 1.0, 1.0, "trained"),
        ("both", 0.5, 2.0, "start"),
        ("both", 2.0, 0.5, "start"),
        ("sliced", 0.5, 2.0, "trained"),
        ("refitted", 0.5, 2.0, "start"),
        ("refitted", math.nan, 0.5, "trained"),
        ("both", math.nan, 0.5, "start"),
    ],
)
def test_what_is_kept(keep: str, sliced: float, refitted: float, kept: str) -> None:
    found = Comparison("kl", {"sliced": 1.0, "refitted": 1.0}, {"sliced": sliced, "refitted": refitted}, keep, 4)
    assert found.kept == found.to_dict()["kept"] == kept
    assert ("put back" in str(found)) == (kept == "start")


def test_the_history_tells_it(tmp_path: Path) -> None:
    trainer = compared(tmp_path)
    trainer.train()
    assert json.loads((tmp_path / HISTORY_FILE).read_text())["comparison"] == trainer.comparison.to_dict()


@pytest.mark.parametrize("lora", [None, LORA], ids=["gates", "with lora"])
@pytest.mark.parametrize("rate", [0.02, 5.0], ids=["small rate", "large rate"])
def test_a_resumed_training_compares_with_the_same_start(tmp_path: Path, rate: float, lora: Any) -> None:
    args = {"save_strategy": "steps", "save_steps": 2, "learning_rate": rate}
    ends = []
    for name, resumed in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        trainer = compared(tmp_path / name, gate(build(LM_ROW), shuffle=False, lora=lora), args=args)
        trainer.train(resume_from_checkpoint=resumed)
        ends.append((state_of(trainer.gated), trainer.gated.applied_plan(), trainer.comparison))
    assert_same_state(ends[1][0], ends[0][0])
    assert ends[1][1:] == ends[0][1:]


def test_a_checkpoint_without_its_start_is_refused(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2}
    compared(tmp_path, args=args).train()
    file = tmp_path / "checkpoint-2" / START_FILE
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="damaged"):
        compared(tmp_path, args=args).train(resume_from_checkpoint=str(file.parent))
    file.unlink()
    with pytest.raises(CheckpointError, match="keep_better='never'"):
        compared(tmp_path, args=args).train(resume_from_checkpoint=str(file.parent))


def test_a_starting_point_goes_through_a_file(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), lora=LORA)
    start = StartingPoint.of(model, scattered_plan(model, TARGET))
    start.save(tmp_path)
    loaded = StartingPoint.load(tmp_path)
    assert loaded.plan == start.plan
    assert_same_state(dict(loaded.tensors), dict(start.tensors))
    before = state_of(model)
    with torch.no_grad():
        for name in start.tensors:
            model.get_parameter(name).add_(1.0)
    loaded.put_into(model)
    assert_same_state(state_of(model), before)
    assert model.applied_plan() == start.plan
