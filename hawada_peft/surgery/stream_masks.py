"""Masks on the residual stream where it is read past its norms: a pooled vector, and what a head makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..gates.adapter import scaled
from ..gates.hidden import HiddenAdapter
from ..vanilla.family import Layout, hidden_home
from ..vanilla.modules import feature_dim

WRAPPED = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)(?=\.|$)")
"""What PEFT puts into the names of modules that are trained with an adapter."""


class StreamMask:
    """
    A hook before a module that reads the residual stream: channels that a plan removes are 0 there.

    Without a plan it does nothing, and it holds no values: gates sit on the norms. It is no adapter, so that the
    module may be trained beside the gates (`modules_to_save`), which copies it with its hooks.

    Args:
        home (`HiddenAdapter`): the adapter that holds the gate on the stream, or shares it.
    """

    def __init__(self, home: HiddenAdapter) -> None:
        self.home = home

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamMask:
        # Of a module alone: the gate stays the model's. Of the whole model: its norms were copied before its heads.
        return StreamMask(memo.get(id(self.home), self.home))

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The module's inputs, masked; None leaves them."""
        factor = self.home.stays() if args else None
        if factor is None:
            return None
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return (scaled(args[0], factor.to(args[0].device), feature_dim(cast(Any, inner))), *args[1:])


def mask_readers(model: nn.Module, layout: Layout) -> None:
    """Put masks on the modules outside of the layers that read the stream, where there are none yet."""
    if not layout.norms or not layout.family.stream_readers:
        return
    home = model.get_submodule(hidden_home(layout))
    if not isinstance(home, HiddenAdapter):
        return
    for module in _readers(model, layout):
        if not any(isinstance(hook, StreamMask) for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(StreamMask(home))


def _readers(model: nn.Module, layout: Layout) -> Iterator[nn.Module]:
    wanted = {*layout.family.stream_readers}
    for name, module in model.named_modules():
        if WRAPPED.sub("", name) in wanted and not isinstance(module, AuxiliaryTrainingWrapper):
            yield module


def unmask(model: nn.Module) -> None:
    """Take the masks off again."""
    for module in model.modules():
        hooks: Mapping[int, Any] = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, StreamMask)]:
            del module._forward_pre_hooks[key]
