"""Differentiable interpolation of measured values."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def linear(x: torch.Tensor, knots: Sequence[float], values: torch.Tensor) -> torch.Tensor:
    """
    Piecewise linear interpolation; beyond the knots the outer pieces go on.

    Args:
        x: any shape.
        knots: rising, (k,).
        values: (k,), or (k, ...) with one column per further axis.

    Returns:
        The shape of x, followed by the further axes of `values`.
    """
    if len(knots) == 1:
        return values[0].expand(x.shape + values.shape[1:])
    points = torch.as_tensor(knots, dtype=values.dtype, device=values.device)
    left = (torch.searchsorted(points, x.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    part = (x - points[left]) / (points[left + 1] - points[left])
    part = part.reshape(part.shape + (1,) * (values.ndim - 1))
    return values[left] * (1 - part) + values[left + 1] * part


def bilinear(
    x: torch.Tensor, y: torch.Tensor, x_knots: Sequence[float], y_knots: Sequence[float], values: torch.Tensor
) -> torch.Tensor:
    """
    Bilinear interpolation on a grid; beyond it the outer cells go on.

    Args:
        x, y: of one shape.
        x_knots, y_knots: rising, (k,) and (m,).
        values: (k, m).

    Returns:
        The shape of x.
    """
    rows = linear(x, x_knots, values)  # (..., m)
    if len(y_knots) == 1:
        return rows[..., 0]
    points = torch.as_tensor(y_knots, dtype=values.dtype, device=values.device)
    left = (torch.searchsorted(points, y.detach().contiguous(), right=True) - 1).clamp(0, len(y_knots) - 2)
    part = (y - points[left]) / (points[left + 1] - points[left])
    low = rows.gather(-1, left.unsqueeze(-1)).squeeze(-1)
    high = rows.gather(-1, (left + 1).unsqueeze(-1)).squeeze(-1)
    return low * (1 - part) + high * part


def smooth(
    queries: torch.Tensor, points: torch.Tensor, residuals: torch.Tensor, *, width: float, prior: float
) -> torch.Tensor:
    """
    What is left over at some points, carried to their neighbourhood: a kernel average that falls to 0 far from any.

    Args:
        queries: (..., d).
        points: (n, d).
        residuals: (n,).
        width: standard deviation of the Gaussian kernel, in the units of the coordinates.
        prior: weight of the residual 0.

    Returns:
        The shape of `queries` without its last axis.

    References:
        Nadaraya, "On Estimating Regression" (1964), with a prior weight in the denominator.
    """
    if len(points) == 0:
        return queries.new_zeros(queries.shape[:-1])
    total = queries.new_zeros(queries.shape[:-1])
    weight = queries.new_full(queries.shape[:-1], prior)
    for point, residual in zip(points, residuals, strict=True):
        near = torch.exp(-(queries - point).square().sum(-1) / (2 * width**2))
        total, weight = total + near * residual, weight + near
    return total / weight
