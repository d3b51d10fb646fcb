"""What a model's outputs stand for: decided here once, for every loss, draw and comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForSequenceClassificationLoss

from ..errors import UnsupportedModelError
from .draws import draw_classes, draw_labels, draw_values


class PositionLoss(ABC):
    """A loss at each position between the student's and the teacher's outputs, and its gradient by hand."""

    @abstractmethod
    def value(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """From outputs (positions, classes): (positions,), computed in `dtype`."""

    @abstractmethod
    def gradient(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The derivative of `value` by the student's outputs: (positions, classes), a new tensor of `dtype`."""


@dataclass(frozen=True)
class Divergence(PositionLoss):
    """`T^2 KL(teacher || student)` of the distributions over classes, softened by the temperature T."""

    temperature: float = 1.0

    def value(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`T^2 sum_i p_i (log p_i - log q_i)`."""
        log_q, log_p = self._soften(student, dtype), self._soften(teacher, dtype)
        return self.temperature**2 * functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    def gradient(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`T (q - p)`."""
        difference = self._soften(student, dtype).exp_().sub_(self._soften(teacher, dtype).exp_())
        return difference if self.temperature == 1 else difference.mul_(self.temperature)

    def _soften(self, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.temperature != 1:
            logits = logits.to(dtype) / self.temperature
        return functional.log_softmax(logits, dim=-1, dtype=dtype)


@dataclass(frozen=True)
class LabelDivergence(PositionLoss):
    """
    `T^2 KL(teacher || student)` of independent labels, each with a sigmoid of its own softened by the temperature T:
    the sum of the labels' divergences.
    """

    temperature: float = 1.0

    def value(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`T^2 sum_i (p_i (log p_i - log q_i) + (1 - p_i) (log (1 - p_i) - log (1 - q_i)))`."""
        s, t = student.to(dtype) / self.temperature, teacher.to(dtype) / self.temperature
        present = t.sigmoid() * (functional.logsigmoid(t) - functional.logsigmoid(s))
        absent = (-t).sigmoid() * (functional.logsigmoid(-t) - functional.logsigmoid(-s))
        return self.temperature**2 * (present + absent).sum(-1)

    def gradient(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`T (q - p)`."""
        s, t = student.to(dtype) / self.temperature, teacher.to(dtype) / self.temperature
        return s.sigmoid().sub_(t.sigmoid()).mul_(self.temperature)


@dataclass(frozen=True)
class SquaredError(PositionLoss):
    """The squared difference, averaged over outputs."""

    def value(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`mean_i (s_i - t_i)^2`."""
        return (student.to(dtype) - teacher.to(dtype)).square().mean(-1)

    def gradient(self, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`2 (s - t) / outputs`."""
        return (student.to(dtype) - teacher.to(dtype)).mul_(2 / student.shape[-1])


class Head(ABC):
    """What the outputs at each position stand for."""

    metric: str
    """What the difference of two models' outputs is called: `"kl"` or `"mse"`."""

    unit: str
    """What the numbers of that are, for people."""

    @abstractmethod
    def loss(self, temperature: float = 1.0) -> PositionLoss:
        """The difference of the student's outputs from the teacher's, whose mean is 0 where they agree alone."""

    @abstractmethod
    def draw(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Targets drawn by what the outputs predict.

        Args:
            outputs: (positions, outputs).
            generator: on the CPU.

        Raises:
            HawAdaError: if the outputs hold NaN or infinity.
        """

    @abstractmethod
    def surprise(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """
        The negative log-likelihood of targets, up to a constant.

        Args:
            outputs: (positions, outputs).
            targets: as `draw` gives them.

        Returns:
            (positions,) in nats.
        """


class Classes(Head):
    """One class of several: a softmax. Language models and most classifiers."""

    metric, unit = "kl", "nats per prediction over the dense model's"

    def loss(self, temperature: float = 1.0) -> PositionLoss:
        """`KL(teacher || student)`."""
        return Divergence(temperature)

    def draw(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Classes, (positions,)."""
        return draw_classes(outputs, generator)

    def surprise(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The cross-entropy."""
        return functional.cross_entropy(outputs, targets, reduction="none")


class Labels(Head):
    """Any number of labels at once: a sigmoid for each, independent of the others."""

    metric, unit = "kl", "nats per prediction over the dense model's"

    def loss(self, temperature: float = 1.0) -> PositionLoss:
        """The sum of the labels' `KL(teacher || student)`."""
        return LabelDivergence(temperature)

    def draw(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """0 or 1 for each label, (positions, labels)."""
        return draw_labels(outputs, generator)

    def surprise(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the labels' binary cross-entropies."""
        losses = functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")
        return losses.sum(-1)


class Values(Head):
    """
    Numbers: of a regression or a reward model, hidden states, feature maps. No softmax makes sense of them, and one
    output alone would be the same whatever the model; their likelihood is that of Gaussians of variance 1.
    """

    metric, unit = "mse", "mean squared difference from the dense model's outputs"

    def loss(self, temperature: float = 1.0) -> PositionLoss:
        """The mean squared difference; there is nothing to soften."""
        return SquaredError()

    def draw(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Normal draws around the outputs, (positions, outputs)."""
        return draw_values(outputs, generator)

    def surprise(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Half the squared distance."""
        return (outputs - targets).square().sum(-1) / 2


def is_bare(model: nn.Module) -> bool:
    """Whether a transformers model (or the one in a PEFT model) has no head, but gives hidden states."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(base, PreTrainedModel) and base.base_model is base


def head_of(model: nn.Module, outputs: torch.Tensor) -> Head:
    """
    What a model's outputs stand for.

    `Values` for a model without a head, for one output, and where `problem_type` is `"regression"`; `Labels` where it
    is `"multi_label_classification"`; otherwise `Classes`. `problem_type` counts for the classes whose loss in
    transformers asks for it: classifiers of sequences, images, videos and sounds.

    Args:
        model: the model, or a PEFT model around it.
        outputs: (..., outputs), as `prediction_of` gives them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_bare(base):
        return Values()
    if isinstance(base, PreTrainedModel) and LOSS_MAPPING.get(base.loss_type) is ForSequenceClassificationLoss:
        if base.config.problem_type == "regression":
            return Values()
        if base.config.problem_type == "multi_label_classification":
            return Labels()
    return Values() if outputs.shape[-1] == 1 else Classes()


def prediction_of(output: Mapping[str, Any], model: nn.Module) -> torch.Tensor:
    """
    What a model's output predicts.

    Args:
        output: of its forward pass.
        model: for the message.

    Returns:
        `logits`; of a model that answers questions `start_logits` and `end_logits`, (batch, 2, seq); of one without a
        head `last_hidden_state`; of a dual encoder `text_embeds` and `image_embeds`, (batch, 2, size). Images, as
        values without an axis of outputs, (batch, values, 1): the
        `reconstruction` of masked ones, all `feature_maps` of a backbone.

    Raises:
        UnsupportedModelError: if there is none of them.
    """
    if "logits" in output:
        return output["logits"]
    if "start_logits" in output and "end_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], 1)
    if "last_hidden_state" in output:
        return output["last_hidden_state"]
    pair = [output[name] for name in ("text_embeds", "image_embeds") if name in output]
    if len(pair) == 2 and pair[0].shape == pair[1].shape:
        return torch.stack(pair, 1)
    if "reconstruction" in output:
        return output["reconstruction"].flatten(1)[..., None]
    if "feature_maps" in output:
        return torch.cat([features.flatten(1) for features in output["feature_maps"]], 1)[..., None]
    raise UnsupportedModelError(
        f"{type(model).__name__} gives {sorted(output)}; to be compared with another it needs `logits`, "
        "`start_logits` and `end_logits`, `last_hidden_state`, both embeds, `reconstruction` or `feature_maps`"
    )
