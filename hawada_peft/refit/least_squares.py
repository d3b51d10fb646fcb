"""Least squares from moments: a linear map refitted towards a given one, and its error on other data."""

from __future__ import annotations

from functools import partial

import torch

from .fidelity import Reduce


class Moments:
    """
    First and second moments of inputs x and wanted outputs y, summed over rows.

    Products of a batch are taken in float32 (float64 for float64 data), sums are kept in float64.

    Args:
        inputs: features of x.
        outputs: features of y.
        device: where the sums are kept.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.count, self.yy = zeros(()), zeros(())
        self.x, self.y = zeros(inputs), zeros(outputs)
        self.xx, self.yx = zeros((inputs, inputs)), zeros((outputs, inputs))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """
        Add rows.

        Args:
            x: (rows, inputs).
            y: (rows, outputs).
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += y.square().sum()

    def reduced(self, reduce: Reduce) -> Moments:
        """The moments of all ranks, added up in place by `reduce`."""
        for tensor in (self.count, self.x, self.y, self.xx, self.yx, self.yy):
            reduce(tensor)
        return self

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
        """
        The sum over rows of `|y - weight x - bias|^2`.

        Args:
            weight: (outputs, inputs).
            bias: (outputs,), or None.
        """
        weight = weight.double()
        total = self.yy - 2 * (weight * self.yx).sum() + ((weight @ self.xx) * weight).sum()
        if bias is not None:
            bias = bias.double()
            total = total + bias @ (2 * (weight @ self.x - self.y) + self.count * bias)
        return max(float(total), 0.0)


def refit(
    moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None, damping: float
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """
    The ridge regression towards a given map: `W' = W + (Y'X - W X'X) (X'X + D)^-1`, D = damping * diag(X'X).

    With a bias, moments are centred and the bias follows from the means. Much damping gives back the given weight;
    none gives least squares. The scale of a single input feature makes no difference.

    Args:
        moments: of x (inputs) and the wanted y (outputs).
        weight: (outputs, inputs), the map to stay close to.
        bias: (outputs,), or None for a map without one.
        damping: above 0.

    Returns:
        The new weight and bias in float64; None if the inputs are all zero, or the system cannot be solved.

    References:
        Hoerl, Kennard, "Ridge Regression" (1970).
    """
    weight, xx, yx = weight.double(), moments.xx, moments.yx
    if bias is not None:
        xx = xx - torch.outer(moments.x, moments.x) / moments.count
        yx = yx - torch.outer(moments.y, moments.x) / moments.count
    diagonal = xx.diagonal()
    damped = xx.clone()
    damped.diagonal().add_(damping * diagonal.clamp(min=1e-9 * diagonal.mean()))  # some inputs are always zero
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    weight = weight + torch.cholesky_solve((yx - weight @ xx).T, factor).T
    if bias is None:
        return weight, None
    return weight, (moments.y - weight @ moments.x) / moments.count
