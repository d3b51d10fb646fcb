"""A model without weights whose layers get theirs when they are called, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..vanilla.buffers import compute_buffers
from ..vanilla.family import Layout
from .layerwise import Keep, in_memory


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a model: the module, the name there, what stands there without weights."""

    owner: nn.Module
    key: str
    empty: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Have another tensor there: a parameter where there was one."""
        setattr(self.owner, self.key, tensor)

    @property
    def tensor(self) -> torch.Tensor:
        """What is there."""
        found: torch.Tensor = getattr(self.owner, self.key)
        return found.data


class OnDemand:
    """
    The weights of a model on the meta device, read when they are needed and let go afterwards.

    A layer of the stack has its weights from when it is called until another one is. What lies outside of the stack
    has its weights within `outside()`. Weights that were changed in between are kept, and are there again the next
    time.

    Args:
        model: on the meta device; in evaluation mode from now on, and for no other use until the context is left.
        layout: where its stack is.
        read: gives a weight by its name, whole.
        keep: where changed weights are kept.
        device: where weights come to.

    Used as a context, it leaves the model as it was, but for what no file holds.

    Attributes:
        changed (`dict[str, Tensor]`): the changed weights, by name.
        most (`int`): the bytes of weights that there were at once, at most.

    Raises:
        UnsupportedModelError: as `compute_buffers`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        read: Callable[[str], torch.Tensor],
        *,
        keep: Keep = in_memory,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.layout, self.device = model.eval(), layout, torch.device(device)
        self.changed: dict[str, torch.Tensor] = {}
        self.most = 0
        self._read, self._keep = read, keep
        self._here: dict[str, dict[str, tuple[_Place, int]]] = {}
        compute_buffers(model, device)
        self._hooks = []
        self._layers = [f"{layout.stack}.{index}" for index in range(len(model.get_submodule(layout.stack)))]  # type: ignore[arg-type]
        for name in self._layers:
            layer = model.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda _module, _args, name=name: self._lend(name))
            self._hooks.append(hook)

    def __enter__(self) -> OnDemand:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.release()
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """While what lies outside of the stack has its weights. Layers can be called as well."""
        self._load("")
        try:
            yield
        finally:
            self._release("")

    def layer(self, index: int) -> nn.Module:
        """A layer with its weights, until another one is called or asked for."""
        self._lend(self._layers[index])
        return self.model.get_submodule(self._layers[index])

    def release(self) -> None:
        """Let go of the layer that has its weights."""
        for name in [name for name in self._here if name]:
            self._release(name)

    def _lend(self, name: str) -> None:
        if name not in self._here:
            self.release()
            self._load(name)

    def _load(self, part: str) -> None:
        """Give a layer its weights, or all that is in no layer."""
        lent = self._here[part] = {}
        loaded: dict[int, torch.Tensor] = {}  # what is tied stays one tensor
        for name, place in self._places(part):
            empty = place.empty
            if id(empty) not in loaded:
                tensor = self.changed[name] if name in self.changed else self._read(name).reshape(empty.shape)
                tensor = tensor.to(self.device)
                given = nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor
                loaded[id(empty)] = given
            place.put(loaded[id(empty)])
            lent[name] = place, place.tensor.data_ptr()
        here = {
            place.tensor.data_ptr(): place.tensor.nbytes for each in self._here.values() for place, _ in each.values()
        }
        self.most = max(self.most, sum(here.values()))

    def _release(self, part: str) -> None:
        for name, (place, before) in self._here.pop(part).items():
            if place.tensor.data_ptr() != before:
                self.changed[name] = self._keep(place.tensor)
            place.put(place.empty)

    def _places(self, part: str) -> Iterator[tuple[str, _Place]]:
        """The parameters and saved buffers of a layer, or of all that is in no layer, by name."""
        inside = f"{self.layout.stack}."
        for path, module in self.model.named_modules():
            if not (path == part or path.startswith(f"{part}.")) if part else path.startswith(inside):
                continue
            saved = module._buffers.keys() - module._non_persistent_buffers_set
            own = {**module._parameters, **{key: module._buffers[key] for key in saved}}
            for key, tensor in own.items():
                if tensor is not None:
                    yield f"{path}.{key}" if path else key, _Place(module, key, tensor)
