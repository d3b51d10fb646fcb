"""What a saved adapter holds: exactly its gates, its LoRA, its modules to save, and embeddings that came with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .._register import PREFIX
from ..errors import BrokenGatesError, HawAdaError, IncompatibleBaseError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What an adapter's tensors may be stored as; buffers of a module to save also as what the model has them."""


def check_adapter_file(folder: str | os.PathLike[str]) -> frozenset[str] | None:
    """
    Check that the weights in an adapter's folder, if there is one, are in a file that can be read.

    Args:
        folder: the adapter's folder; ids of the Hub are left to PEFT.

    Returns:
        The names of the tensors in it, if it is a safetensors file in a folder.

    Raises:
        HawAdaError: if they are in something else (a pipe would be waited for), or the file cannot be read.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        file = Path(folder) / name
        if file.exists() and not file.is_file():
            raise HawAdaError(f"{file} is not a file; put the adapter's weights there")
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if file.exists():
        try:
            with safe_open(file, "pt") as opened:
                return frozenset(opened.keys())
        except SafetensorError as error:
            raise HawAdaError(f"{file} is damaged: {error}; save the adapter again") from None
    return None


def _keeps_wider(module: nn.Module) -> bool:
    """Whether a model's class keeps some weights in float32, whatever the others are: gates follow these."""
    return isinstance(module, PreTrainedModel) and bool(
        module._keep_in_fp32_modules or module._keep_in_fp32_modules_strict
    )


def check_modules_to_save(model: nn.Module, modules_to_save: Iterable[str], names: Iterable[str]) -> None:
    """
    Check that an adapter's file holds all of every module to save: PEFT takes it for granted.

    Args:
        model: the base model.
        modules_to_save: of the adapter's config. PEFT adds names of heads that only other models have.
        names: the tensors in the file.

    Raises:
        HawAdaError: naming what is missing.
    """
    ends, known = tuple(modules_to_save), set(names)
    missing = []
    for name, module in model.named_modules():
        if name.split(".")[-1] in ends or any(name.endswith(f".{end}") for end in ends):
            inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            wanted = [f"base_model.model.{name}.{key}" for key in inner.state_dict()]
            missing += [each for each in wanted if each not in known]
    if missing:
        raise HawAdaError(f"the adapter's file lacks the weights {_some(missing)}: save the adapter again")


def check_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Check what is to be loaded into an adapter, before any of it is.

    Args:
        model: with the adapter in it; may be on the meta device.
        adapter_name: under this name.
        tensors: by their names in the model.

    Raises:
        HawAdaError: if one is missing, is none of the adapter's, or is no floating tensor of the expected size.
        IncompatibleBaseError: if embeddings are of another size than the base model's.
        BrokenGatesError: if one holds NaN or infinity.
    """
    state = model.state_dict()
    own = {name for name in state if _is_of(name, adapter_name)}
    beside = tuple(f"{name}." for name in _embedding_names(model))
    missing = sorted(own - tensors.keys())
    if missing:
        raise HawAdaError(f"the adapter's file lacks the weights {_some(missing)}: save the adapter again")
    unknown = sorted(name for name in tensors.keys() - own if not name.startswith(beside))
    if unknown:
        raise HawAdaError(
            f"the adapter's file holds {_some(unknown)}: none of its gates, LoRA, modules to save or embeddings. "
            "Leave them out, or save the adapter again"
        )
    for name, tensor in tensors.items():
        expected = state.get(name)
        if tensor.dtype not in DTYPES and (expected is None or expected.dtype != tensor.dtype):
            allowed = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
            raise HawAdaError(f"the adapter's file holds {name} as {tensor.dtype}; allowed are {allowed}")
        if expected is not None and expected.shape != tensor.shape:
            _refuse_shape(name, tensor, expected, embeddings=name not in own)
    gates = {str(tensors[name].dtype): name for name in sorted(own) if f".{PREFIX}" in name}
    if len(gates) > 1 and not any(map(_keeps_wider, model.modules())):
        raise HawAdaError(f"the adapter's file holds gates of several dtypes ({gates}): it is damaged")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BrokenGatesError(f"NaNs detected in the adapter's file: {_some(broken)} must be finite; train it again")


def _is_of(name: str, adapter_name: str) -> bool:
    """Whether a tensor of the model belongs to an adapter: its name follows that of a slot."""
    parts = name.split(".")
    return any(
        part == adapter_name and (slot.startswith((PREFIX, "lora_")) or slot == "modules_to_save")
        for slot, part in pairwise(parts)
    )


def _embedding_names(model: nn.Module) -> list[str]:
    """The modules that PEFT may save with an adapter: input and output embeddings, whatever wraps them."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # no transformers model, or one without embeddings
        return []
    wanted = {id(layer) for layer in layers if layer is not None}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _refuse_shape(name: str, tensor: torch.Tensor, expected: torch.Tensor, *, embeddings: bool) -> None:
    found, wanted = tuple(tensor.shape), tuple(expected.shape)
    if not embeddings:
        raise HawAdaError(f"the adapter's file holds {name} of shape {found}, expected is {wanted}")
    raise IncompatibleBaseError(
        f"the adapter holds embeddings {name} of shape {found}, the base model has {wanted}: resize the base first, "
        f"`base.resize_token_embeddings({found[0]})`, and for slimming from files save it then"
    )


def _some(names: list[str]) -> str:
    return f"{names[:3]}{' ...' if names[3:] else ''}"
