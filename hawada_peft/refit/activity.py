"""What the parts of a dense model do to its residual stream, by one walk through the layers; no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..vanilla.batches import Batch, position_mask
from .layerwise import Stream
from .projections import Projection


@dataclass(frozen=True)
class Activity:
    """
    What layers, heads and channels do on calibration batches. Padding does not count.

    Args:
        influence (`tuple[float, ...]`): per layer 1 minus the cosine between the stream before and after it, the mean
            over positions, of which batches count alike.
        stream (`tuple[float, ...]`): per layer the energy of the stream behind it, the sum of squares.
        heads (`tuple[Tensor, ...]`): per layer (query heads,), float64, on the CPU: the energy that each adds to the
            stream, its activations' squares times the squared norm of the columns that read them. Empty in layers
            whose attention's output projection is not known, or no linear map.
        channels (`tuple[Tensor, ...]`): the same of FFN channels, (intermediate size,).

    References:
        Men et al., "ShortGPT" (2024), for the influence; An et al., "Fluctuation-based Adaptive Structured Pruning"
        (2024), where Wanda-sp is the energy.
    """

    influence: tuple[float, ...]
    stream: tuple[float, ...]
    heads: tuple[torch.Tensor, ...]
    channels: tuple[torch.Tensor, ...]


def activity_of(stream: Stream, batches: Sequence[Batch]) -> Activity:
    """
    Walk a stream from before the first layer to behind the last one.

    Args:
        stream: at its start.
        batches: those that it is of.
    """
    layout = stream.layout
    influence, energy, heads, channels = [], [], [], []
    for layer in range(len(stream.layers)):
        apart = total = 0.0
        ends = [name for name in (layout.attention_out(layer), layout.ffn_out(layer)) if _is_linear(stream, name)]
        squares = {name: torch.zeros(0) for name in ends}
        for number, batch in enumerate(batches):
            before = stream.hidden[number]
            after, inputs = _seen(stream, layer, number, ends)
            mask = position_mask(batch, before.shape[:-1])
            rows = slice(None) if mask is None else mask.flatten()
            left, right = before.flatten(0, -2)[rows].float(), after.flatten(0, -2)[rows].float()
            apart += float((1 - functional.cosine_similarity(left, right, dim=-1)).mean())
            total += float(right.square().sum(dtype=torch.float64))
            for name, values in inputs.items():
                found = values.flatten(0, -2)[rows].float().square().sum(0, dtype=torch.float64).cpu()
                squares[name] = squares[name] + found if len(squares[name]) else found
            stream.hidden[number] = stream.keep(after)
        none = torch.zeros(0, dtype=torch.float64)
        energies = {name: squares[name] * column_norms(stream.model.get_submodule(name)) for name in ends}
        influence.append(apart / len(batches))
        energy.append(total)
        features = energies.get(layout.attention_out(layer), none)
        heads.append(features.reshape(len(features) // layout.head_dim, layout.head_dim).sum(1))
        channels.append(energies.get(layout.ffn_out(layer), none))
    return Activity(tuple(influence), tuple(energy), tuple(heads), tuple(channels))


def _is_linear(stream: Stream, name: str) -> bool:
    return bool(name) and isinstance(stream.model.get_submodule(name), Projection)


def column_norms(module: nn.Module) -> torch.Tensor:
    """The squared norm of what reads each input feature of a projection: (features,), float64, on the CPU."""
    squares = module.get_parameter("weight").detach().float().square()
    return squares.sum(1 if isinstance(module, Conv1D) else 0, dtype=torch.float64).cpu()


def _seen(
    stream: Stream, layer: int, number: int, names: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A layer's output, and what its projections got."""
    inputs: dict[str, torch.Tensor] = {}

    def see(name: str, args: tuple[Any, ...]) -> None:
        inputs[name] = args[0]

    with ExitStack() as hooks:
        for name in names:
            module = stream.model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _module, args, name=name: see(name, args))
            hooks.callback(hook.remove)
        return stream.call(layer, number), inputs
