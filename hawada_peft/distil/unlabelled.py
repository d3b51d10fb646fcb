"""What trainers that need no labels have in common."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments


class UnlabelledTrainer(Trainer):
    """
    `transformers.Trainer` for a loss that a teacher gives: evaluation has one for data without labels, and the model's
    config keeps its own `use_cache`, which `Trainer` switches off for good.

    Args:
        model (`nn.Module`): with a transformers `config`.
        args (`TrainingArguments`): as in `Trainer`.
        kwargs: as in `Trainer`.
    """

    def __init__(self, model: Any, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        self._model_config = model.config
        self._use_cache: bool | None = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        self.can_return_loss = True  # the teacher takes the place of labels

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the config's `use_cache` is put back afterwards."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._set_cache(self._use_cache)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; the saved config has the model's own `use_cache`."""
        during = getattr(self._model_config, "use_cache", None)
        self._set_cache(self._use_cache)
        try:
            super().save_model(*args, **kwargs)
        finally:
            self._set_cache(during)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`, with a loss also for data without labels."""
        names = self.label_names
        self.label_names = names if all(inputs.get(name) is not None for name in names) else []
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.label_names = names

    def _set_cache(self, use_cache: bool | None) -> None:
        if self._use_cache is not None:
            self._model_config.use_cache = use_cache
