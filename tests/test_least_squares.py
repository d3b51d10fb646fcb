"""Moments and the ridge regression towards a given map, against direct computations."""

from __future__ import annotations

import pytest
import torch

from hawada_peft.processes import of_this_rank
from hawada_peft.refit.least_squares import COLUMNS, ROWS, Fit, Held, Moments

CPU = torch.device("cpu")


def data(rows: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs with a mean, targets that are not a linear map of them, a weight and a bias."""
    x = torch.randn(rows, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 1
    y = x @ torch.randn(5, 3, dtype=torch.float64) + torch.randn(rows, 3, dtype=torch.float64) + 2
    return x, y, torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)


def moments_of(x: torch.Tensor, y: torch.Tensor, parts: int = 4) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], CPU)
    for rows in torch.arange(len(x)).chunk(parts):
        moments.add(x[rows], y[rows])
    return moments.reduced(of_this_rank)


def refit(
    moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None, damping: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    change, shift = Fit(moments, weight, bias).step(damping)
    return weight + change, None if bias is None else bias + shift


def test_moments_are_sums_over_rows() -> None:
    x, y = torch.randn(ROWS + 100, COLUMNS + 10), torch.randn(ROWS + 100, 3)
    found, wide, tall = moments_of(x, y, 7), x.double(), y.double()
    assert found.count == len(x)
    for name, expected in {
        "x": wide.sum(0),
        "y": tall.sum(0),
        "xx": wide.T @ wide,
        "yx": tall.T @ wide,
        "yy": tall.square().sum(),
    }.items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-2, msg=name)
    torch.testing.assert_close(found.xx, found.xx.T, rtol=1e-5, atol=1e-2)


def test_little_damping_is_least_squares() -> None:
    x, y, weight, bias = data()
    moments = moments_of(x, y)
    found, none = refit(moments, weight, None, 1e-12)
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution.T)
    assert none is None
    found, shift = refit(moments, weight, bias, 1e-12)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    torch.testing.assert_close(found, expected[:-1].T)
    torch.testing.assert_close(shift, expected[-1])


def test_it_is_the_minimum_of_error_plus_distance() -> None:
    x, y, weight, _ = data()
    moments = moments_of(x, y)
    found, _ = refit(moments, weight, None, 0.3)
    found.requires_grad_()
    distance = 0.3 * moments.xx.diagonal() * (found - weight).square()
    ((y - x @ found.T).square().sum() + distance.sum()).backward()
    assert found.grad.abs().max() <= 1e-9 * moments.yy


def test_much_damping_is_the_given_weight() -> None:
    x, y, weight, bias = data()
    found, shift = refit(moments_of(x, y), weight, bias, 1e12)
    torch.testing.assert_close(found, weight)
    torch.testing.assert_close(shift, (y - x @ weight.T).mean(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_errors_are_sums_of_squares(dtype: torch.dtype) -> None:
    x, y, weight, bias = (tensor.to(dtype).double() for tensor in data())
    moments = moments_of(x.to(dtype), y.to(dtype))
    change, moved = torch.randn_like(weight), torch.randn_like(bias)
    for shift in (None, bias):
        fit = Fit(moments, weight, shift)
        expected = (y - x @ weight.T - (0 if shift is None else shift)).square().sum().item()
        assert fit.error == pytest.approx(expected, rel=1e-5)
        expected = (y - x @ (weight + change).T - (0 if shift is None else shift + moved)).square().sum().item()
        assert fit.error_after(change, None if shift is None else moved) == pytest.approx(expected, rel=1e-5)


def test_float32_gives_what_float64_gives() -> None:
    """Inputs that nearly repeat each other, on scales that differ by a million."""
    x = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 40, dtype=torch.float64)
    x = (x + 1e-3 * torch.randn(400, 40)) * torch.logspace(-3, 3, 40)
    y, weight = x[:, ::8] + torch.randn(400, 5), torch.zeros(5, 40)
    for bias in (None, torch.zeros(5)):
        exact = Fit(moments_of(x, y), weight, bias)
        for damping in (1e-3, 1e-1):
            found = Fit(moments_of(x.float(), y.float()), weight, bias).step(damping)
            wanted = exact.error_after(*exact.step(damping))
            assert exact.error_after(*found) == pytest.approx(wanted, rel=1e-4)
        assert Fit(moments_of(x.float(), y.float()), weight, bias).step(1e-6) is not None


def test_inputs_that_are_all_zero_are_refused() -> None:
    _, y, weight, _ = data()
    assert Fit(moments_of(torch.zeros(len(y), 5), y), weight, None).step(0.1) is None


@pytest.mark.parametrize("biased", [False, True])
def test_held_out_errors_are_those_of_the_moments(biased: bool) -> None:
    """From fewer rows than inputs, from more, and from the rows of two ranks."""
    x, y, weight, bias = data(rows=7)
    shift, change = (bias, torch.randn_like(bias)) if biased else (None, None), torch.randn_like(weight)
    for rows in (4, 7):
        fit = Fit(moments_of(x[:rows], y[:rows]), weight, shift[0])
        held = Held(waiting(x[:rows], y[:rows]), weight, shift[0])
        assert held.total == pytest.approx(y[:rows].square().sum().item())
        assert held.error == pytest.approx(fit.error)
        assert held.error_after(change, shift[1]) == pytest.approx(fit.error_after(change, shift[1]))
    twice = Held(waiting(x, y), weight, shift[0], lambda value: 2 * value)
    assert twice.error == pytest.approx(2 * held.error)
    assert twice.error_after(change, shift[1]) == pytest.approx(2 * held.error_after(change, shift[1]))


def waiting(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], CPU)
    for row in range(len(x)):
        moments.add(x[row : row + 1], y[row : row + 1])
    return moments
