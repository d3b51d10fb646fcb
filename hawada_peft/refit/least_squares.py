"""Least squares from moments: a linear map refitted towards a given one, and its error on other data."""

from __future__ import annotations

from functools import partial

import torch

from ..processes import Reduce, of_this_rank

ROWS = 4096
"""Rows that are multiplied at a time."""

COLUMNS = 512
"""Of the inputs' moments, which are symmetric, the blocks of so many columns below the diagonal are computed."""


class Moments:
    """
    First and second moments of inputs x and wanted outputs y, summed over rows.

    Products of rows are taken in float32 (float64 for float64 data), sums are kept in float64.

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
        self.dtype = torch.float32
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """
        Add rows. They are multiplied once there are many, or by `reduced`.

        Args:
            x: (rows, inputs).
            y: (rows, outputs).
        """
        self._waiting.append((x, y))
        if sum(len(x) for x, _ in self._waiting) >= ROWS:
            self._multiply()

    def rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All rows of x and y, in the dtype of products, where they are fewer than the inputs and still there."""
        if not self._waiting or self.count or sum(len(x) for x, _ in self._waiting) >= len(self.xx):
            return None
        return self._joined()

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self.dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), self.dtype)
        return x.to(self.dtype), y.to(self.dtype)

    def _multiply(self) -> None:
        if not self._waiting:
            return
        x, y = self._joined()
        self._waiting.clear()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        for start in range(0, x.shape[1], COLUMNS):
            self.xx[start:, start : start + COLUMNS] += x[:, start:].T @ x[:, start : start + COLUMNS]
        self.yx += y.T @ x
        self.yy += y.square().sum()

    def reduced(self, reduce: Reduce) -> Moments:
        """The moments of all rows, of all ranks, added up in place by `reduce`. No more are added afterwards."""
        self._multiply()
        for start in range(0, len(self.xx), COLUMNS):
            end = start + COLUMNS
            self.xx[start:end, end:] = self.xx[end:, start:end].T
        for tensor in (self.count, self.x, self.y, self.xx, self.yx, self.yy):
            reduce(tensor)
        return self


class Held:
    """
    The error of a linear map, and of maps close to it, on data that nothing is fitted to.

    It is taken from the rows themselves where they are fewer than the inputs, as they mostly are: moments would take
    several times the products.

    Args:
        moments: of x (inputs) and the wanted y (outputs), not `reduced`: of this rank's rows.
        weight: (outputs, inputs), the map.
        bias: (outputs,), or None for a map without one.
        reduce: sums over ranks.

    Attributes:
        total (`float`): the sum over rows of `|y|^2`.
        error (`float`): the sum over rows of `|y - weight x - bias|^2`.
    """

    def __init__(
        self, moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None, reduce: Reduce = of_this_rank
    ) -> None:
        self._reduce, self._fit = reduce, None
        rows = moments.rows()
        if rows is None:
            moments = moments.reduced(of_this_rank)
            self._fit, total = Fit(moments, weight, bias), float(moments.yy)
            error = self._fit.error
        else:
            self._x, y = rows
            left = y - self._x @ weight.to(y.dtype).T
            self._left = left if bias is None else left - bias.to(y.dtype)
            total, error = _squares(y), _squares(self._left)
        self._device = weight.device
        self.total, self.error = self._summed(total), self._summed(error)

    def error_after(self, change: torch.Tensor, shift: torch.Tensor | None) -> float:
        """As `Fit.error_after`."""
        if self._fit is not None:
            return self._summed(self._fit.error_after(change, shift))
        left = self._left - self._x @ change.to(self._x.dtype).T
        return self._summed(_squares(left if shift is None else left - shift.to(left.dtype)))

    def _summed(self, value: float) -> float:
        return float(self._reduce(torch.tensor(value, dtype=torch.float64, device=self._device)))


class Fit:
    """
    How a linear map fits moments, and how maps close to it do.

    Args:
        moments: of x (inputs) and the wanted y (outputs), `reduced`.
        weight: (outputs, inputs), the map.
        bias: (outputs,), or None for a map without one.

    Attributes:
        error (`float`): the sum over rows of `|y - weight x - bias|^2`.
    """

    def __init__(self, moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.moments, self.biased = moments, bias is not None
        self.xx = moments.xx.to(moments.dtype)
        # What is left over, times the inputs and times 1: half the gradient of the error, with its sign changed.
        left = moments.yx.to(moments.dtype) - weight.to(moments.dtype) @ self.xx
        self.left, self.left_mean = left.double(), moments.y - weight.double() @ moments.x
        error = moments.yy - (weight.double() * (moments.yx + self.left)).sum()
        if bias is not None:
            bias = bias.double()
            error = error - bias @ (2 * self.left_mean - moments.count * bias)
            self.left -= torch.outer(bias, moments.x)
            self.left_mean = self.left_mean - moments.count * bias
        self.error = max(float(error), 0.0)

    def error_after(self, change: torch.Tensor, shift: torch.Tensor | None) -> float:
        """
        The error of the map with something added.

        Args:
            change: (outputs, inputs), to the weight.
            shift: (outputs,), to the bias, if there is one.
        """
        product = (change.to(self.xx) @ self.xx).double()
        gained = (change.double() * (2 * self.left - product)).sum()
        if shift is not None:
            shift, moved = shift.double(), change.double() @ self.moments.x
            gained = gained + shift @ (2 * (self.left_mean - moved) - self.moments.count * shift)
        return max(self.error - float(gained), 0.0)

    def step(self, damping: float) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """
        What the ridge regression towards the map adds to it: `(Y'X - W X'X) (X'X + D)^-1`, D = damping * diag(X'X).

        With a bias, moments are centred and the bias follows from the means. Much damping adds nothing; none gives
        least squares. The scale of a single input feature makes no difference. Solved in float32, scaled so that the
        diagonal is the same everywhere, where the data are not float64 and the damping is far above rounding.

        Args:
            damping: above 0.

        Returns:
            The change of the weight, (outputs, inputs), and of the bias in float64; None if the inputs are all zero,
            or the system cannot be solved.

        References:
            Hoerl, Kennard, "Ridge Regression" (1970).
        """
        moments, left = self.moments, self.left
        if self.biased:
            left = left - torch.outer(self.left_mean, moments.x) / moments.count
        solved = None
        for dtype in dict.fromkeys((moments.dtype, torch.float64)):
            solved = self._solved(left, damping, dtype)
            if solved is not None:
                break
        if solved is None or not self.biased:
            return None if solved is None else (solved, None)
        return solved, (self.left_mean - solved @ moments.x) / moments.count

    def _solved(self, left: torch.Tensor, damping: float, dtype: torch.dtype) -> torch.Tensor | None:
        moments = self.moments
        matrix = (self.xx if dtype == self.xx.dtype else moments.xx).to(dtype, copy=True)
        if self.biased:
            matrix.addr_(moments.x.to(dtype), (moments.x / moments.count).to(dtype), alpha=-1)
        diagonal = matrix.diagonal().double()
        if not diagonal.any():
            return None
        scale = diagonal.clamp(min=float(1e-9 * diagonal.mean())).rsqrt()  # some inputs are always zero
        matrix.mul_(scale.to(dtype)[:, None]).mul_(scale.to(dtype))
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            return None
        return torch.cholesky_solve((left * scale).to(dtype).T, factor).T.double() * scale


def _squares(values: torch.Tensor) -> float:
    return float(values.square().sum(1).double().sum())
