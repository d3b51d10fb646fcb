"""LoRA below the gates: PEFT's own layers, injected first, so that a gate wraps the layer with its LoRA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import BrokenGatesError, HawAdaError, UnsupportedModelError
from .adapter import GateAdapter

_OWN = (
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
)
"""Fields that the gates' configuration has itself."""

_INITS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal")
"""Ways of starting LoRA that leave the base weights as they are: they are the teacher's."""


def lora_fields(config: LoraConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What of a LoRA configuration differs from PEFT's defaults, as JSON holds it."""
    if not isinstance(config, LoraConfig):
        return dict(config)
    default = LoraConfig().to_dict()
    fields = {name: value for name, value in config.to_dict().items() if name not in _OWN}
    changed = {name: value for name, value in fields.items() if value != default.get(name)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def lora_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a LoRA configuration below gates."""
    try:
        config = LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        yield f"lora is no LoraConfig: {error}"
        return
    if not isinstance(config.r, int) or isinstance(config.r, bool) or config.r < 1:
        yield f"lora: r must be a whole number of at least 1, got {config.r!r}"
    if config.init_lora_weights not in _INITS:
        yield (
            f"lora: init_lora_weights must be one of {list(_INITS)}, got {config.init_lora_weights!r}, which changes "
            "the base weights, and these are the teacher's"
        )
    if config.bias != "none":
        yield f"lora: bias must be 'none', got {config.bias!r}: the biases are the teacher's"
    if config.modules_to_save:
        yield "lora: name modules_to_save in the HawAdaConfig"
    for name in ("target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, name):
            yield f"lora: {name} is not supported below gates"


def inject_lora(model: nn.Module, fields: Mapping[str, Any], adapter_name: str, *, inference_mode: bool) -> None:
    """
    Put LoRA on a model's modules, in place, before the gates.

    Raises:
        UnsupportedModelError: if there are gates already, or LoRA would be on tied weights.
        HawAdaError: if a field is of another type than PEFT takes.
        ValueError: by PEFT, if nothing matches.
    """
    if any(isinstance(module, GateAdapter) for module in model.modules()):
        raise UnsupportedModelError(
            "LoRA lies below the gates, and this model has gates already: make the adapter with `lora` the first one"
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = vars(model).pop("peft_config", None)  # or PEFT would write into the dict of configs that it finds there
    try:
        inject_adapter_in_model(LoraConfig(**fields, inference_mode=inference_mode), model, adapter_name)
    except (TypeError, AttributeError, re.error) as error:  # PEFT's, on fields of other types
        raise HawAdaError(f"lora cannot be made of {dict(fields)}: {error}") from error
    finally:
        vars(model).pop("peft_config", None)
        if kept is not None:
            model.peft_config = kept
    for _, layer in lora_layers(model):
        layer.train(layer.get_base_layer().training)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = [name for name, layer in lora_layers(model) if owners[id(layer.get_base_layer().weight)] > 1]
    if tied:
        _remove(model)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise UnsupportedModelError(
            f"LoRA on {tied} would change every module that shares its weights: leave it out of lora's "
            "`target_modules`, or untie the weights"
        )


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The LoRA layers of a model by their dotted names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def sound_lora_layers(model: nn.Module, adapter_names: Sequence[str]) -> list[tuple[str, Any]]:
    """
    The LoRA layers by their dotted names, none of them broken.

    Raises:
        BrokenGatesError: if LoRA holds NaN or infinity.
    """
    layers = lora_layers(model)
    broken = [name for name, layer in layers if not all(torch.isfinite(p).all() for p in _own_parameters(layer))]
    if broken:
        raise BrokenGatesError(f"NaNs detected in the LoRA of {broken}. The adapter {list(adapter_names)} is broken")
    return layers


def merge_lora(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """
    Add LoRA to the weights and take it off. New tensors take the place of the weights; the old ones stay as they are.

    Raises:
        BrokenGatesError: if LoRA holds NaN or infinity; nothing has been changed then.
    """
    for _, layer in sound_lora_layers(model, adapter_names):
        layer.merge(safe_merge=True, adapter_names=list(adapter_names))
    _remove(model)


def _own_parameters(layer: nn.Module) -> Iterator[torch.Tensor]:
    return (p for name, p in layer.named_parameters() if not name.startswith("base_layer."))


def _remove(model: nn.Module) -> None:
    for name, layer in lora_layers(model):
        model.set_submodule(name, layer.get_base_layer())
