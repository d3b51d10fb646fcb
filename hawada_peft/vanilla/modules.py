"""The kinds of modules that gates go on: their sizes, their feature axis, and factors folded into their weights."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError

Base = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D
"""A module that gates go on."""


def channels_dim(module: nn.Module) -> int | None:
    """
    Of experts that are stacked in raw weights, the dimension of `down_proj` that holds channels; None for other
    modules. Classes state whether they store it transposed.
    """
    down, up = (module._parameters.get(name) for name in ("down_proj", "gate_up_proj"))
    if down is None or up is None or down.ndim != 3 or up.ndim != 3:
        return None
    return next((dim for dim in (1, 2) if 2 * down.shape[dim] == up.shape[3 - dim]), None)


def feature_sizes(module: nn.Module) -> tuple[int, int]:
    """
    The input and output features (channels) of a module that gates can be placed on.

    Raises:
        UnsupportedModelError: for any other kind of module.
    """
    if isinstance(module, (nn.Linear, BaseTunerLayer)):
        return cast(int, module.in_features), cast(int, module.out_features)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if (dim := channels_dim(module)) is not None:
        down = module.get_parameter("down_proj")
        return down.shape[dim], down.shape[3 - dim]
    raise UnsupportedModelError(
        f"Target module of type {type(module).__name__} is not supported. Gates go on torch.nn.Linear, Conv1d, "
        "Conv2d, Conv3d, transformers.pytorch_utils.Conv1D and stacked experts: leave the module out of "
        "`target_modules`."
    )


def norm_offset(module: nn.Module) -> float | None:
    """
    Of a norm whose output is proportional to `offset + weight`, the offset: 0 for most, 1 for Gemma's; None for
    modules that are no such norms. Told by what they compute.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or [*module.children()] or gateable(module):
        return None
    if not module._parameters.keys() <= {"weight", "bias"}:
        return None
    size = len(weight)
    x = torch.linspace(-1.0, 2.0, 2 * size, device="cpu").reshape(2, size)
    outputs = []
    for value in (0.0, 1.0):
        tensors = {"weight": torch.full((size,), value, device="cpu")}
        if module._parameters.get("bias") is not None:
            tensors["bias"] = torch.zeros(size, device="cpu")
        try:
            outputs.append(functional_call(module, tensors, (x,)))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return None  # it takes something else than features
    zero, one = outputs
    if not isinstance(zero, torch.Tensor) or zero.shape != x.shape or not (one - zero).any():
        return None
    offset = round(float((zero / (one - zero)).nanmean()), 3)
    return offset if torch.allclose(zero, offset * (one - zero), atol=1e-5) else None


def output_sizes(module: nn.Module) -> tuple[int, int]:
    """
    The input and output features of a module whose output can be scaled by its weights: also of a norm.

    Raises:
        UnsupportedModelError: for any other kind of module.
    """
    if isinstance(module, BaseTunerLayer) or norm_offset(module) is None:
        return feature_sizes(module)
    return (len(cast(nn.Parameter, module.weight)),) * 2


def gateable(module: nn.Module) -> bool:
    """Whether gates can be placed on this kind of module."""
    try:
        feature_sizes(module)
    except UnsupportedModelError:
        return False
    return True


def feature_dim(module: nn.Module) -> int:
    """The axis of the module's input and output that holds features, counted from the end."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return -len(module.kernel_size) - 1
    return -1


def scales_through(module: nn.Module) -> bool:
    """Whether scaling all inputs by a number scales the output by it: a linear map without a bias."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.bias is None


PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that numbers can be multiplied into and that mean what they hold."""


def quantized_weight(module: nn.Module) -> str | None:
    """
    The first weight that does not hold plain numbers, and how it holds them; None if all do.

    Packed integers (bitsandbytes), scaled floats of 8 bits, tensors of an own class (torchao, quanto).
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype not in PLAIN:
            return f"{name!r} is quantized ({parameter.dtype})"
        if type(parameter.data) is not torch.Tensor:
            return f"{name!r} is held in a tensor of its own kind ({type(parameter.data).__name__})"
    return None


