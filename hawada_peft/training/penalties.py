"""Penalties on gates: pure functions of the probabilities that units stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def size_penalty(probabilities: Sequence[torch.Tensor], target: float) -> torch.Tensor:
    """
    `relu(mean(p) - t)^2`: what the expected keep ratio exceeds its target by, squared.

    The expected L0 norm of Louizos et al., "Learning Sparse Neural Networks through L0 Regularization" (2018),
    equation 4, under the quadratic term of the constraint of Xia et al., "Sheared LLaMA" (2023), equation 2;
    one-sided, so that nothing is pushed open.

    Args:
        probabilities: p in [0, 1] of one axis, any shapes.
        target: t, the keep ratio wanted, in (0, 1].

    Returns:
        ().
    """
    return torch.relu(_mean(probabilities) - target).square()


def bimodality_penalty(probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    `mean(4 p (1 - p))`: 0 where every unit is decided, 1 where all are at 1/2.

    The variance of a Bernoulli variable, scaled to 1; as in Srinivas, Subramanya, Babu, "Training Sparse Neural
    Networks" (2017), equation 5.

    Args:
        probabilities: p in [0, 1], any shapes.

    Returns:
        ().
    """
    return _mean([4 * p * (1 - p) for p in probabilities])


def floor_penalty(probabilities: Sequence[torch.Tensor], floor: float) -> torch.Tensor:
    """
    `mean over layers of relu(f - mean(p))^2`: what layers fall below the least keep ratio by, squared.

    Without it one layer can close altogether, and a model in which all layers have one size pays for that. A hinge, as
    the one-sided constraint above, from below.

    Args:
        probabilities: p in [0, 1], one tensor per layer.
        floor: f, the least keep ratio of a layer, in [0, 1].

    Returns:
        ().
    """
    return torch.stack([torch.relu(floor - p.mean()).square() for p in probabilities]).mean()


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values]).mean()
