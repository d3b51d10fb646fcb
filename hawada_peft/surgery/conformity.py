"""Whether a model's weights are those of its class: what a slim model of that class could not hold is found before."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..vanilla.family import Layout
from ..vanilla.legality import tensors_of
from ..vanilla.skeleton import build_empty

Shapes = dict[str, tuple[int, ...]]

PARAMETRIZED = (".parametrizations.", "_orig", "_mask", "weight_g", "weight_v")
"""In the name of a tensor: `torch.nn.utils.parametrize`, `prune`, `weight_norm`."""


def below(module: nn.Module) -> nn.Module:
    """The module that adapters wrap."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def vanilla_tensors(base: nn.Module) -> dict[str, torch.Tensor]:
    """
    Parameters and persistent buffers by the names that they have without the adapters in the model.

    Args:
        base: unmerged. Not copied.
    """
    return dict(_tensors(base, ""))


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    module = below(module)
    kept = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in [*module._parameters.items(), *kept.items()]:
        if tensor is not None:
            yield f"{prefix}{name}", tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def check_conforms(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Compare the names and shapes of a model's tensors with what its class builds from its config.

    Args:
        layout: the model's, with its class and config.
        tensors: of `vanilla_tensors`.

    Raises:
        UnsupportedModelError: naming the tensors that differ, and the config field, the parametrization or the
            replaced module that is at fault.
    """
    expected = tensors_of(layout)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found == expected:
        return
    other = [name for name in found if name in expected and found[name] != expected[name]]
    surplus, missing = [name for name in found if name not in expected], [n for n in expected if n not in found]
    problems = [f"{name} is {found[name]} instead of {expected[name]}" for name in other]
    problems += [f"{name} {found[name]} is not known to the class" for name in surplus]
    problems += [f"{name} {expected[name]} is missing" for name in missing]
    told = "; ".join(problems[:5]) + ("; ..." if problems[5:] else "")
    raise UnsupportedModelError(
        f"the weights are not those that {layout.model_class.__name__} builds from this config, so no slim model of "
        f"that class can hold them: {told}. {_advice(layout, found, expected, other, surplus)}"
    )


def _advice(layout: Layout, found: Shapes, expected: Shapes, other: list[str], surplus: list[str]) -> str:
    if any(mark in name for name in surplus for mark in PARAMETRIZED):
        return (
            "They are parametrized or masked: fix that into the weights first, with "
            "`torch.nn.utils.parametrize.remove_parametrizations`, `prune.remove` or `remove_weight_norm`."
        )
    if other and not surplus:
        field = _field_at_fault(layout, found, expected, other)
        if field is not None:
            return f"Say so in the config before the gates are added: `model.config.{field[0]} = {field[1]}`."
    return "Put back the modules of the class that were replaced or added, or make the config agree with them."


def _field_at_fault(layout: Layout, found: Shapes, expected: Shapes, other: list[str]) -> tuple[str, int] | None:
    """The one config field, and its value, with which the class builds the shapes that were found."""
    pairs = {
        (old, new)
        for name in other
        for old, new in zip(expected[name], found[name], strict=False)
        if old != new and len(expected[name]) == len(found[name])
    }
    numbers = {"num_labels": layout.config.num_labels} | layout.config.to_dict()
    for old, new in sorted(pairs):
        for field in [name for name, value in numbers.items() if type(value) is int and value == old]:
            config = copy.deepcopy(layout.config)
            try:
                setattr(config, field, new)
                if _shapes(layout.model_class, config) == found:
                    return field, new
            except (StrictDataclassError, ValueError, TypeError, RuntimeError):
                continue  # the class refuses this value: another field it is
    return None


def _shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in build_empty(model_class, config).state_dict().items()}
