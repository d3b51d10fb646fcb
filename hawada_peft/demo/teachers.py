"""Trains the demo's teachers, and saves them as anybody would."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from ..progress import Progress, progress_bar
from ..training.arguments import GateTrainingArguments
from .data import Data
from .tasks import Schedule, Task

logger = logging.getLogger(__name__)

SEED = 0


class NamedProgress(TrainerCallback):
    """One progress bar that says what is trained; unlike `ProgressCallback` it leaves the logs alone."""

    def __init__(self, title: str, progress: Progress | None) -> None:
        self.title, self.progress = title, progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = progress_bar(self.progress, total=state.max_steps, desc=self.title, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move it on."""
        self.bar.update(1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it."""
        self.bar.close()


def training_arguments(schedule: Schedule, folder: Path, **more: Any) -> GateTrainingArguments:
    """The arguments that both trainings of the demo share. Nothing is written to the folder."""
    return GateTrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.steps // 10,
        use_cpu=True,
        seed=SEED,
        report_to="none",
        save_strategy="no",
        logging_steps=max(1, schedule.steps // 20),  # printed nowhere: for the history of the gates
        dataloader_pin_memory=False,
        **more,
    )


def train(trainer: Trainer, title: str, progress: Progress | None) -> None:
    """Train under a named progress bar, if any."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NamedProgress(title, progress))
    trainer.train()


def train_teacher(task: Task, data: Data, schedule: Schedule, folder: Path, progress: Progress | None = None) -> None:
    """
    Train a task's model from scratch and save it, with its tokenizer, as an ordinary folder.

    Args:
        task: which model.
        data: its data.
        schedule: how long.
        folder: where to save it.
        progress: makes progress bars; none are shown if left out.
    """
    set_seed(SEED)
    model = task.build()
    trainer = Trainer(
        model=model,
        args=training_arguments(schedule, folder),
        train_dataset=data.train,
        data_collator=default_data_collator,
    )
    train(trainer, f"{task.title}: teacher", progress)
    with no_file_bars():
        model.save_pretrained(folder)
    if data.processor is not None:
        data.processor.save_pretrained(folder)
    logger.info("%s: teacher of %d parameters in %s", task.title, model.num_parameters(), folder)


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off: these models are read and written in milliseconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