def check_no_adapters(model: nn.Module, caller: str) -> None:
    """
    Check that a model is a vanilla one.

    Raises:
        UnsupportedModelError: naming who wants it, if there are adapters in it.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            f"{caller}() takes a vanilla model, and this one has adapters in it: `unload()` first"
        )


def check_unquantized(module: nn.Module) -> None:
    """
    Refuse weights that do not hold plain numbers: they can be neither folded into nor sliced.

    Raises:
        UnsupportedModelError: naming the first one, and the two ways out.
    """
    found = quantized_weight(module)
    if found is not None:
        raise UnsupportedModelError(
            f"{found}: gates cannot be folded into it, and it cannot be sliced. "
            "Either load the unquantized base model and the saved adapter on it, "
            "`PeftModel.from_pretrained(base, folder)`, and merge there; or turn the weights back first, with "
            "`model.dequantize()` of transformers."
        )


def check_own_weights(module: nn.Module) -> None:
    """
    Refuse a module whose weight or bias is computed from others (pruning masks, weight norm, parametrizations).

    Raises:
        UnsupportedModelError: naming the parameters that it has instead.
    """
    if channels_dim(module) is not None:
        return
    other = [name for name in module._parameters if name not in ("weight", "bias")]
    if "weight" not in module._parameters or "parametrizations" in module._modules:
        raise UnsupportedModelError(
            f"{type(module).__name__}: its weight is computed from {other or 'other tensors'}, so nothing can be "
            "folded into it: fix it into the weight first, with `torch.nn.utils.parametrize.remove_parametrizations`, "
            "`prune.remove` or `remove_weight_norm`"
        )


def check_loaded(module: nn.Module) -> None:
    """
    Refuse a model of which accelerate keeps weights elsewhere (on the disk, in other memory) until they are used.

    Raises:
        UnsupportedModelError: naming the first one, and the two ways out.
    """
    for name, child in module.named_modules():
        if "_hf_hook" not in vars(child):
            continue
        for parameter_name, parameter in child.named_parameters():
            if parameter.is_meta:
                raise UnsupportedModelError(
                    f"'{name + '.' if name else ''}{parameter_name}' is offloaded: its values are not in the model. "
                    "Load the model with `device_map='cpu'`, or slim it from its files with `slim_checkpoint` "
                    "(`hawada slim`)"
                )


def parameters_of(base: Base) -> list[nn.Parameter]:
    """The weight, and the bias if there is one; of stacked experts those of their last projection."""
    names = ("weight", "bias") if channels_dim(base) is None else ("down_proj", "down_proj_bias")
    found = (getattr(base, name, None) for name in names)
    return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]


def scaled_norm_weight(weight: torch.Tensor, factor: torch.Tensor, offset: float) -> torch.Tensor:
    """
    The weight with which a norm of an offset (`norm_offset`) gives `factor` times as much: `w + o` becomes
    `factor * (w + o)`. Exactly the weight at a factor of 1.
    """
    return weight * factor + offset * (factor - 1)


def fold_factors(base: Base, inputs: torch.Tensor | None, output: torch.Tensor | None) -> list[torch.Tensor]:
    """
    The module's weight (and bias, if it has one) with factors of its inputs and of its output multiplied in.

    Args:
        base: the module, or a norm (`norm_offset`); left as it is.
        inputs: (in_features,), or None.
        output: (1,), or None; (features,) for a norm.

    Returns:
        The new weight and bias, contiguous, in the dtypes they had.
    """
    parameters, channels = parameters_of(base), channels_dim(base)
    weight, base_bias = parameters[0].data, parameters[1] if len(parameters) > 1 else None
    factor = inputs if output is None else output if inputs is None else inputs * output
    if factor is None:
        factor = torch.ones(1)
    factor = factor.to(weight.device)
    if factor.numel() > 1 and channels is not None:
        factor = factor[:, None] if channels == 1 else factor
    elif factor.numel() > 1 and isinstance(base, Conv1D):
        factor = factor[:, None]  # (in, out)
    elif factor.numel() > 1 and isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        per_group = factor.reshape(base.groups, 1, -1).expand(-1, base.out_channels // base.groups, -1)
        factor = per_group.reshape(weight.shape[:2] + (1,) * (weight.ndim - 2))  # (out, in / groups, 1, ...)
    offset = (norm_offset(base) or 0.0) if output is not None and weight.ndim == 1 else 0.0
    folded = weight * factor if offset == 0 else scaled_norm_weight(weight, factor, offset)
    result = [folded.to(weight.dtype).contiguous()]
    if base_bias is not None:
        bias = base_bias.data
        result.append(bias if output is None else (bias * output.to(bias.device)).to(bias.dtype))
    return result
