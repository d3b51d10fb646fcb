"""Muon with AdamW as one optimizer: what each of them takes, that it is exactly both, and that it is resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_ROW, VISION_ROW, assert_same_state, build, gate, scattered_plan, state_of
from distil_runs import DATA, arguments, kl_of, slimmed, trainer_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hawada_peft import recover, slim
from hawada_peft.distil import muon
from hawada_peft.distil.muon import MuonAdamW, matrices_of, optimizer_of
from hawada_peft.errors import CheckpointError, HawAdaError

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


def names_of(model: nn.Module) -> set[str]:
    known = {id(matrix) for matrix in matrices_of(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in known}


class Odd(nn.Module):
    """What stands in the layers of some models beside plain linear modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.conv1d, layer.conv, layer.position = Conv1D(4, 6), nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)
        layer.tied, layer.frozen, layer.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 4))
        layer.tied.weight = layer.position.weight
        layer.frozen.requires_grad_(False)
        self.layers, self.head = nn.ModuleList([layer]), nn.Linear(4, 4)


@pytest.mark.parametrize("row", [LM_ROW, VISION_ROW], ids=["llama", "vit"])
def test_muon_takes_the_matrices_of_the_layers_and_nothing_else(row: Any) -> None:
    model = build(row)
    found = names_of(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in linear if ".layers." in name or ".layer." in name}
    assert found


def test_muon_leaves_embeddings_convolutions_and_tied_weights_alone() -> None:
    assert names_of(Odd()) == {"layers.0.conv1d.weight"}


def test_both_factors_of_lora_are_matrices() -> None:
    model = get_peft_model(build(LM_ROW), LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_of(model) == trained
    MuonAdamW(model.parameters(), matrices=matrices_of(model))  # nothing is left for AdamW but what has no gradient


def with_gradients(seed: int = 0) -> nn.Module:
    model = slimmed()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_a_step_is_exactly_that_of_both_optimizers() -> None:
    model, other = with_gradients(), with_gradients()
    optimizer = MuonAdamW(model.parameters(), 0.01, matrices=matrices_of(model), weight_decay=0.1)
    matrices = matrices_of(other)
    known = {id(matrix) for matrix in matrices}
    parts = (
        torch.optim.Muon(matrices, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in other.parameters() if id(p) not in known], 0.01, weight_decay=0.1),
    )
    for _ in range(3):
        optimizer.step()
        for part in parts:
            part.step()
    assert_same_state(model.state_dict(), other.state_dict())
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.02}


def test_weight_decay_is_that_of_the_groups() -> None:
    model = slimmed()
    pairs = [{"params": [p for p in model.parameters() if (p.ndim > 1) == wide], "weight_decay": 0.1 * wide}
             for wide in (True, False)]  # fmt: skip
    optimizer = MuonAdamW(pairs, 0.01, matrices=matrices_of(model))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p.ndim > 1: decays[id(p)] for p in model.parameters()} == {True: 0.1, False: 0.0}


def test_the_state_goes_through_a_file_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        model = with_gradients()
        optimizer = MuonAdamW(model.parameters(), 0.01, matrices=matrices_of(model))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        for step in range(4):
            if interrupted and step == 2:
                torch.save(optimizer.state_dict(), tmp_path / "state")
                optimizer = MuonAdamW(model.parameters(), 0.01, matrices=matrices_of(model))
                optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
                schedule.optimizer = optimizer
            optimizer.step()
            schedule.step()
        ends.append(state_of(model))
    assert_same_state(ends[1], ends[0])


def test_a_copy_steps_by_itself() -> None:
    model = with_gradients()
    both = model, MuonAdamW(model.parameters(), 0.01, matrices=matrices_of(model))
    before = state_of(model)
    twin, optimizer = copy.deepcopy(both)
    for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.grad = source.grad.clone()
    optimizer.step()
    assert_same_state(model.state_dict(), before)
    both[1].step()
    assert_same_state(twin.state_dict(), model.state_dict())


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = with_gradients()
    optimizer = MuonAdamW(model.parameters(), 0.01, matrices=matrices_of(model))
    with pytest.raises(CheckpointError, match="began with"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_only_matrices_are_taken() -> None:
    vector = nn.Parameter(torch.zeros(4))
    with pytest.raises(HawAdaError, match="matrices"):
        MuonAdamW([vector], matrices=[vector])


@pytest.mark.parametrize(
    ("optimizer", "options", "muons"),
    [("args", {}, False), ("auto", {}, True), ("muon", {}, True), ("auto", {"optim": "sgd"}, False)],
)
def test_the_trainer_takes_the_optimizer_that_it_is_told(
    tmp_path: Path, optimizer: str, options: dict[str, Any], muons: bool
) -> None:
    trainer = trainer_of(tmp_path, args=options, optimizer=optimizer)
    assert isinstance(trainer.create_optimizer(), MuonAdamW) == muons
    assert not isinstance(trainer_of(tmp_path, args=options).create_optimizer(), MuonAdamW)


def test_lora_is_trained_by_adamw_unless_asked(tmp_path: Path) -> None:
    model, args = get_peft_model(build(LM_ROW), LORA), arguments(tmp_path)
    assert optimizer_of("auto", model, args) is None
    assert optimizer_of("muon", model, args) is not None


@pytest.mark.parametrize("optimizer", ["muon", "auto"])
def test_without_muon_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert not muon.has_muon()
    if optimizer == "muon":
        with pytest.raises(HawAdaError, match=r"2\.9"):
            trainer_of(tmp_path, optimizer=optimizer)
    else:
        assert isinstance(trainer_of(tmp_path, optimizer=optimizer).create_optimizer(), torch.optim.AdamW)


def test_what_muon_cannot_do_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    dense = build(LM_ROW)
    plan, before = scattered_plan(dense, LM_ROW.slim), state_of(dense)
    with pytest.raises(HawAdaError, match="one of"):
        recover(dense, arguments(tmp_path), train_dataset=DATA, plan=plan, optimizer="adam")
    assert_same_state(dense.state_dict(), before)
    student = slimmed().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(True)
    with pytest.raises(HawAdaError, match="no matrix"):
        trainer_of(tmp_path, student, optimizer="muon")
    own = torch.optim.SGD(student.parameters()), None
    with pytest.raises(HawAdaError, match="not both"):
        trainer_of(tmp_path, student, optimizer="muon", optimizers=own)


def test_a_recovery_is_muons_unless_told_otherwise(tmp_path: Path) -> None:
    ends = {}
    for name in ("auto", "muon", "args"):
        dense = build(LM_ROW)
        args = arguments(tmp_path / name, max_steps=8, learning_rate=0.003)
        plan = scattered_plan(dense, LM_ROW.slim)
        before = kl_of(slim(dense, plan), dense)
        student = recover(dense, args, train_dataset=DATA, plan=plan, optimizer=name).model
        assert kl_of(student, dense) < 0.9 * before
        ends[name] = state_of(student)
    assert_same_state(ends["auto"], ends["muon"])
    assert any(not torch.equal(tensor, ends["muon"][name]) for name, tensor in ends["args"].items())


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_an_interrupted_recovery_is_resumed_to_the_same_bits(tmp_path: Path, lora: LoraConfig | None) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    ends = []
    for name, resumed in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        model = gate(build(LM_ROW))
        model.apply_plan(scattered_plan(model, LM_ROW.slim))
        common = {"train_dataset": DATA, "lora": lora, "optimizer": "muon", "resume_from_checkpoint": resumed}
        ends.append(state_of(recover(model, arguments(tmp_path / name, **options), **common).model))
    assert_same_state(ends[1], ends[0])
