"""A saved adapter on a model without weights, and what it makes of single tensors: LoRA added, gates multiplied in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from .._register import NAME
from ..errors import BrokenGatesError, HawAdaError, UnsupportedModelError
from ..gates.adapter import GateAdapter
from ..gates.lora import sound_lora_layers
from ..gates.saved import check_adapter_file
from ..sources import ADAPTER_FILE, check_source
from ..vanilla.modules import Base, fold_factors, parameters_of

DEFAULT = "default"
"""PEFT's name of an adapter."""

Factors = tuple[torch.Tensor | None, torch.Tensor | None]
"""What a module's inputs and its output are multiplied by."""


def gates_config(adapter: str | os.PathLike[str]) -> PeftConfig:
    """
    The configuration of saved gates.

    Args:
        adapter: folder or Hub id.

    Raises:
        FileNotFoundError: if there is no such adapter.
        HawAdaError: if it is no adapter, or one of another type.
    """
    name = os.fspath(adapter)
    check_source(name, ADAPTER_FILE)
    try:
        config = PeftConfig.from_pretrained(name)
    except HawAdaError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # PEFT's, on other JSON
        raise HawAdaError(f"{name} is not an adapter: {error}") from error
    weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if Path(name).is_dir() and not any((Path(name) / each).exists() for each in weights):
        raise HawAdaError(f"{name} holds no weights of an adapter ({weights[0]}): save the adapter again")
    if config.peft_type == NAME:
        check_adapter_file(name)
    else:
        raise HawAdaError(
            f"{name} is an adapter of type {PeftType(config.peft_type).value}, needed is one of type {NAME}"
        )
    return config


def load_gates(skeleton: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    """
    The gates of a saved adapter on a model without weights.

    Args:
        skeleton: on the meta device; its modules are wrapped in place.
        adapter: folder or Hub id.

    Raises:
        HawAdaError: if the adapter is of another type, or its file does not hold what it should.
        IncompatibleBaseError: if it is for another base model, or holds embeddings of another size.
        BrokenGatesError: if it holds NaN or infinity.
    """
    name, config = os.fspath(adapter), gates_config(adapter)
    config.base_model_name_or_path, config.inference_mode = skeleton.name_or_path, True
    gated = cast(PeftModel, get_peft_model(skeleton, config, adapter_name=DEFAULT))
    tensors = load_peft_weights(name, device="cpu")
    parameters = dict(gated.named_parameters(remove_duplicate=False))
    # Beside the adapter's own: embeddings in its file, which take the place of the base model's under all their names.
    storages: dict[int, nn.Parameter] = {}
    replaced = {id(parameters[key]) for key in tensors.keys() & parameters.keys()}
    for key, parameter in parameters.items():
        if parameter.is_meta and (DEFAULT in key.split(".") or id(parameter) in replaced):
            storage = storages.setdefault(id(parameter), _no_values(parameter))
            owner, _, attribute = key.rpartition(".")
            setattr(gated.get_submodule(owner), attribute, storage)
    for key, buffer in list(gated.named_buffers()):  # the basis of a residual stream
        if buffer.is_meta and DEFAULT in key.split("."):
            owner, _, attribute = key.rpartition(".")
            setattr(gated.get_submodule(owner), attribute, torch.empty_like(buffer, device="cpu"))
    try:
        set_peft_model_state_dict(gated, tensors, DEFAULT)
    except KeyError as error:  # PEFT's, on modules to save
        raise HawAdaError(f"the adapter's file lacks the weights {error}: it is damaged") from None
    return gated


def _no_values(parameter: nn.Parameter) -> nn.Parameter:
    """A tensor on the CPU for one without data: NaN until it is loaded, so that nothing can be computed with it."""
    return nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"), requires_grad=False)


def factors_of(gated: PeftModel) -> dict[str, Factors]:
    """What the gates multiply into the weights, by the name of the module that they wrap."""
    found = {}
    for name, module in gated.get_base_model().named_modules():
        if not isinstance(module, GateAdapter) or not module.gates(DEFAULT):
            continue
        with torch.no_grad():
            factors = module.input_factor([DEFAULT], hard=True), module.output_factor([DEFAULT], hard=True)
        if not all(torch.isfinite(factor).all() for factor in factors if factor is not None):
            raise BrokenGatesError(f"the gates of {name} hold NaN or infinite values; train them again")
        found[name] = factors
    return found


def lora_of(gated: PeftModel) -> dict[str, Any]:
    """
    PEFT's LoRA layers below the gates, by the name of the module that they are on.

    Raises:
        BrokenGatesError: if LoRA holds NaN or infinity.
        UnsupportedModelError: if it is on modules that hold more than a weight and a bias.
    """
    layers = sound_lora_layers(gated.get_base_model(), [DEFAULT])
    odd = [
        name
        for name, layer in layers
        if not {key for key, _ in layer.get_base_layer().named_parameters()} <= {"weight", "bias"}
    ]
    if odd:
        raise UnsupportedModelError(
            f"LoRA on {odd[:3]}{' ...' if odd[3:] else ''} cannot be merged tensor by tensor: load the model, and use "
            "`merge_and_unload` and `save_slim`"
        )
    return {name.removesuffix(".base_layer"): layer for name, layer in layers}


def merge_tensor(layer: Any, which: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    A module's `weight` or `bias` with its LoRA added, by PEFT's own merge.

    Args:
        layer: of `lora_of`; its module is without data, before and after.
        which: of the tensors.
        tensors: the module's whole weight, and its bias if LoRA changes that.
    """
    base = layer.get_base_layer()
    empty = {name: getattr(base, name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(base, name, nn.Parameter(tensor, requires_grad=False))
    try:
        layer.merge(safe_merge=True, adapter_names=[DEFAULT])
        return cast(torch.Tensor, getattr(base, which).data)
    finally:
        layer.merged_adapters.clear()
        for name, parameter in empty.items():
            setattr(base, name, parameter)


def fold_tensor(module: nn.Module, which: str, tensor: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The module's `weight` or `bias` with the factors in it; the module's other parameters stay without data."""
    base = cast(Base, module)
    parameter = getattr(base, which)
    index = next((i for i, each in enumerate(parameters_of(base)) if each is parameter), None)
    if index is None:  # of experts, what comes before the channels
        return tensor
    setattr(base, which, nn.Parameter(tensor, requires_grad=False))
    try:
        return fold_factors(base, *factors)[index]
    finally:
        setattr(base, which, parameter)
