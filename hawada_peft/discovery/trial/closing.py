"""Units closed in a copy of our own for a moment: weights at zero, logits at -infinity, norms of what stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .builds import Dim

NEVER = -1e30
"""Added to a score, it is never among the highest."""


@dataclass
class Closed:
    """
    What is closed.

    Args:
        zero: rows of weights that are 0, by parameter and dimension.
        logits: rows of a router, by its weight's name, that give -infinity.
        vectors: entries, by the vector's name, that are `NEVER`.
        norms: features that stay, by the norm's name: its statistics are theirs alone.
        linear: names of norms that only scale: no feature depends on another one.
        skipped: names of layers that give back what goes in.
    """

    zero: list[tuple[Dim, Sequence[int]]] = field(default_factory=list)
    logits: dict[str, Sequence[int]] = field(default_factory=dict)
    vectors: dict[str, Sequence[int]] = field(default_factory=dict)
    norms: dict[str, Sequence[int]] = field(default_factory=dict)
    linear: Collection[str] = ()
    skipped: Collection[str] = ()


@contextmanager
def closed_units(model: nn.Module, closed: Closed) -> Iterator[None]:
    """A model with units closed inside the block."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers())
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(name: str, dim: int, rows: Sequence[int], value: float) -> None:
        parameter = parameters[name]
        before.append((parameter, parameter.data))
        data = parameter.data.clone()
        parameter.data = data.index_fill_(dim, torch.tensor(rows, dtype=torch.long), value)

    with ExitStack() as stack:
        try:
            for (name, dim), rows in closed.zero:
                fill(name, dim, rows, 0.0)
            for name, rows in closed.vectors.items():
                fill(name, 0, rows, NEVER)
            for name in closed.linear:
                stack.enter_context(hooked(model.get_submodule(name), _only_scale))
            for name, kept in closed.norms.items():
                stack.enter_context(hooked(model.get_submodule(name), _norm_over(kept)))
            for name in closed.skipped:
                stack.enter_context(hooked(model.get_submodule(name), _skip))
            if closed.logits:
                weights = {id(parameters[name]): rows for name, rows in closed.logits.items()}
                stack.enter_context(_Routers(weights))
            yield
        finally:
            for parameter, data in reversed(before):
                parameter.data = data


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(module: nn.Module, hook: Hook) -> Iterator[None]:
    """A module whose output a function of module, arguments and output replaces, inside the block."""
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_of(output: Any) -> Any:
    """The tensor of a module's output that goes on."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, value: Any) -> Any:
    """A module's output with another tensor going on."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def stream_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What goes into a layer."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    stream = stream_of(args, kwargs)
    if first_of(output).shape != stream.shape:
        raise ValueError("what comes out of the layer has another shape than what goes in")
    return with_first(output, stream)


def _only_scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
    scaled: torch.Tensor = args[0] * module.weight
    bias = getattr(module, "bias", None)
    return scaled if bias is None else scaled + bias


def _norm_over(kept: Sequence[int]) -> Hook:
    index = torch.as_tensor(kept)

    def norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        few = args[0].index_select(-1, index)
        some = {name: parameter[index] for name, parameter in module.named_parameters()}
        if isinstance(module, nn.LayerNorm):
            normed = nn.functional.layer_norm(few, (len(kept),), some.get("weight"), some.get("bias"), module.eps)
        else:
            normed = _called_bare(module, some, few)
        return torch.zeros_like(args[0]).index_copy(-1, index, normed)

    return norm


def _called_bare(module: nn.Module, parameters: dict[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """A module of other parameters, without the hook that asks for it."""
    hooks = module._forward_hooks
    module._forward_hooks = type(hooks)()
    try:
        made: torch.Tensor = torch.func.functional_call(module, parameters, (value,))
        return made
    finally:
        module._forward_hooks = hooks


class _Routers(TorchFunctionMode):
    """Gives -infinity out of some rows of linear maps, which are known by their weights."""

    def __init__(self, rows: Mapping[int, Sequence[int]]) -> None:
        self.rows = rows
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            rows = self.rows.get(id(weight))
            if rows is not None:
                closed = torch.zeros(output.shape[-1], dtype=torch.bool)
                closed[list(rows)] = True
                output = output.masked_fill(closed, float("-inf"))
        return output
