"""The product of activations and factors, at the least memory traffic."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RowsError

_CHUNK = 2**22  # elements of a float32 temporary


def scale(x: torch.Tensor, factor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """
    `x * factor`, formed in the wider of both dtypes and rounded once to that of `x`.

    Where `x` is of half precision and the factor is not, no wider copy of `x` is made or kept on an accelerator,
    forward or backward. The gradient of the factor is summed in float32; for bfloat16 its terms are rounded to
    bfloat16, as the two values that they are products of have been.

    Args:
        x: any layout in which the axes up to `dim` match the factor's shape (or broadcast to it).
        factor: its last axis lies on axis `dim` of `x`, its other axes just before it.
        dim: the axis of `x`.

    Returns:
        A tensor of the dtype of `x`.
    """
    factor = factor.reshape(factor.shape + (1,) * (x.ndim - 1 - dim % x.ndim))
    plain = (
        torch.promote_types(x.dtype, factor.dtype) == x.dtype  # nothing to round
        or torch.broadcast_shapes(x.shape, factor.shape) != x.shape
        or torch.compiler.is_compiling()  # the compiler fuses product and rounding by itself
    )
    return (x * factor).to(x.dtype) if plain else _Scale.apply(x, factor)


def scale_rows(x: torch.Tensor, factors: torch.Tensor, dim: int) -> torch.Tensor:
    """
    Multiply features row by row.

    Args:
        x: (batch, ..., features, ...), with the features on axis `dim`.
        factors: (batch, features); of a gate with more axes, (batch, ..., features).
        dim: as in `scale`.

    Returns:
        A tensor like x.

    Raises:
        RowsError: if the first axis of x is not as long as that of the factors.
    """
    between = dim % x.ndim + 1 - factors.ndim
    if between < 0 or len(x) != len(factors):
        raise RowsError(
            f"there are factors for {len(factors)} rows, and the input has shape {tuple(x.shape)}: the rows of the "
            "batch must be its first axis"
        )
    return scale(x, factors.reshape(factors.shape[:1] + (1,) * between + factors.shape[1:]), dim)


class _Scale(torch.autograd.Function):
    """Saves `x` and the factor alone, and each only for the gradient of the other."""

    @staticmethod
    def forward(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return _rounded_product(x, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x, factor = inputs
        for_x, for_factor = ctx.needs_input_grad
        ctx.save_for_backward(x if for_factor else None, factor if for_x else None)
        ctx.shape, ctx.dtype = factor.shape, factor.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, factor = ctx.saved_tensors
        of_x = None if factor is None else _rounded_product(gradient, factor)
        of_factor = None if x is None else _sum_of_products(gradient, x, ctx.shape, ctx.dtype)
        return of_x, of_factor


def _rounded_product(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():  # in a backward pass with create_graph
        return (x * factor).to(x.dtype)
    return torch.mul(x, factor, out=torch.empty_like(x))  # the kernel computes in the wider dtype and casts on writing


def _sum_of_products(a: torch.Tensor, b: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The sum of `a * b` over the axes along which a tensor of `shape` is broadcast, in `dtype`."""
    inner = (1,) * (a.ndim - len(shape)) + tuple(shape)
    axes = [axis for axis, size in enumerate(inner) if size == 1]
    if a.dtype == torch.bfloat16:
        product = a * b
    elif 0 in axes and a.numel() > _CHUNK:
        # float16 terms would overflow or vanish: they are formed in the wider dtype, a slice at a time.
        rows = max(1, _CHUNK * a.shape[0] // a.numel())
        slices = zip(a.split(rows), b.split(rows), strict=True)
        return torch.stack([_sum_of_products(*pair, shape, dtype) for pair in slices]).sum(0)
    else:
        product = a.to(dtype) * b
    return product.sum(axes, dtype=dtype).reshape(shape) if axes else product.to(dtype).reshape(shape)
