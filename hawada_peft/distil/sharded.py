"""
Weights sharded over processes by FSDP2, as accelerate does it: what stays whole there, and copies to shard.

Frozen weights are sharded; the small tensors that an adapter trains stay whole in every process, so that gates can be
read, planned, saved and resumed as in one process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import fsdp2_prepare_model, str_to_bool  # type: ignore[import-untyped]
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..errors import HawAdaError

Model = TypeVar("Model", bound=nn.Module)


def shards(args: TrainingArguments | None) -> bool:
    """Whether a training by these arguments shards its model: they say so, or `accelerate launch` does."""
    return bool(args and args.fsdp) or bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_version(accelerator: Any) -> None:
    """
    Raises:
        HawAdaError: if the model would be sharded by the first version of FSDP, or was loaded in one process alone.
    """
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise HawAdaError(
            'only FSDP2 is known here: pass fsdp_config={"version": 2}, or fsdp_version: 2 in the config of accelerate'
        )
    if plugin.cpu_ram_efficient_loading:
        raise HawAdaError(
            "gates are read in every process, so every process has to load the weights: set "
            "cpu_ram_efficient_loading=False"
        )


def check_zero(accelerator: Any) -> None:
    """
    Raises:
        HawAdaError: if DeepSpeed would leave a part of each weight in each process, where gates could not be read.
    """
    if accelerator.state.deepspeed_plugin.zero_stage >= 3:
        raise HawAdaError(
            "DeepSpeed ZeRO-3 leaves a part of each weight in each process, and gates and weights are read in all: "
            'shard by FSDP2 (fsdp=True, fsdp_config={"version": 2}), or take ZeRO stage 1 or 2'
        )


def keep_trained_whole(accelerator: Any, model: nn.Module) -> list[nn.Parameter]:
    """Let accelerate shard all of a model but what is trained, which is taken to the device and returned."""
    owners = [module for module in model.modules() if any(p.requires_grad for p in _own(module))]
    for module in owners:
        module.to(accelerator.device)
    accelerator.state.fsdp_plugin.ignored_modules = owners
    return [parameter for module in owners for parameter in module.parameters() if parameter.requires_grad]


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Any) -> None:
    """
    The mean of gradients over processes, for parameters that no wrapper reduces, in one exchange for each dtype.

    Args:
        parameters: the same in every process; those without a gradient are left out, in all of them.
        accelerator: an `Accelerator`.
    """
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def same_everywhere(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the values that the first one has."""
    for parameter in parameters:
        distributed.broadcast(parameter.data, src=0)


def twin_of(model: Model) -> Model:
    """
    A model of its own with the same weights: what shards it, leaves the other one as it is.

    Modules are copied; parameters and buffers are new objects on the same memory.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def sharded_teacher(accelerator: Any, teacher: Model) -> Model:
    """A frozen twin of a dense model, sharded as accelerate shards the student."""
    twin, plugin = twin_of(teacher).requires_grad_(False), accelerator.state.fsdp_plugin
    ignored, plugin.ignored_modules = plugin.ignored_modules, None
    try:
        return cast(Model, fsdp2_prepare_model(accelerator, twin))
    finally:
        plugin.ignored_modules = ignored


@torch.no_grad()
def gather_into(model: nn.Module, twin: nn.Module) -> None:
    """
    Put what a sharded twin was trained to into the model that it is one of, in every process.

    Args:
        model: whole; keeps its devices and dtypes.
        twin: sharded. Every process has to call this.
    """
    places = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            place = places[_plain(name)]
            place.data = whole(parameter.detach()).to(place.device, place.dtype)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _plain(name: str) -> str:
    """Without what checkpointing and compilation add to names."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
