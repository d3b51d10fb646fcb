"""The output projections of a slim model as linear maps, and the choice of a refit by held-out error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..processes import Reduce, of_this_rank
from .least_squares import Fit, Held, Moments

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


def is_projection(module: nn.Module) -> bool:
    """Whether a module, or what an adapter wraps of it, is a linear map that can be refitted."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Projection)


def as_projection(module: nn.Module, name: str) -> Projection:
    """
    The module, if it is a linear map.

    Raises:
        UnsupportedModelError: if it is not.
    """
    if not isinstance(module, Projection):
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
    reduce: Reduce = of_this_rank,
) -> Refit:
    """
    Give a projection the refit with the least error on held-out moments; its own weights, if none is better.

    Args:
        name: of the module.
        module: changed in place: new tensors, of the same dtype.
        fitted, held_out: moments of its inputs, and of targets in units of the residual stream, of this rank's rows.
        gain: (out_features,), what multiplies its output before it is added to the stream; None for targets in units
            of its own output.
        dampings: the candidates. They are looked through from the middle, for as long as it gets better.
        reduce: sums over ranks.

    Returns:
        What was chosen.
    """
    scale = torch.ones_like(fitted.y) if gain is None else gain.double()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)  # an output that is multiplied by zero stays as it is
    weight, bias = _map(module)
    prior = scale[:, None] * weight.double(), None if bias is None else scale * bias.double()
    fit, held = Fit(fitted.reduced(reduce), *prior), Held(held_out, *prior, reduce)
    total = max(held.total, torch.finfo(torch.float64).tiny)

    def refitted(damping: float) -> _Candidate:
        step = fit.step(damping)
        if step is None:
            return _Candidate(math.inf, damping, weight, bias)
        new = (weight.double() + inverse[:, None] * step[0]).to(weight.dtype)
        change = scale[:, None] * new.double() - prior[0]
        if bias is None or step[1] is None or prior[1] is None:
            return _Candidate(held.error_after(change, None), damping, new, None)
        new_bias = (bias.double() + inverse * step[1]).to(bias.dtype)
        shift = scale * new_bias.double() - prior[1]
        return _Candidate(held.error_after(change, shift), damping, new, new_bias)

    best = _least(refitted, sorted(dampings))
    if best.error >= held.error - ROUNDING * total:
        return Refit(name, held.error / total, held.error / total, None, gain is not None)
    module.weight.data = best.weight.T.contiguous() if isinstance(module, Conv1D) else best.weight
    if best.bias is not None:
        module.bias.data = best.bias
    return Refit(name, held.error / total, best.error / total, best.damping, gain is not None)


@dataclass(frozen=True)
class _Candidate:
    """A refit, and its error on held-out moments; infinite if there is none."""

    error: float
    damping: float
    weight: torch.Tensor
    bias: torch.Tensor | None


def _least(refitted: Callable[[float], _Candidate], dampings: Sequence[float]) -> _Candidate:
    """From the middle of the dampings upwards for as long as it gets better; if it does not, downwards."""
    middle = (len(dampings) - 1) // 2
    start = best = refitted(dampings[middle])
    for others in (dampings[middle + 1 :], dampings[:middle][::-1]):
        for damping in others:
            found = refitted(damping)
            if found.error >= best.error:
                break
            best = found
        if best is not start:
            break
    return best


def _map(module: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight as (out, in), and the bias."""
    weight = module.weight.data
    bias = None if module.bias is None else module.bias.data
    return (weight.T if isinstance(module, Conv1D) else weight), bias
