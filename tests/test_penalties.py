"""Penalties on gates."""

from __future__ import annotations

import pytest
import torch

from hawada_peft.training.penalties import bimodality_penalty, floor_penalty, size_penalty


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


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.75), (0.75, 0.75)])
def test_bimodality_is_the_scaled_variance(value: float, expected: float) -> None:
    assert float(bimodality_penalty([torch.full((3,), value)])) == pytest.approx(expected)


def test_bimodality_is_a_mean_over_all_units() -> None:
    values = [torch.tensor([0.5]), torch.tensor([[0.0, 1.0, 0.25]])]
    assert float(bimodality_penalty(values)) == pytest.approx((1 + 0 + 0 + 0.75) / 4)


def test_bimodality_drives_units_away_from_one_half() -> None:
    values = torch.tensor([0.2, 0.5, 0.8], requires_grad=True)
    bimodality_penalty([values]).backward()
    torch.testing.assert_close(values.grad, 4 * (1 - 2 * values.detach()) / 3)


@pytest.mark.parametrize(("floor", "expected"), [(0.0, 0.0), (0.2, 0.005), (0.5, 0.08), (1.0, 0.53)])
def test_what_layers_fall_below_the_floor_by_is_squared(floor: float, expected: float) -> None:
    layers = [torch.tensor([0.0, 0.2]), torch.tensor([0.25, 0.75, 0.5])]
    assert float(floor_penalty(layers, floor)) == pytest.approx(expected)


def test_a_large_layer_does_not_make_up_for_a_small_one() -> None:
    below = [torch.zeros(2), torch.ones(100)]
    assert float(floor_penalty(below, 0.25)) == pytest.approx(0.25**2 / 2)


def test_the_floor_opens_layers_below_it_and_leaves_the_rest() -> None:
    below, above = torch.full((4,), 0.1, requires_grad=True), torch.full((4,), 0.6, requires_grad=True)
    floor_penalty([below, above], 0.25).backward()
    torch.testing.assert_close(below.grad, torch.full((4,), -2 * 0.15 / 4 / 2))
    assert not above.grad.any()
