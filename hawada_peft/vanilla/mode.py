"""How a model is while it is asked and not trained; all of it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from peft import PeftModel
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


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
def dropout_off(model: nn.Module) -> Iterator[None]:
    """
    No dropout, and no layers or paths dropped at random, inside the block, in training mode too: every rate with
    "drop" in its name that a module or its config holds is 0.
    """
    configs = {id(module.config): module.config for module in model.modules() if "config" in vars(module)}
    before = [
        (each, name, value)
        for each in (*model.modules(), *configs.values())
        for name, value in vars(each).items()
        if isinstance(value, float) and ("drop" in name or (isinstance(each, _DropoutNd) and name == "p"))
    ]
    try:
        for each, name, _ in before:
            setattr(each, name, 0.0)
        yield
    finally:
        for each, name, value in before:
            setattr(each, name, value)


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
