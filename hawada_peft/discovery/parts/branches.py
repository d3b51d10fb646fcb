"""Where a soft gate on a layer is linear: on what its branches add to the residual stream."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ...vanilla.modules import gateable, norm_offset
from ..trial.builds import REFUSES, cause
from ..trial.closing import first_of, hooked, stream_of, with_first
from ..trial.specimen import Specimen

logger = logging.getLogger(__name__)

MOST = 3
"""Branches of a layer, at most."""

SAME, LINEAR = 1e-6, 1e-5
"""Differences, of the stream's largest value, below which a layer gives back its input, and is linear in a gate."""


def find_branches(specimen: Specimen, layer: str) -> tuple[str, ...]:
    """
    The modules of a layer whose outputs a gate multiplies.

    The layer is called alone. Looked for is the smallest set of its modules that make it the identity when they give
    0, and of these the one executed last that answers to a factor of 1/2 with half of what it adds.

    Args:
        specimen: the model.
        layer: the dotted name of the layer.

    Returns:
        Names relative to the layer; empty if there are none, as where a norm follows the addition, or where a layer
        gives another shape than it takes.
    """
    module = specimen.model.get_submodule(layer)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with hooked(module, lambda _, args, kwargs, output: calls.append((args, kwargs))):
        specimen.run()
    if not calls:
        return ()
    args, kwargs = calls[0]
    # A cache would grow with every call.
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: value for name, value in kwargs.items() if not (isinstance(value, Cache) or "cache" in name)}
    try:
        stream = stream_of(args, kwargs)
        return linear_branches(module, stream, lambda: first_of(_call(module, args, kwargs)))
    except REFUSES as error:
        logger.warning("a gate on %s blends it, as it does not run when it is called alone: %s", layer, cause(error))
        return ()


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


def linear_branches(
    module: nn.Module, stream: torch.Tensor, call: Callable[[], torch.Tensor], *, gated: bool = False
) -> tuple[str, ...]:
    """
    As `find_branches`, of a layer that can be called.

    Args:
        module: the layer.
        stream: its input: (rows, positions, features).
        call: gives its output.
        gated: only modules that a gate can sit on.

    Returns:
        Names relative to the layer, the one executed last first; empty if there are none.
    """
    if call().shape != stream.shape:
        return ()
    order = _executed(module, stream, call)
    scale = float(stream.abs().max())
    within = {name: module.get_submodule(name) for name in order}
    # Where a gate can sit, then what has weights of its own, then what holds some.
    good = [name for name in order if gateable(within[name]) or norm_offset(within[name]) is not None]
    own = [name for name in order if list(within[name].parameters(recurse=False))]
    some = [name for name in order if list(within[name].parameters())]
    silencing: list[tuple[str, ...]] = []
    for pool in (good,) if gated else (good, own, some):
        for count in range(1, MOST + 1):
            found = []
            for names in itertools.combinations(pool, count):
                if any(set(known) <= set(names) for known in silencing):
                    continue
                if float((_scaled(module, names, 0.0, call) - stream).abs().max()) < SAME * scale:
                    found.append(names)
            silencing += found
            for names in found:
                if all(_is_linear(module, name, names, stream, call) for name in names):
                    return names
    return ()


def _executed(module: nn.Module, stream: torch.Tensor, call: Callable[[], torch.Tensor]) -> list[str]:
    """Modules that give something of the stream's shape, the one executed last first."""
    order: list[str] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first_of(output)
            like = isinstance(value, torch.Tensor) and value.numel() == stream.numel()
            if like and value.shape[-1] == stream.shape[-1]:
                order.append(name)

        return hook

    with ExitStack() as stack:
        for name, inner in module.named_modules():
            if name:
                stack.enter_context(hooked(inner, note(name)))
        call()
    return list(dict.fromkeys(order))[::-1]


def _scaled(module: nn.Module, names: Sequence[str], factor: float, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The layer's output with the outputs of some modules multiplied."""
    with ExitStack() as stack:
        for name in names:
            inner = module.get_submodule(name)
            stack.enter_context(hooked(inner, lambda _, a, k, output: with_first(output, first_of(output) * factor)))
        return call()


def _is_linear(
    module: nn.Module, name: str, names: Sequence[str], stream: torch.Tensor, call: Callable[[], torch.Tensor]
) -> bool:
    """Whether, the other modules silent, a factor of 1/2 on one adds half of what it adds."""
    others = [each for each in names if each != name]
    whole = _scaled(module, others, 0.0, call)
    halved = _scaled(module, others, 0.0, lambda: _scaled(module, [name], 0.5, call))
    return float((halved - (stream + whole) / 2).abs().max()) <= LINEAR * float(stream.abs().max())
