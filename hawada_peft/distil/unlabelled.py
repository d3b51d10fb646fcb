"""What trainers that need no labels have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from ..errors import BadDataError
from ..vanilla.batches import check_batch


class UnlabelledTrainer(Trainer):
    """
    `transformers.Trainer` for a loss that a teacher gives: evaluation has one for data without labels, and the model's
    config keeps its own `use_cache`, which `Trainer` switches off for good. Data that the model cannot take is refused
    before the training.

    Args:
        model (`nn.Module`): with a transformers `config`.
        args (`TrainingArguments`): as in `Trainer`.
        kwargs: as in `Trainer`.
    """

    def __init__(self, model: Any, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        self._model_config = model.config
        self._use_cache: bool | None = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        self._checked = False
        self.can_return_loss = True  # the teacher takes the place of labels

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        As in `Trainer`; the config's `use_cache` is put back afterwards.

        Raises:
            BadDataError: as `check_data`.
        """
        self.check_data()
        options = cast(dict[str, Any], self.args.gradient_checkpointing_kwargs or {})
        reentrant = self.args.gradient_checkpointing and options.get("use_reentrant")
        try:
            with _embeddings_with_gradients(cast(nn.Module, self.model)) if reentrant else nullcontext():
                return super().train(*args, **kwargs)
        finally:
            self._set_cache(self._use_cache)

    def check_data(self) -> None:
        """
        Look once at the first batch to train on, and of each set to evaluate on; the random state is left as it was.
        Data without a length, which can perhaps be read only once, is not looked at.

        Raises:
            BadDataError: if there is none, or the model cannot take it.
        """
        if self._checked:
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        found = {"train_dataset": (self.train_dataset, self.get_train_dataloader)} | {
            f"eval_dataset{f'[{name!r}]' if name else ''}": (data, lambda data=data: self.get_eval_dataloader(data))
            for name, data in evaluated.items()
        }
        for name, (data, loader) in found.items():
            if data is None or not has_length(data):
                continue
            if len(data) == 0:
                raise BadDataError(f"{name} holds no examples")
            with torch.random.fork_rng(devices=[]):  # data is drawn on the CPU
                for batch in loader():
                    try:
                        check_batch(cast(nn.Module, self.model), batch)
                    except BadDataError as error:
                        raise BadDataError(f"{name}: {error}") from None
                    break
        self._checked = True

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in `Trainer`.

        Raises:
            BadDataError: if there are no examples.
        """
        if has_length(dataloader) and len(dataloader) == 0:
            raise BadDataError("the evaluation data holds no examples")
        return super().evaluation_loop(dataloader, *args, **kwargs)

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


@contextmanager
def _embeddings_with_gradients(model: nn.Module) -> Iterator[None]:
    """
    Embeddings whose outputs require gradients, as reentrant gradient checkpointing asks of what goes into a layer: it
    passes nothing back through layers whose input does not, and all below the first trained weight is frozen.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        yield
        return
    hook = base.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
