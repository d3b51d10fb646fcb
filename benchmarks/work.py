"""The work of the training benchmarks: a teacher, its data on the device, its measure of quality, and distillation."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reconstruction import images, read_tokens
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hawada_peft import DistillTrainer, GateTrainingArguments
from hawada_peft.errors import HawAdaError
from hawada_peft.recipes.readers import load_examples, windows_of
from hawada_peft.vanilla.loading import load_model

Batch = dict[str, torch.Tensor]

RATES = {"text": 1e-3, "image": 5e-4}
"""Learning rates of a recovery on all weights, where none is given."""

EVAL_EXAMPLES = {"text": 100, "image": 2000}


class Pool(Dataset):
    """
    Examples that lie on the device; a batch is one indexing.

    A DataLoader asks for the rows of a batch at once (`__getitems__`), and `whole` hands them on: no Python per row.

    Args:
        rows: (examples, tokens) of whole numbers, or images (examples, channels, height, width), which
            are mirrored at random.
        labels: (examples,) classes of images.
        seed: of the mirroring.
    """

    def __init__(self, rows: torch.Tensor, labels: torch.Tensor | None = None, seed: int = 0) -> None:
        self.rows, self.labels = rows, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.labelled(torch.as_tensor(indices))
        del batch["labels"]
        return batch

    def labelled(self, indices: torch.Tensor) -> Batch:
        """A batch with the labels: the tokens themselves, or classes."""
        there = indices.to(self.rows.device)
        if self.labels is None:
            tokens = self.rows[there].long()
            return {"input_ids": tokens, "labels": tokens}
        mirrored = (torch.rand(len(indices), generator=self.generator) < 0.5).to(there.device)
        pixels = self.rows[there]
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return {"pixel_values": pixels, "labels": self.labels[there]}


def kind_of(path: str) -> str:
    """`image` or `text`: what a file of `read_pool` holds."""
    return "image" if path.endswith(".npz") else "text"


def whole(batch: Batch) -> Batch:
    """The collator of a `Pool`: its batches are batches."""
    return batch


def read_pool(path: str, teacher: str, length: int, device: str) -> Pool:
    """
    Examples of a file: tokens (`.npy`, `.npy.xz`, one stream or rows), text (`.txt`, by the teacher's tokenizer), or
    images (`.npz` with `labels`, and `jpeg` and `offsets`, or `pixel_values`).

    Raises:
        HawAdaError: on another kind of file, or too little in it.
    """
    if path.endswith(".npz"):
        data = np.load(path)
        if "pixel_values" in data:
            pixels, labels = torch.from_numpy(data["pixel_values"]).float(), torch.from_numpy(data["labels"]).long()
        else:
            batches = images(path, len(data["labels"]), 256)
            pixels, labels = (torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))
        return Pool(pixels.to(device), labels.to(device))
    if path.endswith((".npy", ".npy.xz")):
        tokens = torch.from_numpy(read_tokens(path).astype(np.int32))
        rows = tokens if tokens.ndim == 2 else windows_of(tokens, length, path)
        return Pool(rows.int().to(device))
    examples = load_examples(Path(path), teacher, length=length)
    if "input_ids" not in examples:
        raise HawAdaError(f"{path} must hold tokens or text; images come as .npz with labels")
    return Pool(examples["input_ids"].int().to(device))


@dataclass
class Bench:
    """
    A teacher, its data and its measure of quality. Everything is read once and stays on the device.

    Args:
        teacher: a folder or model id.
        train, evaluation: files as in `read_pool`; without the latter quality cannot be measured.
        device: `cpu` or `cuda`.
        length, eval_length: tokens per window.
        batch_size: of training.
        eval_examples: held-out windows or images, from the start of the file; as in `EVAL_EXAMPLES` if left out.
    """

    teacher: str
    train: str
    evaluation: str | None = None
    device: str = "cpu"
    length: int = 256
    eval_length: int = 512
    batch_size: int = 16
    eval_examples: int | None = None
    model: PreTrainedModel = field(init=False)
    """The teacher itself, in float32; not to be changed."""

    def __post_init__(self) -> None:
        self.model = load_model(self.teacher, self.device, "float32").requires_grad_(False)
        self.train_pool = read_pool(self.train, self.teacher, self.length, self.device)
        self.kind = kind_of(self.train)
        self.held_out: list[Batch] = []
        if self.evaluation is not None:
            pool = read_pool(self.evaluation, self.teacher, self.eval_length, self.device)
            count = min(self.eval_examples or EVAL_EXAMPLES[self.kind], len(pool))
            name, rows = ("input_ids", 20) if pool.labels is None else ("pixel_values", 250)
            data = pool.rows[:count].long() if pool.labels is None else pool.rows[:count]
            labels = data if pool.labels is None else pool.labels[:count]
            parts = zip(data.split(rows), labels.split(rows), strict=True)
            self.held_out = [{name: inputs, "labels": classes} for inputs, classes in parts]
        self.expected = [logits.argmax(-1) for logits in self._logits(self.model)] if self.kind == "image" else []

    def load(self) -> PreTrainedModel:
        """A dense teacher of one's own, all parameters trainable."""
        return copy.deepcopy(self.model).requires_grad_(True)

    @torch.inference_mode()
    def _logits(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        for batch in self.held_out:
            yield model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity; or accuracy and agreement with the teacher, in percent."""
        model.eval()
        if self.kind == "text":
            losses = [
                functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).double()
                for logits, batch in zip(self._logits(model), self.held_out, strict=True)
            ]
            rows = torch.tensor([len(batch["labels"]) for batch in self.held_out], dtype=torch.float64)
            return {"perplexity": float(((torch.stack(losses).cpu() * rows).sum() / rows.sum()).exp())}
        classes = [logits.argmax(-1) for logits in self._logits(model)]
        pairs = {"accuracy": [batch["labels"] for batch in self.held_out], "agreement": self.expected}
        found = torch.cat(classes)
        return {name: 100 * float((found == torch.cat(right)).double().mean()) for name, right in pairs.items()}

    def pool(self, seed: int) -> Pool:
        """The training data, mirrored in the same way for every contestant of a seed."""
        return Pool(self.train_pool.rows, self.train_pool.labels, seed)

    def examples(self, count: int, seed: int, *, labels: bool = False) -> list[Batch]:
        """Training examples, in batches of the training's size; others for every seed."""
        picks = torch.randperm(len(self.train_pool), generator=torch.Generator().manual_seed(seed))[:count]
        batches = [self.pool(seed).labelled(part) for part in picks.split(self.batch_size)]
        return [{n: v for n, v in batch.items() if labels or n != "labels"} for batch in batches]

    def stream(self, seed: int) -> Iterator[Batch]:
        """Training batches with labels, endless."""
        pool, generator = self.pool(seed), torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(pool))
        while True:
            order = torch.randperm(len(pool), generator=generator)
            yield from (pool.labelled(part) for part in order[: len(order) // size * size].split(size))

    def arguments(self, folder: str, steps: int, rate: float, seed: int, **more: Any) -> GateTrainingArguments:
        """Of a training that writes and reports nothing, with a cosine unless told otherwise."""
        defaults: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": min(20, steps // 10)} | more
        return GateTrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=self.batch_size,
            seed=seed,
            data_seed=seed,
            bf16=self.device != "cpu",
            use_cpu=self.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it waits for the device at every step
            dataloader_pin_memory=False,  # the data is there already
            disable_tqdm=True,
            max_grad_norm=1.0,
            remove_unused_columns=False,
            **defaults,
        )

    def distil(
        self, student: PreTrainedModel, steps: int, rate: float | None, seed: int, optimizer: str = "args"
    ) -> None:
        """Recover a student on all its weights, in place; the data's order depends on the seed alone."""
        if steps <= 0:
            return
        student.requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = DistillTrainer(
                student,
                self.arguments(folder, steps, RATES[self.kind] if rate is None else rate, seed),
                teacher=self.model,
                train_dataset=self.pool(seed),
                data_collator=whole,
                optimizer=optimizer,
            )
            trainer.train()
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # its quality is measured without autocast


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which teacher, which data and how much of it."""
    parser.add_argument("--teacher", required=True, help="a folder or model id")
    parser.add_argument("--data", required=True, help=read_pool.__doc__)
    parser.add_argument("--device", default="cpu", help="of training and importance")
    parser.add_argument("--length", type=int, default=128, help="tokens of a training window")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=16, help="examples")
    parser.add_argument("--steps", type=int, default=50, help="of all training, recovery included")
