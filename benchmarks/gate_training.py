"""
Do trained gates earn their steps? One-shot importance, trained gates and joint training, at equal data and cost.

Every contestant starts from the same examples, is sliced to the same shape, refitted by least squares on the same
calibration batches, and distilled on all weights for as many steps as are left: the steps that gates were trained for
are taken off the recovery's. Quality is measured on held-out data after each stage.

    python benchmarks/gate_training.py TEACHER TRAIN EVAL --shapes 12x4x976x4 6x2x816x4 --device cuda --out rows.jsonl
    python benchmarks/gate_training.py --table rows.jsonl

A shape is query heads x KV groups x FFN channels x layers. With --shard I/N only every N-th run is made, so that
several processes can share the work.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reconstruction import images, read_tokens, windows
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    TrainingArguments,
)

from hawada_peft import DistillTrainer, HawAdaConfig, HawAdaTrainer, Plan, Shape, init_gates, reconstruct

CONTESTANTS: dict[str, dict[str, Any]] = {
    "fisher": {"one_shot": True},
    "start": {"one_shot": True, "aimed": True},
    "closing": {"relaxation": "closing"},
    "straight_through": {"relaxation": "straight_through"},
    "sigmoid": {"relaxation": "sigmoid"},
    "hard_concrete": {"relaxation": "hard_concrete"},
    "joint": {"relaxation": "hard_concrete", "lora": True},
}
"""
One-shot: `fisher` ranks everything by one gradient, `start` is what `HawAdaTrainer` starts from (layers by dropping
them, the rest by importance without them). The others are trained for --gate-steps, `joint` for --joint-steps.
"""


class Windows(Dataset):
    """Windows of a token stream."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.length
        return {"input_ids": torch.tensor(self.tokens[start : start + self.length].astype(np.int64))}


