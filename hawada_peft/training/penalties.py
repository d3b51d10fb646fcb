"""Penalties on gates: pure functions of their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def size_penalty(values: Sequence[torch.Tensor], target: float) -> torch.Tensor:
    """
    `relu(mean(g) - t)^2`: what the expected keep ratio exceeds its target by, squared.

    The quadratic term of the constraint of Xia et al., "Sheared LLaMA" (2023), equation 2, on the gates' values in the
    place of the probabilities of hard-concrete gates; one-sided, so that nothing is pushed open.

    Args:
        values: gate values in [0, 1] of one axis, any shapes.
        target: t, the keep ratio wanted, in (0, 1].

    Returns:
        ().
    """
    ratio = torch.cat([value.flatten() for value in values]).mean()
    return torch.relu(ratio - target).square()
