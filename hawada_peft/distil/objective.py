"""The objective that every trainer here shares: what the student's logits lose against the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch

from ..errors import HawAdaError
from ..vanilla.heads import Head
from .divergence import kl_divergence, mean_squared_error
from .pooling import POOLINGS, cosine_distance


@dataclass(frozen=True)
class Distillation:
    """
    `kl_weight * KL + mse_weight * MSE` of logits: the divergence of Hinton et al. (2015), the squared difference of
    Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014). Outputs that are no distribution (`Values`: of
    regression, reward models, models without a head) have no KL: theirs is `(kl_weight + mse_weight) * MSE`.
    To the hidden states of a model without a head `embedding_weight * (1 - cos)` of its pooled embeddings is added.

    Args:
        kd_temperature (`float`): T of the KL divergence, above 0.
        kl_weight (`float`): weight of the divergence; neither is negative, and one is above 0.
        mse_weight (`float`): of the squared difference, likewise.
        embedding_weight (`float`): of the cosine distance of pooled embeddings (`cosine_distance`), likewise.
        pooling (`str`): how the hidden states of tokens become one embedding: `"mean"`, `"cls"` or `"last"`.

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
    embedding_weight: float = 0.0
    pooling: str = "mean"

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("kl_weight", "mse_weight", "embedding_weight")}
        numbers = {"kd_temperature": self.kd_temperature} | weights
        if wrong := {name: value for name, value in numbers.items() if not isinstance(value, int | float)}:
            raise HawAdaError(f"these must be numbers: {wrong}")
        problems = []
        if not 0 < self.kd_temperature < inf:
            problems.append(f"kd_temperature must be above 0 and finite, got {self.kd_temperature}")
        if not all(0 <= weight < inf for weight in weights.values()) or sum(weights.values()) == 0:
            problems.append(
                f"weights must be finite and not negative, and one of {', '.join(weights)} above 0, got "
                + ", ".join(f"{name}={weight}" for name, weight in weights.items())
            )
        if self.pooling not in list(POOLINGS):
            problems.append(f"pooling must be one of {list(POOLINGS)}, got {self.pooling!r}")
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
            "kl", and "mse" if its weight is above 0; of values "mse" alone, unless both weights are 0: () each,
            averaged over positions, float32 or wider. "embedding" if its weight is above 0, averaged over examples.

        Raises:
            HawAdaError: if there are embeddings to be pooled, and the outputs are no hidden states of tokens.
        """
        terms = {}
        if head.metric == "kl":
            temperature = self.kd_temperature
            terms["kl"] = kl_divergence(student_logits, teacher_logits, temperature=temperature, mask=mask, head=head)
        if self.mse_weight or (self.kl_weight and not terms):
            terms["mse"] = mean_squared_error(student_logits, teacher_logits, mask=mask)
        if self.embedding_weight:
            terms["embedding"] = cosine_distance(student_logits, teacher_logits, mask, pooling=self.pooling)
        return terms

    def loss(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum, (), of what `terms` returned."""
        squared = self.mse_weight if "kl" in terms else self.kl_weight + self.mse_weight
        weights = {"kl": self.kl_weight, "mse": squared, "embedding": self.embedding_weight}
        return torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()
