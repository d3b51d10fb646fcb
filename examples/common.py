"""What the scripts share: options, rows of a dataset, training arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import HfArgumentParser

from hawada_peft import GateTrainingArguments, LatencyBudget


@dataclass
class Arguments:
    output: str = field(metadata={"help": "a new folder: gets `adapter` and `slim`"})
    model: str | None = field(default=None, metadata={"help": "model id or folder"})
    dataset: str | None = field(default=None, metadata={"help": "dataset id or folder"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    split: str = field(default="train", metadata={"help": "the split to train on"})
    eval_split: str | None = field(default=None, metadata={"help": "the split held out; a part of SPLIT if left out"})
    streaming: bool = field(default=False, metadata={"help": "read the dataset while training"})
    held_out: int = field(default=256, metadata={"help": "examples that quality is told on"})
    calibration: int = field(default=128, metadata={"help": "examples for the least squares at the merge"})
    speedup: float = field(default=1.5, metadata={"help": "times as fast as the dense model"})
    mode: str | None = field(default=None, metadata={"help": "what is to be fast: forward, prefill or decode"})
    batch_size: int = field(default=1, metadata={"help": "examples per call that is to be fast"})
    backend: str = field(default="eager", metadata={"help": "how it is called: eager, compile or cuda_graph"})
    dtype: str = field(default="float32", metadata={"help": "of the slim model; bfloat16 trains in mixed precision"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu"})
    steps: int = field(default=200, metadata={"help": "training steps of the gates"})
    learning_rate: float = field(default=0.05, metadata={"help": "of the gates"})
    recover_steps: int = field(default=500, metadata={"help": "training steps of the slim model; 0 for none"})
    recover_learning_rate: float = field(default=5e-5, metadata={"help": "of the slim model"})
    train_batch_size: int = field(default=8, metadata={"help": "examples per training step"})
    push_to_hub: str | None = field(default=None, metadata={"help": "upload the slim model there: NAME/MODEL"})
    tiny: bool = field(
        default=False, metadata={"help": "make what is not given of model and data, in seconds; search briefly"}
    )


A = TypeVar("A", bound=Arguments)


def parse(kind: type[A], description: str | None, tiny: dict[str, Any]) -> A:
    """The options of the command line; with `--tiny` other defaults."""
    parser = HfArgumentParser(kind, description=description and description.split("\n\n")[0])
    if "--tiny" in sys.argv:
        parser.set_defaults(**tiny)
    (args,) = parser.parse_args_into_dataclasses()
    if not args.tiny and (args.model is None or args.dataset is None):
        parser.error("give --model and --dataset, or --tiny")
    if any(Path(args.output).glob("*")):
        parser.error(f"{args.output} holds something: give another --output")
    return args


def load_rows(args: Arguments, prepare: Callable[[Any], Any]) -> tuple[Any, Any]:
    """
    Examples to train on, and examples held out: a dataset of the Hub, or a folder of parquet, json, csv or pictures.

    `prepare` makes examples of the rows, and is given a `Dataset`, or with `--streaming` an `IterableDataset`.
    """
    from datasets import load_dataset

    def examples(split: str) -> Any:
        return prepare(load_dataset(args.dataset, args.dataset_config, split=split, streaming=args.streaming))

    data = examples(args.split)
    if args.eval_split is None:
        return data.skip(args.held_out).shuffle(seed=0), data.take(args.held_out)
    return data.shuffle(seed=0), examples(args.eval_split).take(args.held_out)


def batches_of(rows: Iterable[Any], count: int, size: int, collate: Callable[[list[Any]], Any]) -> list[Any]:
    """The first `count` rows, in batches of at most `size`."""
    first = list(islice(rows, count))
    if not first:
        raise ValueError("no examples are left: the dataset holds less than --held-out, or than one --seq-len of text")
    return [collate(first[start : start + size]) for start in range(0, len(first), size)]


def budget_of(args: Arguments, seq_len: int | None = None) -> LatencyBudget:
    """What is asked for: so many times as fast, in these calls."""
    return LatencyBudget(
        speedup=args.speedup,
        batch_size=args.batch_size,
        seq_len=seq_len,
        mode=args.mode,
        backend=args.backend,
        dtype=args.dtype,
    )


def training_arguments(
    args: Arguments, name: str, steps: int, learning_rate: float, **more: Any
) -> GateTrainingArguments:
    """As every trainer takes them; nothing is saved but what the scripts save."""
    return GateTrainingArguments(
        f"{args.output}/{name}",
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=args.train_batch_size,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        dataloader_pin_memory=args.device != "cpu",
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        calibration_examples=16 if args.tiny else 64,
        **more,
    )
