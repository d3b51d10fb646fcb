"""The residual stream in other coordinates, folded into a model's weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..vanilla.family import Layout
from .parts import NORM, NORM_BIAS, READER, READER_BIAS, SCALE, Part

Lookup = Callable[[str], torch.Tensor]
"""A dense tensor, whole, by its name."""


@dataclass(frozen=True)
class Turn:
    """
    A change of the stream's coordinates `x -> x @ write`, and what it makes of every tensor of the dense model.

    With n what a norm makes of x before its weight w and bias b, a reader W sees `W (w n + b)`. In the new coordinates
    it is `(W diag(w) read) n' + W b`, and what is written to the stream is written `@ write`. The norms' weights
    become a factor each, their biases 0. With orthogonal `write = read` nothing else changes: an RMSNorm commutes with
    it, a LayerNorm if `write` takes the vectors that sum to zero to such vectors (Ashkboos et al., "SliceGPT", 2024).

    Args:
        layout: the dense model's row and sizes.
        parts: of its parameters, from `stream_map`.
        write: (features, new features).
        read: (features, new features).
        factors: (sites, new features): the norms' weights in the new model.
        tied: the embedding is the output projection as well, and stays so: its norm keeps its one weight.
    """

    layout: Layout
    parts: Mapping[str, Part]
    write: torch.Tensor
    read: torch.Tensor
    factors: torch.Tensor
    tied: bool = False
    in_heads = False
    """It is about the stream alone."""

    @property
    def size(self) -> int:
        """Features of the stream in the new model."""
        return self.write.shape[1]

    def tensor(self, name: str, lookup: Lookup) -> torch.Tensor:
        """
        A tensor of the new model.

        Args:
            name: its name in the dense model.
            lookup: gives dense tensors by name: this one, and what is folded into it.

        Returns:
            Of the dense tensor's dtype, on its device; the dense tensor itself if it has no part in the stream.
        """
        short, prefix = self._split(name)
        part, tensor = self.parts.get(short), lookup(name)
        if part is None:
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if part.kind == NORM:
            found = self.factors[self._site(name)].to(wide, copy=True)  # safetensors saves no view of a larger tensor
            if self.tied and self._site(name) == len(self.factors) - 1:
                found = found * wide.mean()
        elif part.kind == NORM_BIAS:
            found = wide.new_zeros(self.size)
        elif part.kind == SCALE:
            found = wide.new_ones(self.size)
        elif part.kind == READER:
            found = self._reader(wide, part, self._of_partner(part, "weight", prefix, lookup))
        elif part.kind == READER_BIAS:
            found = self._reader_bias(name, wide, part, prefix, lookup)
        else:
            if part.partner:
                scale = lookup(self._full(part.partner, prefix)).to(wide)
                wide = wide * scale.reshape([-1 if dim == part.dim else 1 for dim in range(wide.ndim)])
            found = _along(wide, part.dim, self.write)
        return found.to(tensor.dtype).contiguous()

    def restored(self, dense: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """
        The last hidden states of a model without a head in the dense model's coordinates, with its last norm's weight
        and bias, which are in no other weight: (..., new features) to (..., features).

        Args:
            dense: the dense model.
            hidden: the new model's last hidden states.
        """
        norm = self.layout.norms[-1]
        weight, bias = dense.get_parameter(f"{norm}.weight"), dense.get_submodule(norm)._parameters.get("bias")
        found = (hidden @ self.read.to(hidden).T) * weight.detach().to(hidden)
        return found if bias is None else found + bias.detach().to(hidden)

    def _reader(self, wide: torch.Tensor, part: Part, gain: torch.Tensor) -> torch.Tensor:
        if self.tied and part.partner == self._short(self.layout.norms[-1]):
            return _along(wide, part.dim, self.write)
        stretches = wide.chunk(part.stretches, part.dim)
        gain = gain.to(wide).reshape([-1 if dim == part.dim else 1 for dim in range(wide.ndim)])
        return torch.cat([_along(each * gain, part.dim, self.read) for each in stretches], part.dim)

    def _reader_bias(self, name: str, bias: torch.Tensor, part: Part, prefix: str, lookup: Lookup) -> torch.Tensor:
        norm_bias = self._of_partner(part, "bias", prefix, lookup)
        weight_name = f"{name.rpartition('.')[0]}.weight"
        reader = self.parts[self._split(weight_name)[0]]
        weight = lookup(weight_name).to(bias)
        weight = weight if reader.dim == 1 else weight.T
        return bias + sum(each @ norm_bias.to(bias) for each in weight.chunk(reader.stretches, 1))

    def _of_partner(self, part: Part, which: str, prefix: str, lookup: Lookup) -> torch.Tensor:
        return lookup(self._full(f"{part.partner}.{which}", prefix))

    def _site(self, name: str) -> int:
        return self.layout.norms.index(name.rpartition(".")[0])

    def _split(self, name: str) -> tuple[str, str]:
        """The name in the map, and what stands before names relative to its layer."""
        stack = f"{self.layout.stack}."
        if not name.startswith(stack):
            return f".{name}", ""
        index, _, short = name.removeprefix(stack).partition(".")
        return short, f"{stack}{index}."

    def _short(self, name: str) -> str:
        return self._split(name)[0]

    def _full(self, short: str, prefix: str) -> str:
        return short[1:] if short.startswith(".") else f"{prefix}{short}"


def _along(tensor: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    """A tensor whose axis `dim` is taken to new coordinates: contracted with the matrix's rows."""
    moved = tensor.movedim(dim, -1)
    return (moved.reshape(-1, moved.shape[-1]) @ matrix.to(tensor)).reshape(*moved.shape[:-1], -1).movedim(-1, dim)
