"""Passes of a model in which more and more layers are dropped, each from the first layer on that computes anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

HOOKS = {
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
}  # fmt: skip
"""Where a module holds those on its forward pass."""


class Passed(nn.Module):
    """
    In place of a layer, with its attributes.

    Args:
        layer: the layer.
        output: what it would give; the hidden states that it is given, if left out.
    """

    def __init__(self, layer: nn.Module, output: Any = None) -> None:
        super().__init__()
        self.layer = layer
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output."""
        if self._output is not None:
            return self._output
        return args[0] if args else kwargs["hidden_states"]


class Prefix:
    """
    What the first layers of a model give on some batches, as far as passes before have found it.

    Nothing is kept of layers that are given something to write into, as are those that share keys and values, or that
    are called several times in a pass.

    Args:
        layers: of the model, in the order in which it calls them; no other passes meanwhile.
        dropped: those that give what they are given.
        room: bytes that are kept.
    """

    def __init__(self, layers: nn.ModuleList, dropped: Collection[int], room: int) -> None:
        self._layers, self._dropped, self._room = layers, set(dropped), room
        self._known: dict[int, list[Any]] = {}

    def drop(self, layer: int) -> None:
        """From now on a further layer gives what it is given, in every pass."""
        self._dropped.add(layer)
        for known in self._known.values():
            self._room += sum(map(_bytes, known[layer:]))
            del known[layer:]

    @contextmanager
    def passing(self, number: int, layer: int) -> Iterator[None]:
        """
        A pass of the model in which one more layer is dropped. Those before it are called as far as what they give is
        not known.

        Args:
            number: of the batch.
            layer: the one that is dropped in this pass.
        """
        known, real = self._known.setdefault(number, []), list(self._layers)
        start, found, calls = len(known), dict[int, Any](), dict.fromkeys(range(layer), 0)

        def keep(index: int, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
            calls[index] += 1
            if all(map(_is_plain, (*args, *kwargs.values(), output))):
                found[index] = output

        with ExitStack() as hooks:
            for index in range(start, layer):
                hook = real[index].register_forward_hook(
                    lambda _module, args, kwargs, output, index=index: keep(index, args, kwargs, output),
                    with_kwargs=True,
                )
                hooks.callback(hook.remove)
            try:
                for index in range(min(start, layer)):
                    self._layers[index] = _instead(real[index], known[index])
                # What else a layer gives beside hidden states, or writes where others read it, cannot be passed on.
                for index in {*self._dropped, layer} if known and isinstance(known[0], torch.Tensor) else ():
                    self._layers[index] = _instead(real[index])
                yield
            finally:
                for index, each in enumerate(real):
                    self._layers[index] = each
        for index in range(start, layer):
            size = _bytes(found.get(index))
            if calls[index] != 1 or index not in found or size > self._room:
                break
            self._room -= size
            known.append(found[index])


def _instead(layer: nn.Module, output: Any = None) -> Passed:
    """`Passed`, with the hooks that are on the layer: some models gather by them what their layers give."""
    passed = Passed(layer, output)
    vars(passed).update({name: hooks for name, hooks in vars(layer).items() if name in HOOKS})
    return passed


def _is_plain(value: Any) -> bool:
    """Whether nothing can be written into a value, but for the entries of a tensor."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
