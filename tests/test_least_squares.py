"""Moments and the ridge regression towards a given map, against direct computations."""

from __future__ import annotations

import pytest
import torch

from hawada_peft.refit.least_squares import Moments, refit

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
    return moments


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
def test_error_is_the_sum_of_squares(dtype: torch.dtype) -> None:
    x, y, weight, bias = (tensor.to(dtype).double() for tensor in data())
    moments = moments_of(x.to(dtype), y.to(dtype))
    for shift in (None, bias):
        expected = (y - x @ weight.T - (0 if shift is None else shift)).square().sum().item()
        assert moments.error(weight, shift) == pytest.approx(expected, rel=1e-5)


def test_inputs_that_are_all_zero_are_refused() -> None:
    _, y, weight, _ = data()
    assert refit(moments_of(torch.zeros(len(y), 5), y), weight, None, 0.1) is None
