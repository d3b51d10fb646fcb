"""The output projections of a slim model as linear maps, and the choice of a refit by held-out error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .least_squares import Moments, refit

Projection = nn.Linear | Conv1D

ROUNDING = 1e-6
"""Errors that differ by less than this part of the target's square are equal: products are taken in float32."""


@dataclass(frozen=True)
class Refit:
    """
    What became of one output projection.

    Args:
        name (`str`): the module in the slim model.
        before, after (`float`): its squared error on the held-out batches relative to the target's square, with the
            plain weights and with those it has now.
        damping (`float`, *optional*): the one chosen; None if the plain weights were best.
        residual (`bool`): whether the target was the dense model's residual stream; otherwise it was the output of
            the dense model's projection.
    """

    name: str
    before: float
    after: float
    damping: float | None
    residual: bool


def as_projection(module: nn.Module, name: str) -> Projection:
    """
    The module, if it is a linear map.

    Raises:
        UnsupportedModelError: if it is not.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UnsupportedModelError(
            f"{name!r} is a {type(module).__name__}; only torch.nn.Linear and transformers' Conv1D can be refitted"
        )
    return module


def new_moments(module: Projection) -> Moments:
    """Moments for refitting a projection, on its device."""
    outputs, inputs = _map(module)[0].shape
    return Moments(inputs, outputs, module.weight.device)


def choose(
    name: str,
    module: Projection,
    fitted: Moments,
    held_out: Moments,
    gain: torch.Tensor | None,
    dampings: Sequence[float],
) -> Refit:
    """
    Give a projection the refit with the least error on held-out moments; its own weights, if none is better.

    Args:
        name: of the module.
        module: changed in place: new tensors, of the same dtype.
        fitted, held_out: moments of its inputs, and of targets in units of the residual stream.
        gain: (out_features,), what multiplies its output before it is added to the stream; None for targets in units
            of its own output.
        dampings: the candidates.

    Returns:
        What was chosen.
    """
    scale = torch.ones_like(fitted.y) if gain is None else gain.double()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)  # an output that is multiplied by zero stays as it is

    def error(weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        return held_out.error(scale[:, None] * weight.double(), None if bias is None else scale * bias.double())

    weight, bias = _map(module)
    total = max(float(held_out.yy), torch.finfo(torch.float64).tiny)
    before = best = error(weight, bias)
    damping, chosen = None, None
    prior = scale[:, None] * weight.double(), None if bias is None else scale * bias.double()
    for candidate in dampings:
        solved = refit(fitted, *prior, candidate)
        if solved is None:
            continue
        new = (weight.double() + inverse[:, None] * (solved[0] - prior[0])).to(weight.dtype)
        new_bias = None
        if bias is not None and solved[1] is not None and prior[1] is not None:
            new_bias = (bias.double() + inverse * (solved[1] - prior[1])).to(bias.dtype)
        found = error(new, new_bias)
        if found < best - ROUNDING * total:
            best, damping, chosen = found, candidate, (new, new_bias)
    if chosen is not None:
        module.weight.data = chosen[0].T.contiguous() if isinstance(module, Conv1D) else chosen[0]
        if chosen[1] is not None:
            module.bias.data = chosen[1]
    return Refit(name, before / total, best / total, damping, gain is not None)


def _map(module: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight as (out, in), and the bias."""
    weight = module.weight.data
    bias = None if module.bias is None else module.bias.data
    return (weight.T if isinstance(module, Conv1D) else weight), bias
