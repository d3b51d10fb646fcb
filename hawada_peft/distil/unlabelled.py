"""
What trainers that need no labels have in common: a loss for evaluation, and checkpoints that can be relied on.

Long because transformers asks one class for all of a training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import has_length

from ..errors import BadDataError, CheckpointError, DivergedError
from ..files.locking import held
from ..vanilla.batches import check_batch
from .checkpointing import embeddings_with_gradients
from .checkpoints import adapter_folder, check_complete, check_tensors, checkpoint_of, keeping_trainable
from .events import Events, Told
from .finite import check_finite
from .sharded import average_gradients, check_version, check_zero, keep_trained_whole


class UnlabelledTrainer(Trainer):
    """
    `transformers.Trainer` for a loss that a teacher gives.

    Evaluation has a loss for data without labels, and the model's config keeps its own `use_cache`, which `Trainer`
    switches off for good. A loss or a weight that becomes NaN or infinite ends the training at that step, before
    anything is saved. A checkpoint in which something is missing is not resumed. A folder has one training at a time.
    Data that the model cannot take is refused before the training.

    Args:
        model (`nn.Module`): with a transformers `config`.
        args (`TrainingArguments`): as in `Trainer`.
        kwargs: as in `Trainer`.
    """

    def __init__(self, model: Any, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        self._model_config = model.config
        self._use_cache: bool | None = getattr(model.config, "use_cache", None)
        self._step_loss: torch.Tensor | None = None
        super().__init__(model=model, args=args, **kwargs)
        self._whole: list[nn.Parameter] = []  # what is trained and not sharded, where the rest is
        if self.is_deepspeed_enabled:
            check_zero(self.accelerator)
        if self.is_fsdp_enabled:
            check_version(self.accelerator)
            if isinstance(model, PeftModel):
                self._whole = keep_trained_whole(self.accelerator, model)
        self._checked = False
        self.can_return_loss = True  # the teacher takes the place of labels
        self.add_callback(Events(**self._events()))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in `Trainer`; the config's `use_cache` is put back afterwards.

        Raises:
            BadDataError: as `check_data`.
            DivergedError: if the loss or a weight becomes NaN or infinite.
            CheckpointError: if the checkpoint to resume is not complete.
            HawAdaError: if another training writes to the output folder.
        """
        options = cast(dict[str, Any], self.args.gradient_checkpointing_kwargs or {})
        if resume_from_checkpoint:
            self._check_checkpoint(checkpoint_of(resume_from_checkpoint, self.args))
        reentrant = self.args.gradient_checkpointing and options.get("use_reentrant")
        with held(Path(str(self.args.output_dir))):
            self.check_data()
            if not resume_from_checkpoint:
                self._prepare()
            try:
                with embeddings_with_gradients(cast(nn.Module, self.model)) if reentrant else nullcontext():
                    return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._set_cache(self._use_cache)

    def _events(self) -> dict[str, Told]:
        """What is called at which moments of a training."""
        return {"on_pre_optimizer_step": self._on_update, "on_step_end": self._on_step_end}

    def _prepare(self) -> None:
        """Called before a training that is not resumed."""

    # ------------------------------------------------------- numbers that are none

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`; the losses of a step are added up, to be looked at once."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self._whole and self.accelerator.sync_gradients:
            average_gradients(self._whole, self.accelerator)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def _on_update(self, state: TrainerState, control: TrainerControl) -> None:
        """The loss of a step, and the weights that gave it, before the optimizer spreads what is wrong."""
        self._check_finite(state.global_step + 1)

    def _on_step_end(self, state: TrainerState, control: TrainerControl) -> None:
        """The weights that come of a step, where the next one does not look at them before somebody uses them."""
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            self._check_finite(state.global_step)

    def _check_finite(self, step: int) -> None:
        loss, self._step_loss = self._step_loss, None
        model: nn.Module = self.model  # type: ignore[assignment]  # never None here
        check_finite(model, loss, step, self.accelerator)

    # ---------------------------------------------------------------- checkpoints

    def _check_checkpoint(self, folder: Path) -> None:
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled) or self._whole:  # these name their files otherwise
            names = self.model.active_adapters if isinstance(self.model, PeftModel) else []
            check_complete(folder, self.args, [adapter_folder(folder, name) for name in names])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if isinstance(self.model, PeftModel):
            for name in self.model.active_adapters:
                check_tensors(adapter_folder(folder, name), self.model, name)
        if isinstance(self.model, PreTrainedModel) and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._load_renamed(folder)
            return
        with keeping_trainable(self.model), self._as_unsharded():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_renamed(self, folder: Path) -> None:
        """By `from_pretrained`: `Trainer` would not know the names under which some families are saved."""
        model = cast(PreTrainedModel, self.model)
        cls: Any = type(model)
        loaded, info = cls.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"the checkpoint lacks {missing[:4]} ({len(missing)} tensors in all)")
        model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        """As in `Trainer`, also of adapters that are not named "default"."""
        if not isinstance(self.model, PeftModel):
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            name = self.model.active_adapters[0]
            folder = adapter_folder(Path(self.state.best_model_checkpoint), name)
            check_tensors(folder, self.model, name)
            with keeping_trainable(self.model):
                self.model.load_adapter(str(folder), name, is_trainable=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As in `Trainer`; what is missing in a checkpoint is an error."""
        tied = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {missing[:4]} ({len(missing)} tensors in all)")
        super()._issue_warnings_after_load(load_result)

    def _data_sets(self) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
        """The argument that each set of data came by, the set, and what makes its batches."""
        yield "train_dataset", self.train_dataset, self.get_train_dataloader
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, data in evaluated.items():
            label = f"eval_dataset{f'[{name!r}]' if name else ''}"
            yield label, data, partial(self.get_eval_dataloader, cast(Any, data))

    def check_data(self) -> None:
        """
        Look once at the first batch to train on, and of each set to evaluate on; the random state is left as it was.
        Data without a length, which can perhaps be read only once, is not looked at.

        Raises:
            BadDataError: if there is none, or the model cannot take it.
        """
        if self._checked:
            return
        for name, data, loader in self._data_sets():
            if not isinstance(data, Dataset | Iterable | Sized | None):
                raise BadDataError(f"{name} must be a data set, got a {type(data).__name__}")
            if data is None or not has_length(data):
                continue
            if len(data) == 0:
                raise BadDataError(f"{name} holds no examples")
            with torch.random.fork_rng(devices=[]):  # data is drawn on the CPU
                try:
                    for batch in loader():
                        check_batch(cast(nn.Module, self.model), batch)
                        break
                except BadDataError as error:
                    raise BadDataError(f"{name}: {error}") from None
                except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:  # the collator's
                    raise BadDataError(
                        f"{name}: its examples cannot be put into one batch ({type(error).__name__}: {error}); they "
                        "must be mappings of the model's arguments, of one length, or have a `data_collator`"
                    ) from error
        self._checked = True

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in `Trainer`, whose `logging_nan_inf_filter` would leave losses out that are no numbers.

        Raises:
            BadDataError: if there are no examples.
            DivergedError: if the loss on one of them is NaN or infinite.
        """
        if has_length(dataloader) and len(dataloader) == 0:
            raise BadDataError("the evaluation data holds no examples")
        filtered, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = filtered
        loss = (output.metrics or {}).get(f"{kwargs.get('metric_key_prefix', 'eval')}_loss", 0.0)
        if not math.isfinite(loss):  # the same in every process
            raise DivergedError(
                f"the loss on the evaluation data is {loss}: it, or the model's weights, hold NaN or infinite values"
            )
        return output

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; the saved config has the model's own `use_cache`."""
        during = getattr(self._model_config, "use_cache", None)
        self._set_cache(self._use_cache)
        try:
            with self._as_unsharded():
                super().save_model(*args, **kwargs)
        finally:
            self._set_cache(during)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_unsharded():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_unsharded():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _as_unsharded(self) -> Iterator[None]:
        """All that is trained is whole in every process where only an adapter is: its checkpoints are those of one."""
        before = self.is_fsdp_enabled
        self.is_fsdp_enabled = before and not self._whole
        try:
            yield
        finally:
            self.is_fsdp_enabled = before

    # ----------------------------------------------------------------- evaluation

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
