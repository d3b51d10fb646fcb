"""
A sentence encoder slimmed end to end: how far its embeddings stay the dense model's, and how fast it is.

    python benchmarks/real_models.py all-minilm-l6-v2 DIR/minilm
    OMP_NUM_THREADS=1 python benchmarks/encoder.py DIR/minilm --train text_train.npy.xz --eval text_eval.npy \\
        --text-tokenizer TEACHER --out DIR/slim

Search, closing, least squares and recovery are the product's, as a user calls them. The model has no head: what is
distilled are the last hidden states, token by token (squared error), and not the pooled embeddings. What is reported
is what a user compares: the cosine of mean-pooled, normalised embeddings of held-out sentences, of the folder reloaded
by `AutoModel`. Times are of the processor; give one thread.

Training examples are one to `--most` sentences in a row, the held-out ones single sentences.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from document import circumstances, replace_section
from peft import get_peft_model
from reconstruction import read_tokens
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from hawada_peft import Effort, HawAdaConfig, LatencyBudget, Plan, Race, find_plan, recover
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.measuring import measure_many

SHORTEST, LONGEST = 30, 400
"""Characters of a sentence."""

Examples = list[dict[str, Any]]


def sentences_of(path: str, tokenizer: str, tokens: int) -> Iterator[list[str]]:
    """The sentences of each document at the head of a file of tokens, whose documents are framed by ids 0 and 1."""
    decode, stream = AutoTokenizer.from_pretrained(tokenizer), np.asarray(read_tokens(path)).reshape(-1)[:tokens]
    for document in np.split(stream, np.flatnonzero(stream <= 1)):
        text = " ".join(str(decode.decode(document, skip_special_tokens=True)).split())
        parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text)]
        yield [part for part in parts if SHORTEST <= len(part) <= LONGEST]


def passages(documents: Sequence[list[str]], count: int, most: int, rng: random.Random) -> list[str]:
    """One to `most` sentences in a row, drawn at random without beginning twice at the same one."""
    starts = [(index, place) for index, part in enumerate(documents) for place in range(len(part))]
    rng.shuffle(starts)
    found = (" ".join(documents[index][place : place + rng.randint(1, most)]) for index, place in starts)
    return list(dict.fromkeys(found))[:count]


def embeddings(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over the tokens of the last hidden states, normalised: (sentences, hidden)."""
    rows, training = [], model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(-1)
            states = model(**batch).last_hidden_state
            rows.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    model.train(training)
    return torch.cat(rows)


def agreement(dense: torch.Tensor, slim: torch.Tensor) -> dict[str, float]:
    """Of embeddings (sentences, hidden): cosines, and whether the same sentences are near each other."""
    cosines, near = (dense * slim).sum(-1), [each @ each.T for each in (dense, slim)]
    pairs = [each[tuple(torch.triu_indices(len(each), len(each), 1))] for each in near]
    ranks = torch.stack([each.argsort().argsort().double() for each in pairs])
    for each in near:
        each.fill_diagonal_(-2)
    return {
        "cosine": cosines.mean().item(),
        "cosine_5_percent": cosines.quantile(0.05).item(),
        "cosine_least": cosines.min().item(),
        "rank_correlation": torch.corrcoef(ranks)[0, 1].item(),
        "same_nearest": (near[0].argmax(-1) == near[1].argmax(-1)).float().mean().item(),
    }


class Start(TrainerCallback):
    """The agreement before the first step of the recovery: cut and refitted."""

    def __init__(self, dense: torch.Tensor, held: Sequence[dict[str, torch.Tensor]]) -> None:
        self.dense, self.held = dense, held
        self.found: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = agreement(self.dense, embeddings(kwargs["model"], self.held))


LINES = {"closed": "closed gates", "refitted": "cut, refitted by least squares", "recovered": "recovered, reloaded"}


