"""The dense model beside the slim one: as the teacher of what is fitted or trained after the cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import ModulesToSaveWrapper
from torch import nn


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
