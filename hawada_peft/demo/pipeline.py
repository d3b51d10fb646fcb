"""The demo from end to end: teacher, gates, adapter, and a slim model in another process."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import default_data_collator

from ..config import HawAdaConfig
from ..errors import UnsettledTimingWarning
from ..files.atomic import write_text
from ..progress import Progress, progress_bar
from ..search.budgeted import find_plan
from ..training.start import init_gates
from ..training.trainer import HawAdaTrainer
from .data import Data, stack
from .measure import logits_of, one_thread
from .table import Row
from .tasks import SEARCH_FILE, TASKS, Task, Work
from .teachers import SEED, no_file_bars, train, train_teacher, training_arguments

logger = logging.getLogger(__name__)

CALIBRATION_BATCH = 8
"""Examples per batch of the calibration."""

SOFT_FRACTION = 0.2
"""Of the gates' training; short, because in so few steps the ranking of `init_gates` is hard to improve on."""

SHOWN = 256
"""Training examples that are left beside the teacher."""

MARKER = ".hawada-demo"
"""In every folder that the demo makes, so that the next run knows what it may replace."""


def run_demo(output_dir: str | Path, quick: bool = False, *, progress: Progress | None = None) -> list[Row]:
    """
    Train two small models, slim them, and measure what came of it.

    Args:
        output_dir: gets a folder per model with `teacher`, `adapter` and `slim`; those of an earlier run are replaced.
        quick: much shorter trainings, worse teachers.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        Three rows per model: dense, masked, slim.

    Raises:
        FileExistsError: if such a folder exists that is not of an earlier run.
        subprocess.CalledProcessError: if the exporting process fails; its messages are on stderr.
    """
    output_dir = Path(output_dir)
    clear(output_dir)
    with one_thread():
        for task in TASKS.values():
            train_task(task, task.quick if quick else task.full, output_dir / task.name, progress)
    return export(output_dir, list(TASKS), quick=quick)


def clear(output_dir: Path) -> None:
    """Remove what an earlier run left, and refuse to touch anything else."""
    present = [output_dir / name for name in TASKS if (output_dir / name).exists()]
    foreign = [str(folder) for folder in present if not (folder / MARKER).exists()]
    if foreign:
        raise FileExistsError(f"{', '.join(foreign)} is not from an earlier demo; choose another output folder")
    for folder in present:
        shutil.rmtree(folder)


def train_task(task: Task, work: Work, folder: Path, progress: Progress | None = None) -> None:
    """
    Train a teacher, find the shape for the budget, then train gates on the saved teacher.

    Args:
        task: which model.
        work: how long.
        folder: gets `teacher`, `adapter`, `search.json`, some of the examples in `examples.safetensors` and the
            held-out ones in `test.safetensors`, as commands take them, and in `held_out.safetensors` with the logits
            of the masked model on them.
        progress: makes progress bars; none are shown if left out.
    """
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    data = task.load()
    # For `hawada plan`, `slim` and `evaluate` on the same teacher.
    inputs = {name: tensor for name, tensor in stack(data.train[:SHOWN]).items() if name != "labels"}
    save_file(inputs, folder / "examples.safetensors")
    save_file(stack(data.held_out), folder / "test.safetensors")
    train_teacher(task, data, work.teacher, folder / "teacher", progress)
    with no_file_bars():
        base = task.auto_class.from_pretrained(folder / "teacher")
    model = get_peft_model(base, HawAdaConfig())
    batches = calibration_batches(data, work.calibration)
    watched = progress_bar(progress, iterable=batches, desc=f"{task.title}: importance", unit="batch")
    init_gates(model, watched, criterion="fisher")
    with warnings.catch_warnings():
        # A few rounds on a machine that may be busy: the table that is printed shows what came of it.
        warnings.simplefilter("ignore", UnsettledTimingWarning)
        found = find_plan(
            model,
            task.budget,
            batches[: work.evaluation],
            refit=False,  # nor is the slim model: the table shows that it computes what the masked one does
            effort=work.search,
            progress=progress,
        )
    logger.info("%s: %s", task.title, found)
    write_text(folder / SEARCH_FILE, json.dumps(found.figures()))
    trainer = HawAdaTrainer(
        model=model,
        args=training_arguments(work.gates, folder, soft_fraction=SOFT_FRACTION),
        train_dataset=data.train,
        data_collator=default_data_collator,
        shape=found.best.shape,
    )
    train(trainer, f"{task.title}: gates", progress)
    model.save_pretrained(str(folder / "adapter"))
    held_out = stack(data.held_out)
    inputs = {f"inputs.{name}": tensor for name, tensor in held_out.items()}
    save_file(inputs | {"logits": logits_of(model, held_out)}, folder / "held_out.safetensors")
    logger.info("%s: adapter in %s", task.title, folder / "adapter")


def calibration_batches(data: Data, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of training examples, drawn at random but always the same ones."""
    picks = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(SEED))
    return [stack([data.train[pick] for pick in part]) for part in picks.split(CALIBRATION_BATCH)[:count]]


def export(output_dir: Path, tasks: Sequence[str], *, quick: bool) -> list[Row]:
    """Slim, reload and measure the tasks' adapters in a new process, which has nothing but the saved folders."""
    python = [sys.executable, "-W", "ignore::FutureWarning"]  # of one library to another, as in this process
    command = [*python, "-m", f"{__package__}.export", str(output_dir), *tasks, *(["--quick"] if quick else [])]
    subprocess.run(command, check=True)
    return [Row(**row) for task in tasks for row in json.loads((output_dir / task / "rows.json").read_text())]
