"""Relaxations: what a gate multiplies by while training is soft. Evaluation and the hard part never see them.

A relaxation is a pure function of a gate's logits and of the plan that is being approached. The trainer replaces it
from step to step; `None` is the gate's own sigmoid. Numbers that change from step to step are tensors as well: a
compiler would take a number for a constant of its graph, and trace the model anew for the next one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch


class Relaxation(ABC):
    """How the values of gates follow from their logits while training is soft."""

    draws_to_size = True
    """Whether the gates have to be drawn to their sizes by a penalty; otherwise the approached plan does it."""

    reorders = True
    """Whether units may change places while training is soft."""

    @abstractmethod
    def at(self, progress: float) -> Relaxation:
        """The relaxation at a point of the soft part of training, from 0 to 1."""

    @abstractmethod
    def factor(self, logits: torch.Tensor, start: float, kept: torch.Tensor | None) -> torch.Tensor:
        """
        What the units are multiplied by in training.

        Args:
            logits: theta / T, of theta's shape.
            start: the logit at the start, at which the factor is about 1.
            kept: of theta's shape, true for the units that the approached plan keeps; None without one.

        Returns:
            A tensor like `logits`, at least 0.
        """

    @abstractmethod
    def open_probability(self, logits: torch.Tensor, start: float) -> torch.Tensor:
        """How likely each unit stays, in [0, 1], 1 at the start or about it: what expected sizes are sums of."""


@dataclass(frozen=True)
class Closing(Relaxation):
    """
    Units outside the approached plan are closed gradually: their factor is `leak * g / g_start`, with a leak that
    falls from 1 to 0 in a straight line. All gates are trained on, as scales of what is left; no unit comes back.

    Gradual closing follows Zhu, Gupta, "To prune, or not to prune" (2018), with a factor in the place of a count.

    Args:
        leak (`float`): in [0, 1].
    """

    leak: float = 1.0
    draws_to_size = False
    reorders = False
    _leak: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_leak", _number(self.leak))

    def at(self, progress: float) -> Closing:
        """The leak is what is left of the soft part."""
        return Closing(leak=1.0 - progress)

    def factor(self, logits: torch.Tensor, start: float, kept: torch.Tensor | None) -> torch.Tensor:
        """As in the base class."""
        value = _relative(logits, start)
        return value if kept is None else torch.where(kept.to(value.device), value, value * self._leak)

    def open_probability(self, logits: torch.Tensor, start: float) -> torch.Tensor:
        """`g / g_start`, at most 1."""
        return _at_most_one(_relative(logits, start))


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    """
    A deterministic mask: the pass forward is exactly that of the plan that the gates would get now, made anew at every
    step; gradients are those of open units, so that what is closed can come back.

    References:
        Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013).
    """

    draws_to_size = False

    def at(self, progress: float) -> StraightThrough:
        """The same throughout."""
        return self

    def factor(self, logits: torch.Tensor, start: float, kept: torch.Tensor | None) -> torch.Tensor:
        """`g / g_start` of the units that are kept, 0 of the others."""
        value = _relative(logits, start)
        return value if kept is None else value - (value * ~kept.to(value.device)).detach()

    def open_probability(self, logits: torch.Tensor, start: float) -> torch.Tensor:
        """`g / g_start`, at most 1."""
        return _at_most_one(_relative(logits, start))


@dataclass(frozen=True)
class HardConcrete(Relaxation):
    """
    Random gates that are exactly 0 or 1 with some probability: the hard concrete distribution.

    `s = sigmoid((log u - log(1 - u) + logit) / beta)`, u uniform; `z = clamp(s (zeta - gamma) + gamma, 0, 1)`.

    References:
        Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018), equations 10-12.

    Args:
        beta (`float`): temperature of the distribution.
        gamma (`float`): the lower end of the interval to which it is stretched.
        zeta (`float`): the upper end.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def at(self, progress: float) -> HardConcrete:
        """The same throughout."""
        return self

    def factor(self, logits: torch.Tensor, start: float, kept: torch.Tensor | None) -> torch.Tensor:
        """As in the base class; drawn anew at each call."""
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        noise = uniform.log() - (1 - uniform).log()
        stretched = torch.sigmoid((noise + logits) / self.beta) * (self.zeta - self.gamma) + self.gamma
        return stretched.clamp(0.0, 1.0)

    def open_probability(self, logits: torch.Tensor, start: float) -> torch.Tensor:
        """`P(z > 0) = sigmoid(logit - beta log(-gamma / zeta))`."""
        return torch.sigmoid(logits - self.beta * math.log(-self.gamma / self.zeta))


def _number(value: float) -> torch.Tensor:
    """(), on the CPU; it takes part in an operation on any device, and widens nothing."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _relative(logits: torch.Tensor, start: float) -> torch.Tensor:
    """`g / g_start`."""
    return torch.sigmoid(logits) / torch.sigmoid(torch.full_like(logits, start, requires_grad=False))


def _at_most_one(ratio: torch.Tensor) -> torch.Tensor:
    """Clamped, with the gradient of what is not: a penalty also has to reach gates that are above their start."""
    return ratio + (ratio.clamp(max=1.0) - ratio).detach()


RELAXATIONS: dict[str, Relaxation] = {
    "closing": Closing(),
    "straight_through": StraightThrough(),
    "hard_concrete": HardConcrete(),
}
"""The relaxations by their names."""
