"""Penalties on gates."""

from __future__ import annotations

import pytest
import torch

from hawada_peft.training import size_penalty


@pytest.mark.parametrize(("target", "expected"), [(0.25, 0.0625), (0.5, 0.0), (0.75, 0.0)])
def test_excess_is_squared_and_one_sided(target: float, expected: float) -> None:
    values = [torch.tensor([0.0, 1.0]), torch.tensor([[0.25, 0.75]])]
    assert float(size_penalty(values, target)) == pytest.approx(expected)


def test_every_gate_counts_the_same() -> None:
    values = [torch.tensor([1.0]), torch.zeros(3)]
    assert float(size_penalty(values, 0.0)) == pytest.approx(0.25**2)


def test_gradient_closes_gates_until_the_target() -> None:
    values = torch.full((4,), 0.9, requires_grad=True)
    size_penalty([values], 0.5).backward()
    assert (values.grad > 0).all()
    assert torch.equal(values.grad, values.grad[:1].expand(4))


def test_nothing_is_pushed_open() -> None:
    values = torch.full((4,), 0.1, requires_grad=True)
    size_penalty([values], 0.5).backward()
    assert not values.grad.any()
