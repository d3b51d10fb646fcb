"""The dense model beside the slim one: as the teacher of what is fitted or trained after the cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..planning.plan import Plan
from ..vanilla.family import locate
from .source import materialise


@contextmanager
def dense_afterwards(base: nn.Module) -> Iterator[None]:
    """
    Inside the block adapters are merged into a base model and taken off; after it the model is the dense one again.

    Nothing is copied: merging puts new tensors in the place of the weights, and the old ones are put back. The new
    ones are let go of, so build what is to have them inside the block.

    Args:
        base: the base model, unmerged when the block begins.
    """
    weights = [(parameter, parameter.data) for parameter in base.parameters()]
    heads = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    try:
        yield
    finally:
        for parameter, tensor in weights:
            parameter.data = tensor
    for name, head in heads.items():  # the trained copies are in their place
        base.set_submodule(name, head)


def dense_view(base: PreTrainedModel) -> PreTrainedModel:
    """
    The vanilla model around which adapters were put: a model of the same class with the same tensors, in eval mode.

    Nothing is copied and the base model stays as it is. What adapters add is not in the view.

    Args:
        base: with adapters in it, unmerged, its weights not quantized.
    """
    with torch.device("meta"):
        view = type(base)(base.config)
    view.load_state_dict({name: _below(base, name) for name in view.state_dict()}, strict=True, assign=True)
    layout = locate(base)
    materialise(base, view, layout, Plan.keep_all(layout.dense))
    view.tie_weights()
    return view.eval()


def _below(base: nn.Module, name: str) -> torch.Tensor:
    """A tensor by its vanilla name, from below the adapters that wrap its module."""
    owner, _, attribute = name.rpartition(".")
    module = base
    for part in owner.split("."):
        module = module.get_submodule(part)
        while isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    tensor = getattr(module, attribute)
    return tensor.data if isinstance(tensor, nn.Parameter) else tensor