def section(row: dict[str, Any]) -> str:
    """The figures as Markdown."""
    searched = f"Search {row['search_s']:.0f} s" if row["search_s"] > 1 else "Search in an earlier run"
    head = (
        f"{row['device']} ({row['date']}; {row['versions']}): `{row['command']}`\n\n"
        f"Asked for {row['speedup']}x at forward {row['regime']}, processor time. Dense {row['dense_ms']:.0f} ms, "
        f"slim, reloaded by `AutoModel`, {row['slim_ms']:.0f} ms, timed in turns: **{row['measured']:.2f}x**. "
        f"{row['shape']}; {row['parameters']:,} of {row['dense_parameters']:,} parameters. {searched}, recovery "
        f"({row['steps']} steps of {row['batch']} examples of {row['length']} tokens at most, dropout "
        f"{'on' if row['dropout'] else 'off'}) {row['recovery_s']:.0f} s of processor time.\n\n"
        f"| {row['held_out']} held-out sentences | mean cosine | 5 % quantile | least | rank correlation of pairs "
        "| same nearest sentence |\n|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {words} | {found['cosine']:.4f} | {found['cosine_5_percent']:.4f} | {found['cosine_least']:.4f} "
        f"| {found['rank_correlation']:.4f} | {found['same_nearest']:.1%} |"
        for name, words in LINES.items()
        for found in [row[name]]
    ]
    return head + "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    rng = random.Random(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    base = AutoModel.from_pretrained(options.teacher, dtype=torch.float32).eval()

    def read(path: str, tokens: int, count: int, most: int) -> Examples:
        texts = passages(list(sentences_of(path, options.text_tokenizer, tokens)), count, most, rng)
        coded = [tokenizer(text, truncation=True, max_length=options.length) for text in texts]
        return [{name: each[name] for name in ("input_ids", "attention_mask")} for each in coded]

    collate = DataCollatorWithPadding(tokenizer)

    def batches(examples: Examples) -> list[dict[str, torch.Tensor]]:
        size = options.batch
        return [dict(collate(examples[start : start + size])) for start in range(0, len(examples), size)]

    wanted = options.steps * options.batch
    train = read(options.train, options.tokens, wanted + options.calibration, options.most)
    held = batches(read(options.eval, options.tokens, options.held_out, 1))
    calibration, train = batches(train[: options.calibration]), train[options.calibration :]
    if len(train) < wanted:
        print(f"{len(train)} passages for {wanted}: some are seen again")
    dense = embeddings(base, held)

    effort = Effort.quick(clock=Clock(time.thread_time), cache=False, max_seconds=6.0, candidates=3, instances=3)
    budget = LatencyBudget(speedup=options.speedup, batch_size=options.rows, seq_len=options.seq_len)
    model = get_peft_model(base, HawAdaConfig())
    begun = time.process_time()
    if options.plan:
        plan = Plan.from_dict(json.loads(options.plan.read_text(encoding="utf-8"))["plan"])
    else:
        plan = find_plan(model, budget, calibration, effort=effort).plan
    row: dict[str, Any] = {"search_s": time.process_time() - begun}
    print(f"{plan}: searched for {row['search_s']:.0f} s", flush=True)
    model.apply_plan(plan)
    row["closed"] = agreement(dense, embeddings(model, held))

    start = Start(dense, held)
    args = TrainingArguments(
        f"{options.out}-training",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=True,
        bf16=options.bf16,
        train_sampling_strategy="group_by_length",
        disable_tqdm=True,
    )
    begun = time.process_time()
    slimmed = recover(
        model,
        args,
        train_dataset=train,
        data_collator=collate,
        calibration=calibration,
        optimizer=options.optimizer,
        dropout=options.dropout,
        race=Race(budget=budget, effort=effort) if options.race else False,
        callbacks=[start],
    )
    row |= {"recovery_s": time.process_time() - begun, "refitted": start.found}
    slimmed = slimmed.save(options.out, processor=tokenizer)
    slim = AutoModel.from_pretrained(options.out, dtype=torch.float32).eval()
    row["recovered"] = agreement(dense, embeddings(slim, held))

    careful = Effort(clock=Clock(time.thread_time), max_seconds=options.timing_seconds)
    timings = measure_many(
        {"dense": base, "slim": slim},
        budget.regime(generates=False, dtype=torch.float32, device="cpu"),
        effort=careful,
    )
    dense_ms, slim_ms = (timings[name].median_ms for name in ("dense", "slim"))
    return (
        row
        | circumstances("cpu")
        | {
            "speedup": options.speedup,
            "regime": f"{options.rows}x{options.seq_len}, float32",
            "dense_ms": dense_ms,
            "slim_ms": slim_ms,
            "measured": dense_ms / slim_ms,
            "shape": str(plan),
            "dropout": options.dropout,
            "parameters": slim.num_parameters(),
            "dense_parameters": base.num_parameters(),
            "steps": options.steps,
            "batch": options.batch,
            "length": options.length,
            "held_out": len(dense),
            "max_difference": slimmed.verification.max_difference if slimmed.verification else None,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder with an encoder and its tokenizer")
    parser.add_argument("--train", required=True, help="tokens of text, .npy or .npy.xz")
    parser.add_argument("--eval", required=True, help="held-out ones")
    parser.add_argument("--text-tokenizer", required=True, help="of these tokens: a folder")
    parser.add_argument("--out", required=True, help="the new folder")
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--rows", type=int, default=8, help="of the timed regime")
    parser.add_argument("--seq-len", type=int, default=128, help="of the timed regime")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example at most")
    parser.add_argument("--most", type=int, default=3, help="sentences of a training example at most")
    parser.add_argument("--bf16", action="store_true", help="recover under autocast to bfloat16")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--optimizer", choices=("auto", "args", "muon"), default="auto", help="as of `recover`")
    parser.add_argument("--calibration", type=int, default=256, help="examples")
    parser.add_argument("--held-out", type=int, default=500, help="sentences")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each file that are read")
    parser.add_argument("--timing-seconds", type=float, default=40.0, help="of the models in turns, at the end")
    parser.add_argument("--plan", type=Path, help="a hawada_report.json, whose plan is taken instead of a search")
    parser.add_argument("--race", action="store_true", help="let other plans race against it")
    parser.add_argument("--dropout", action="store_true", help="recover with the teacher's dropout on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="whose section `encoder` is written")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    row = run(options)
    print(json.dumps(row, indent=1))
    print(section(row))
    if options.page:
        replace_section(options.page, "encoder", section(row))


if __name__ == "__main__":
    main()