class Flipped(Dataset):
    """Images, mirrored at random."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.pixels[index]
        return {"pixel_values": image.flip(-1) if torch.rand(()) < 0.5 else image}


class Bench:
    """A teacher, its data and its measure of quality."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.text = options.train.endswith((".npy", ".npy.xz"))
        if self.text:
            tokens, held_out = read_tokens(options.train), read_tokens(options.eval)
            self.data: Dataset = Windows(tokens, options.length)
            starts = np.arange(options.eval_examples) * options.length
            self.held_out = windows(held_out, starts, options.length, 16)
        else:
            pixels = torch.cat([batch["pixel_values"] for batch in images(options.train, 10**9, 64)])
            self.data = Flipped(pixels)
            self.held_out = images(options.eval, options.eval_examples, 250)
        self.teacher = self.load()
        self.expected = [logits.argmax(-1) for logits in self._logits(self.teacher)]

    def load(self) -> PreTrainedModel:
        auto = AutoModelForCausalLM if self.text else AutoModelForImageClassification
        model = auto.from_pretrained(self.options.teacher, dtype=torch.float32).to(self.device)
        return model.eval()

    @torch.inference_mode()
    def _logits(self, model: PreTrainedModel) -> Any:
        for batch in self.held_out:
            yield model(**{k: v.to(self.device) for k, v in batch.items() if k != "labels"}).logits.float()

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity; or accuracy and agreement with the teacher, in percent."""
        model.eval()
        losses, right, same, count = [], 0.0, 0.0, 0
        for logits, batch, expected in zip(self._logits(model), self.held_out, self.expected, strict=True):
            labels = batch["labels"].to(self.device)
            if self.text:
                flat = logits[:, :-1].flatten(0, 1)
                losses.append(functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum").item())
                count += labels[:, 1:].numel()
            else:
                right += (logits.argmax(-1) == labels).sum().item()
                same += (logits.argmax(-1) == expected).sum().item()
                count += len(labels)
        if self.text:
            return {"ppl": float(np.exp(sum(losses) / count))}
        return {"accuracy": 100 * right / count, "agreement": 100 * same / count}

    def examples(self, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Training examples, in batches of the training's size; others for every seed."""
        picks = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed))[:count]  # type: ignore[arg-type]
        rows = [self.data[int(pick)] for pick in picks]
        parts = [rows[i : i + self.options.batch_size] for i in range(0, len(rows), self.options.batch_size)]
        return [{k: torch.stack([row[k] for row in part]).to(self.device) for k in part[0]} for part in parts]

    def arguments(self, folder: str, steps: int, rate: float, seed: int, **more: Any) -> TrainingArguments:
        defaults = {"lr_scheduler_type": "cosine", "warmup_steps": min(20, steps // 10)} | more
        return TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=self.options.batch_size,
            seed=seed,
            data_seed=seed,
            bf16=self.device == "cuda",
            use_cpu=self.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_grad_norm=1.0,
            remove_unused_columns=False,
            **defaults,
        )

    def gated(self, name: str, shape: Shape, seed: int) -> tuple[PeftModel, int]:
        """A contestant under its plan, and the steps that it took."""
        options, how = self.options, CONTESTANTS[name]
        joint = bool(how.get("lora"))
        lora = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear")
        config = HawAdaConfig(lora=lora) if joint else HawAdaConfig()
        model = get_peft_model(self.load(), config)
        batches = self.examples(options.calibration, seed)
        aimed = how.get("aimed") or "relaxation" in how
        init_gates(model, batches, shape=shape if aimed else None)
        if how.get("one_shot"):
            model.apply_plan(model.plan(shape))  # type: ignore[operator]
            return model, 0
        steps = options.joint_steps if joint else options.gate_steps
        rate = options.lora_rate if joint else options.gate_rate
        with tempfile.TemporaryDirectory() as folder:
            HawAdaTrainer(
                model,
                self.arguments(folder, steps, rate, seed, lr_scheduler_type="constant", warmup_steps=0),
                shape=shape,
                relaxation=how["relaxation"],
                soft_fraction=options.soft_fraction,
                gate_learning_rate=options.gate_rate if joint else None,
                train_dataset=self.data,
            ).train()
        return model, steps

    def run(self, name: str, shape: Shape, seed: int) -> dict[str, Any]:
        """All stages of one contestant."""
        started = time.perf_counter()
        model, used = self.gated(name, shape, seed)
        plan: Plan = model.applied_plan()  # type: ignore[operator]
        small = model.merge_and_unload().to(self.device)  # type: ignore[operator]
        row: dict[str, Any] = {"contestant": name, "seed": seed, "layers": list(plan.layers), "steps": used}
        row["gate rate"] = self.options.gate_rate if used else None
        row["slice"] = self.quality(small)
        report = reconstruct(self.teacher, small, plan, self.examples(self.options.calibration, seed + 1000))
        row["reconstruction"] = [report.before, report.after, report.applied]
        row["least squares"] = self.quality(small)
        for steps in self.options.steps:
            student = copy.deepcopy(small).requires_grad_(True)
            with tempfile.TemporaryDirectory() as folder:
                DistillTrainer(
                    student,
                    self.arguments(folder, steps - used, self.options.rate, seed),
                    teacher=self.teacher,
                    train_dataset=self.data,
                ).train()
            row[f"KD {steps}"] = self.quality(student)
        return row | {"seconds": round(time.perf_counter() - started, 1)}


def table(path: str) -> None:
    """Mean and spread over seeds, per shape and contestant."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["shape"], row["contestant"]].append(row)
    stages = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    print("| shape | contestant | seeds | " + " | ".join(stages) + " | layers |")
    print("|---" * (4 + len(stages)) + "|")
    for (shape, name), found in sorted(
        groups.items(), key=lambda item: (item[0][0], list(CONTESTANTS).index(item[0][1]))
    ):
        cells = []
        for stage in stages:
            values = [list(row[stage].values()) for row in found if stage in row]
            columns = list(zip(*values, strict=True))
            text = [
                f"{statistics.mean(c):.2f}" + (f" ±{statistics.stdev(c):.2f}" if len(c) > 1 else "") for c in columns
            ]
            cells.append(" / ".join(text))
        kept = sorted({str(row["layers"]) for row in found})
        print(f"| {shape} | {name} | {len(found)} | " + " | ".join(cells) + f" | {'; '.join(kept)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("train", nargs="?", help="tokens (.npy, .npy.xz) or images (.npz with jpeg, offsets, labels)")
    parser.add_argument("eval", nargs="?")
    parser.add_argument("--table", help="print the table of such a file and leave")
    parser.add_argument("--shapes", nargs="+", default=[])
    parser.add_argument("--contestants", nargs="+", default=["fisher", "hard_concrete", "joint"], choices=CONTESTANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="*", default=[500, 2000], help="of recovery, gate steps included")
    parser.add_argument("--gate-steps", type=int, default=64)
    parser.add_argument("--joint-steps", type=int, default=64)
    parser.add_argument("--soft-fraction", type=float, default=0.75)
    parser.add_argument("--gate-rate", type=float, default=0.05)
    parser.add_argument("--rate", type=float, default=1e-3, help="of the recovery")
    parser.add_argument("--lora-rate", type=float, default=2e-3)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=64, help="examples")
    parser.add_argument("--eval-examples", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.table:
        table(options.table)
        return
    if not (options.teacher and options.train and options.eval and options.shapes):
        parser.error("teacher, train, eval and --shapes are needed")
    warnings.simplefilter("ignore", FutureWarning)
    shard, shards = map(int, options.shard.split("/"))
    layers = AutoConfig.from_pretrained(options.teacher).num_hidden_layers
    runs = list(itertools.product(options.seeds, options.shapes, options.contestants))[shard::shards]
    if not runs:
        return
    bench = Bench(options)
    print(f"dense: {layers} layers, {bench.quality(bench.teacher)}", flush=True)
    for seed, text, name in runs:
        heads, groups, ffn, depth = map(int, text.split("x"))
        row = {"shape": text} | bench.run(name, Shape(heads, groups, ffn, depth), seed)
        print(json.dumps(row), flush=True)
        if options.out:
            with Path(options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
