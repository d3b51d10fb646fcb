"""What a model's class computes and no file holds: rotary frequencies, index tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from ..errors import UnsupportedModelError


def compute_buffers(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """
    Give a model on the meta device what its state dict does not hold, as `from_pretrained` does.

    Args:
        model: its parameters and what its state dict holds are left as they are.
        device: where to.

    Raises:
        UnsupportedModelError: if its class does not compute some of it.
    """
    for name, module, owner in owners(model):
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        missing = [key for key in unsaved(module) if key not in saved]
        for key in missing:
            mine = getattr(module, key)
            filled = sentinel(mine, device) if has_sentinel(mine) else torch.zeros_like(mine, device=device)
            setattr(module, key, filled)
        if missing:
            initialise(owner, module)
        for key in missing:
            mine = getattr(module, key)
            if has_sentinel(mine) and mine.numel() and torch.equal(mine, sentinel(mine, device)):
                raise UnsupportedModelError(
                    f"{f'{name}.' if name else ''}{key} of {type(model).__name__} is in no file, and its class does "
                    "not compute it by itself: load the model, and slim it in memory"
                )


def unsaved(module: nn.Module) -> list[str]:
    """The names of a module's own tensors on the meta device that are no parameters."""
    own = [*module._buffers.items(), *vars(module).items()]
    return [key for key, tensor in own if isinstance(tensor, torch.Tensor) and tensor.is_meta]


def owners(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Every module with its name and the model, of those nested in each other, whose class initialises it."""
    models = {"": model}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            models[name] = module
        parts = name.split(".") if name else []
        inner = max((".".join(parts[:n]) for n in range(len(parts) + 1) if ".".join(parts[:n]) in models), key=len)
        yield name, module, models[inner]


def initialise(owner: PreTrainedModel, module: nn.Module) -> None:
    """Have a class compute a module's buffers; parameters are left as they are, also those of modules inside it."""
    own: list[torch.Tensor] = list(module.parameters())
    for inner in module.modules():
        kept = inner._buffers.keys() - inner._non_persistent_buffers_set
        own += [buffer for name, buffer in inner._buffers.items() if buffer is not None and name in kept]
    for tensor in own:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark of what is loaded
    try:
        with torch.no_grad(), guard_torch_init_functions():
            owner._init_weights(module)
    finally:
        for tensor in own:
            del tensor._is_hf_initialized  # type: ignore[attr-defined]


def has_sentinel(like: torch.Tensor) -> bool:
    """Whether there are values of a tensor's dtype that no class computes."""
    return like.dtype is not torch.bool and not like.is_complex()


def sentinel(like: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """What no class computes, so that it shows what was left alone."""
    value = torch.finfo(like.dtype).min if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full_like(like, value, device=device)
