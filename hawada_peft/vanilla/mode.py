"""How a model is while it is asked and not trained; all of it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from peft import PeftModel
from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has its own mode again."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """
    A PEFT model's base inside the block; any other model as it is.

    What requires gradients is put back: PEFT switches that on for all parameters of the active adapters, those that
    were loaded for inference or frozen on purpose too.

    Args:
        model: also compiled, or wrapped for data-parallel training.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, PeftModel):
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
