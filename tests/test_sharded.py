"""Sharded trainings (FSDP2) of two and four processes on the CPU, against one process with the same batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_runs
import torch
from conftest import LM_ROW, build, gate
from gate_runs import DATA, TARGET, arguments
from pairs import in_several
from peft import PeftModel
from safetensors.torch import load_file

from hawada_peft import HawAdaTrainer, LatencyBudget
from hawada_peft.distil.sharded import check_version, check_zero, gather_into, twin_of
from hawada_peft.errors import HawAdaError


def started(what: Callable[[Path, int], None], folder: Path, processes: int, stop: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    in_several(processes, what, folder, stop)


def result(folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text())


def assert_as_in_one_process(folder: Path, alone: Path, processes: int) -> None:
    tensors, facts = result(alone, 0)
    for rank in range(processes):
        found, told = result(folder, rank)
        assert told["plan"] == facts["plan"]
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    losses = [[entry["kl"] for entry in told["log"] if "kl" in entry] for told in (facts, told)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gates_and_lora_are_those_of_one_process_and_resumed_by_one(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    sharded_runs.joint(tmp_path / "alone", 0)
    started(sharded_runs.joint, tmp_path / "several", 2)
    assert_as_in_one_process(tmp_path / "several", tmp_path / "alone", 2)
    shutil.rmtree(tmp_path / "several" / "checkpoint-6")
    sharded_runs.joint(tmp_path / "several", 0)  # goes on from the fourth step
    assert_as_in_one_process(tmp_path / "several", tmp_path / "alone", 1)
    model = PeftModel.from_pretrained(build(LM_ROW), tmp_path / "several" / "adapter")
    trained, _ = result(tmp_path / "several", 0)
    assert model.applied_plan() is not None
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_a_recovery_is_that_of_one_process_and_resumed_by_more(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    sharded_runs.recovery(tmp_path / "alone", 0)
    started(sharded_runs.recovery, tmp_path / "several", 2, stop=2)
    started(sharded_runs.recovery, tmp_path / "several", 4)
    assert_as_in_one_process(tmp_path / "several", tmp_path / "alone", 4)


def test_a_race_is_that_of_one_process_and_goes_on_in_one(tmp_path: Path) -> None:
    """Every process trains each entrant on its part of the batches; the weights are not sharded."""
    (tmp_path / "alone").mkdir()
    sharded_runs.race(tmp_path / "alone", 0)
    started(sharded_runs.race, tmp_path / "several", 2)
    assert_as_in_one_process(tmp_path / "several", tmp_path / "alone", 2)
    record = json.loads((tmp_path / "several" / "race" / "race.json").read_text())
    runs = record["runs"]
    assert len(runs) > 1
    (tmp_path / "several" / "race" / "race.json").write_text(json.dumps(record | {"runs": runs[:1], "winner": None}))
    sharded_runs.race(tmp_path / "several", 0)  # of what has run nothing runs again
    again = json.loads((tmp_path / "several" / "race" / "race.json").read_text())["runs"]
    assert again[0] == runs[0]
    assert [run["loss"] for run in again] == pytest.approx([run["loss"] for run in runs], rel=1e-4)


def test_a_twin_shares_weights_and_no_module() -> None:
    model = build(LM_ROW, tie_word_embeddings=True)
    twin = twin_of(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    for (name, tensor), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert tensor is not other
        assert tensor.data_ptr() == other.data_ptr(), name
    twin.lm_head.weight.data = twin.lm_head.weight.data + 1
    assert not torch.equal(twin.lm_head.weight, model.lm_head.weight)
    gather_into(model, twin)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("version", "efficient", "fact"), [(1, False, '"version": 2'), (2, True, "every process")])
def test_what_cannot_be_sharded_here_is_told(version: int, efficient: bool, fact: str) -> None:
    plugin = SimpleNamespace(cpu_ram_efficient_loading=efficient)
    accelerator = SimpleNamespace(is_fsdp2=version == 2, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(HawAdaError, match=fact):
        check_version(accelerator)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_in_parts_are_refused(stage: int) -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))
    with pytest.raises(HawAdaError, match="FSDP2") if stage == 3 else nullcontext():
        check_zero(accelerator)


def test_a_budget_is_refused_before_any_training(tmp_path: Path) -> None:
    model = gate(build(LM_ROW), shuffle=False)
    trainer = HawAdaTrainer(model, arguments(tmp_path), budget=LatencyBudget(speedup=1.2), train_dataset=DATA)
    trainer.is_fsdp_enabled = True
    with pytest.raises(HawAdaError, match=r"shape=plan\.shape"):
        trainer.train()
    trainer = HawAdaTrainer(model, arguments(tmp_path), shape=TARGET, train_dataset=DATA)
    assert trainer._whole == []
