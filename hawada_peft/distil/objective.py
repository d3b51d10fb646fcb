"""The objective that every trainer here shares: what the student's logits lose against the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch

from ..errors import HawAdaError
from ..vanilla.heads import Head
from .divergence import kl_divergence, mean_squared_error


@dataclass(frozen=True)
class Distillation:
    """
    `kl_weight * KL + mse_weight * MSE` of logits: the divergence of Hinton et al. (2015), the squared difference of
    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014). Outputs that are no distribution (`Values`: of
    regression, reward models, models without a head) have no KL: theirs is `(kl_weight + mse_weight) * MSE`.

    Args:
        kd_temperature (`float`): T of the KL divergence, above 0.
        kl_weight (`float`): weight of the divergence; neither is negative, and one is above 0.
        mse_weight (`float`): of the squared difference, likewise.

    Raises:
        HawAdaError: listing everything that is wrong with the arguments.

    Example:
        >>> import torch
        >>> from hawada_peft.vanilla.heads import Classes
        >>> objective = Distillation(mse_weight=0.5)
        >>> terms = objective.terms(torch.zeros(2, 3, 8), torch.ones(2, 3, 8), head=Classes())
        >>> sorted(terms), objective.loss(terms).item()
        (['kl', 'mse'], 0.5)
    """

    kd_temperature: float = 1.0
    kl_weight: float = 1.0
    mse_weight: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"kd_temperature": self.kd_temperature, "kl_weight": self.kl_weight, "mse_weight": self.mse_weight}
        if wrong := {name: value for name, value in numbers.items() if not isinstance(value, int | float)}:
            raise HawAdaError(f"these must be numbers: {wrong}")
        problems = []
        if not 0 < self.kd_temperature < inf:
            problems.append(f"kd_temperature must be above 0 and finite, got {self.kd_temperature}")
        weights = (self.kl_weight, self.mse_weight)
        if not all(0 <= weight < inf for weight in weights) or sum(weights) == 0:
            problems.append(
                "weights must be finite and not negative, and one of kl_weight and mse_weight above 0, got "
                f"kl_weight={self.kl_weight}, mse_weight={self.mse_weight}"
            )
        if problems:
            raise HawAdaError("\n".join(problems))

    def terms(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        head: Head,
    ) -> dict[str, torch.Tensor]:
        """
        The terms of the loss before their weights.

        Args:
            student_logits: (..., classes), of any float dtypes.
            teacher_logits: of the same shape.
            mask: (...), nonzero where a position counts; all if left out.
            head: what the logits stand for, as `head_of` tells of the model.

        Returns:
            "kl", and "mse" if its weight is above 0; of values "mse" alone: () each, averaged over positions, float32
            or wider.
        """
        terms = {}
        if head.metric == "kl":
            temperature = self.kd_temperature
            terms["kl"] = kl_divergence(student_logits, teacher_logits, temperature=temperature, mask=mask, head=head)
        if self.mse_weight or not terms:
            terms["mse"] = mean_squared_error(student_logits, teacher_logits, mask=mask)
        return terms

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum, (), of what `terms` returned."""
        if "kl" not in terms:
            return (self.kl_weight + self.mse_weight) * terms["mse"]
        loss = self.kl_weight * terms["kl"]
        return loss + self.mse_weight * terms["mse"] if self.mse_weight else loss
