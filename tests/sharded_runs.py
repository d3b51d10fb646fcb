"""Trainings that are the same alone and as one of several processes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from conftest import LM_ROW, build, gate, scattered_plan
from distil_runs import arguments as recovery_arguments
from gate_runs import LABELLED, TARGET, StopAt, arguments
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hawada_peft import HawAdaTrainer, LatencyBudget, Race, recover
from hawada_peft.distil.sharded import whole
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.resize import parameters_at

OPTIMIZER = {"optim": "adamw_torch", "adam_epsilon": 1e-2}  # no signs of gradients that are zero but for rounding
ROWS = (LABELLED * 5)[:36]  # four are set aside, the rest are whole steps


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> dict[str, Any]:
    """Training arguments."""
    return {"fsdp": True, "fsdp_config": {"version": 2}} if world() > 1 else {}


def sharding(args: TrainingArguments) -> Any:
    """The arguments; of several processes, with accelerate told that it may shard: it offers that on accelerators."""
    if world() > 1:
        _ = args.device  # the processes have met
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return args


def gates(folder: Path, stop: int, lora: LoraConfig | None = None) -> None:
    """Gates, or gates and LoRA: trained to the end, or up to a step; what they are then."""
    model = gate(build(LM_ROW), shuffle=False, lora=lora)
    options: dict[str, Any] = {
        "per_device_train_batch_size": 8 // world(),
        "calibration_examples": 16,
        "keep_better": "sliced",
    }
    options |= {"soft_fraction": 0.5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3} | OPTIMIZER
    args = sharding(arguments(folder, **options, **sharded()))
    trainer = HawAdaTrainer(model, args, shape=TARGET, train_dataset=ROWS)
    resume = bool(list(folder.glob("checkpoint-*")))
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume)
    trained = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
    report(folder, trained, model.applied_plan().to_json(), trainer.state.log_history)
    trainer.save_model(str(folder / "adapter"))
    assert world() == 1 or is_sharded(model)


def joint(folder: Path, stop: int) -> None:
    """Gates and LoRA."""
    gates(folder, stop, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def recovery(folder: Path, stop: int) -> None:
    """A slim model, recovered with all of its weights trained."""
    dense = build(LM_ROW)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    options = {"per_device_train_batch_size": 8 // world(), "save_strategy": "steps", "save_steps": 2}
    args = sharding(recovery_arguments(folder, **options, **OPTIMIZER, **sharded()))
    resume = bool(list(folder.glob("checkpoint-*")))
    stopping = [StopAt(stop)] if stop else []
    slimmed = recover(
        dense,
        args,
        train_dataset=ROWS,
        plan=scattered_plan(dense, LM_ROW.slim),
        optimizer="args",
        resume_from_checkpoint=resume,
        callbacks=stopping,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    report(folder, dict(slimmed.model.state_dict()), slimmed.plan.to_json(), [])


def race(folder: Path, _: int) -> None:
    """Plans that race for a recovery, and the recovery."""
    dense = build(LM_ROW, num_hidden_layers=6)
    layout = locate(dense)
    most = parameters_at(layout, replace(layout.dense, num_hidden_layers=4))
    args = recovery_arguments(folder, max_steps=8, per_device_train_batch_size=8 // world(), **OPTIMIZER)
    limit = LatencyBudget(max_parameters=most, seq_len=12)
    racing = Race(limit, plans=2, steps=1, preparations=("none",), rotate=False, share=0.5, onward="anew")
    whole_batches = LABELLED * 5
    rows = torch.stack([row["input_ids"] for row in whole_batches])
    batches = [{"input_ids": each} for each in rows.split(10)]
    slimmed = recover(dense, args, train_dataset=whole_batches, race=racing, calibration=batches, optimizer="args")
    runs = [{"kl": run.loss, "run": [run.entrant, run.rung, run.steps]} for run in slimmed.race.runs]
    told = json.dumps([slimmed.plan.to_json(), slimmed.race.winner, [run["run"] for run in runs]])
    report(folder, dict(slimmed.model.state_dict()), told, runs)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether all weights of the layers that are not trained are. The last norm and the head are gathered just now."""
    layers = {name: parameter for name, parameter in model.named_parameters() if ".layers." in name}
    return all(isinstance(parameter, DTensor) != parameter.requires_grad for parameter in layers.values())


def report(folder: Path, tensors: dict[str, torch.Tensor], plan: str, log: list[dict[str, Any]]) -> None:
    rank = os.environ.get("RANK", "0")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps({"plan": plan, "log": log}))
