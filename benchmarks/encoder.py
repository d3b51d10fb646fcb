"""
A sentence encoder slimmed end to end: how far its embeddings stay the dense model's, and how fast it is.

    python benchmarks/real_models.py all-minilm-l6-v2 DIR/minilm
    OMP_NUM_THREADS=1 python benchmarks/encoder.py run DIR/minilm --train text_train.npy.xz --eval text_eval.npy \\
        --text-tokenizer TEACHER --out DIR/slim

Search, closing, least squares and recovery are the product's, as a user calls them. The model has no head: what is
distilled are the last hidden states, token by token (squared error), its mean-pooled embeddings
(`--embedding-weight`), or both. What is reported is what a user compares: the cosine of mean-pooled, normalised
embeddings of held-out sentences, of the folder reloaded by `AutoModel`. Latency is that of one CPU core, by the time
of the processor; give one thread.

Training examples are one to `--most` sentences in a row, some (`--crops`) cut at words drawn at random, so that hardly
two are the same; held out are single sentences. Runs are chosen among by sentences of other documents of the
training text (`validated`), the last ones, which are not trained on.

On a GPU, of a shape that is known, for as long as there is time; a run whose row is there is not made again:

    python benchmarks/encoder.py run DIR/minilm --train text_train.npy.xz --eval text_eval.npy \\
        --text-tokenizer TEACHER --out DIR/slim --device cuda --bf16 --layers 6 --ffn 640 --no-refit \\
        --embedding-weight 1 --states-weight 0 --steps 5000 --batch 256 --crops 0.5 --rate 1e-3 \\
        --until SECOND --rows rows.jsonl --name NAME
    python benchmarks/encoder.py table rows.jsonl

The rate falls as a cosine over the steps, or over the seconds that are left if they end first: a run that `--until`
shortens is a whole one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from document import circumstances, replace_section
from encoder_text import Example, Frame, Sentences, sentences_of
from peft import get_peft_model
from rows import append_row, read_rows
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments

from hawada_peft import Effort, HawAdaConfig, LatencyBudget, Plan, Race, Shape, find_plan, init_gates, recover
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.measuring import measure_many
from hawada_peft.vanilla.batches import on_device

PARTS = 50
"""One in so many documents of the training text is not trained on: the last ones."""

RESERVED = 15.0
"""Seconds that are kept for what comes after the training and is not the timing."""


def embeddings(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over the tokens of the last hidden states, normalised: (sentences, hidden)."""
    rows, training = [], model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            there = on_device(batch, next(model.parameters()).device)
            mask = there["attention_mask"].unsqueeze(-1)
            states = model(**there).last_hidden_state.float()
            rows.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
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


class Cosine(TrainerCallback):
    """
    A rate that rises over a twentieth of the training and then falls to nothing as a cosine, over its steps or its
    seconds, whichever end first; the training ends with it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun, self.steps = seconds, 0.0, 0

    def part(self, state: Any) -> float:
        """Of the training that is behind."""
        return max(state.global_step / state.max_steps, (time.monotonic() - self.begun) / self.seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        part = min(1.0, self.part(state))
        rate = min(1.0, 20 * part + 20 / state.max_steps) * (1 + math.cos(math.pi * part)) / 2
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = rate * group["initial_lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        control.should_training_stop |= self.part(state) >= 1


LINES = {"closed": "closed gates", "refitted": "cut{how}", "recovered": "recovered, reloaded"}


def section(row: dict[str, Any]) -> str:
    """The figures of one run as Markdown."""
    searched = f"Search {row['search_s']:.0f} s" if row["search_s"] > 1 else "No search"
    head = (
        f"{row['device']} ({row['date']}; {row['versions']}): `{row['command']}`\n\n"
        f"Asked for {row['speedup']}x at forward {row['regime']}, processor time of {row['timed_on']}. Dense "
        f"{row['dense_ms']:.0f} ms, slim, reloaded by `AutoModel`, {row['slim_ms']:.0f} ms, timed in turns: "
        f"**{row['measured']:.2f}x**. {row['shape']}; {row['parameters']:,} of {row['dense_parameters']:,} "
        f"parameters. {searched}, recovery ({row['steps']} steps of {row['batch']} examples of {row['length']} tokens "
        f"at most, dropout {'on' if row['dropout'] else 'off'}) {row['recovery_s']:.0f} s.\n\n"
        f"| {row['held_out']} held-out sentences | mean cosine | 5 % quantile | least | rank correlation of pairs "
        "| same nearest sentence |\n|---|---|---|---|---|---|\n"
    )
    how = ", refitted by least squares" if row["refit"] else ""
    return head + "\n".join(f"| {words.format(how=how)} | {cells(row[name])} |" for name, words in LINES.items())


def cells(found: dict[str, float]) -> str:
    """What `agreement` found, as cells of a table."""
    numbers = [f"{found[name]:.4f}" for name in ("cosine", "cosine_5_percent", "cosine_least", "rank_correlation")]
    return " | ".join([*numbers, f"{found['same_nearest']:.1%}"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Many runs as Markdown, the one to choose first."""
    columns = (
        "layers, FFN | measured | loss | rate | steps x batch | examples (distinct) | seconds | validated | cosine "
        "| 5 % quantile | least | rank correlation | same nearest"
    )
    lines = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    for row in sorted(rows, key=lambda row: -row.get("validated", {}).get("cosine", 0.0)):
        validated = f"{row['validated']['cosine']:.4f}" if "validated" in row else ""
        parts = [f"{row['states_weight']:g} states"] * (row["states_weight"] > 0)
        parts += [f"{row['embedding_weight']:g} embeddings"] * (row["embedding_weight"] > 0)
        lines.append(
            f"| {row['layers']}, {row['ffn']} | {row['measured']:.2f}x | {' + '.join(parts)} | {row['rate']:g} "
            f"| {row['steps']} x {row['batch']} | {row['examples']:,} ({row['distinct']:,}) | {row['recovery_s']:.0f} "
            f"| {validated} | {cells(row['recovered'])} |"
        )
    where = "; ".join(dict.fromkeys(f"{row['device']} ({row['date']}; {row['versions']})" for row in rows))
    timed = "; ".join(dict.fromkeys(f"{row['regime']}, {row['timed_on']}" for row in rows))
    return f"Trained on {where}; timed at forward {timed}, processor time.\n\n" + "\n".join(lines)


def chosen(model: Any, calibration: Sequence[Example], budget: LatencyBudget, options: argparse.Namespace) -> Plan:
    """The plan: given, of a given size by Fisher information, or found for the budget."""
    if options.plan:
        return Plan.from_dict(json.loads(options.plan.read_text(encoding="utf-8"))["plan"])
    if options.layers or options.ffn:
        init_gates(model, calibration)
        return model.plan(shape=Shape(num_hidden_layers=options.layers, intermediate_size=options.ffn))
    return find_plan(model, budget, calibration, effort=quick_effort()).plan


def quick_effort() -> Effort:
    """Of a search."""
    return Effort.quick(clock=Clock(time.thread_time), cache=False, max_seconds=6.0, candidates=3, instances=3)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    base: PreTrainedModel = AutoModel.from_pretrained(options.teacher, dtype=torch.float32).eval().to(options.device)
    frame, rng = Frame.of(tokenizer), np.random.default_rng(options.seed)

    def batches(examples: Sequence[Example]) -> list[Example]:
        return [frame.batch(examples[start : start + 16]) for start in range(0, len(examples), 16)]

    def read(path: str) -> list[list[str]]:
        return [each for each in sentences_of(path, options.text_tokenizer, options.tokens) if each]

    def singles(documents: Sequence[list[str]]) -> list[Example]:
        """The same whatever is trained on."""
        drawn = Sentences(documents, tokenizer).draw(options.held_out, np.random.default_rng(0), crops=0.0, **one)
        return batches(drawn.all())

    draw: dict[str, Any] = {"most": options.most, "length": options.length, "batch": options.batch}
    one, documents = draw | {"most": 1}, read(options.train)
    cut = len(documents) - max(1, len(documents) // PARTS)
    text = Sentences(documents[:cut], tokenizer)
    train = text.draw(options.steps * options.batch, rng, crops=options.crops, **draw)
    calibration = batches(text.draw(options.calibration, rng, crops=0.0, **draw).all())
    sentences, others = singles(read(options.eval)), singles(documents[cut:])
    dense, dense_others = embeddings(base, sentences), embeddings(base, others)

    budget = LatencyBudget(speedup=options.speedup, batch_size=options.rows_timed, seq_len=options.seq_len)
    model = get_peft_model(base, HawAdaConfig())
    begun = time.process_time()
    plan = chosen(model, calibration, budget, options)
    row: dict[str, Any] = {"name": options.name, "search_s": time.process_time() - begun}
    print(f"{plan}: {row['search_s']:.0f} s", flush=True)
    model.apply_plan(plan)
    row["closed"] = agreement(dense, embeddings(model, sentences))

    seconds = options.until - time.time() - options.timing_seconds - RESERVED if options.until else math.inf
    if seconds < options.least_seconds:
        raise SystemExit(f"{seconds:.0f} s are left for {options.name or 'it'}: too few to begin")
    start, cosine = Start(dense, sentences), Cosine(seconds)
    args = TrainingArguments(
        f"{options.out}-training",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate,
        lr_scheduler_type="constant",
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=options.device == "cpu",
        bf16=options.bf16,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    begun = clock()
    slimmed = recover(
        model,
        args,
        train_dataset=train,
        data_collator=frame.batch,
        calibration=calibration if options.refit or options.race else None,
        kl_weight=options.states_weight,
        embedding_weight=options.embedding_weight,
        optimizer=options.optimizer,
        dropout=options.dropout,
        race=Race(budget=budget, effort=quick_effort()) if options.race else False,
        callbacks=[start, cosine],
    )
    row |= {"recovery_s": clock() - begun, "refitted": start.found}
    slimmed = slimmed.save(options.out, processor=tokenizer)
    slim = AutoModel.from_pretrained(options.out, dtype=torch.float32).eval()
    row["recovered"] = agreement(dense, embeddings(slim, sentences))
    row["validated"] = agreement(dense_others, embeddings(slim, others))
    row |= circumstances(options.device)

    torch.set_num_threads(1)
    timings = measure_many(
        {"dense": base.cpu(), "slim": slim},
        budget.regime(generates=False, dtype=torch.float32, device="cpu"),
        effort=Effort(clock=Clock(time.thread_time), max_seconds=options.timing_seconds),
    )
    dense_ms, slim_ms = (timings[name].median_ms for name in ("dense", "slim"))
    given = ("speedup", "rate", "batch", "length", "most", "crops", "bf16", "dropout", "seed", "optimizer", "refit")
    weights = ("states_weight", "embedding_weight")
    return (
        row
        | {name: getattr(options, name) for name in (*given, *weights)}
        | {
            "regime": f"{options.rows_timed}x{options.seq_len}, float32",
            "timed_on": circumstances("cpu")["device"],
            "dense_ms": dense_ms,
            "slim_ms": slim_ms,
            "measured": dense_ms / slim_ms,
            "shape": str(plan),
            "layers": slim.config.num_hidden_layers,
            "ffn": slim.config.intermediate_size,
            "parameters": slim.num_parameters(),
            "dense_parameters": base.num_parameters(),
            "steps": cosine.steps,
            "steps_wanted": options.steps,
            "examples": cosine.steps * options.batch,
            "distinct": train.first(cosine.steps * options.batch).distinct,
            "held_out": len(dense),
            "max_difference": slimmed.verification.max_difference if slimmed.verification else None,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    shown = commands.add_parser("table", help="rows of many runs as Markdown")
    shown.add_argument("rows", type=Path)
    shown.add_argument("--page", type=Path, help="whose section `encoder-rows` is written")
    one = commands.add_parser("run", help="slim an encoder, recover it, compare it")
    one.add_argument("teacher", help="a folder with an encoder and its tokenizer")
    one.add_argument("--train", required=True, help="tokens of text, .npy or .npy.xz")
    one.add_argument("--eval", required=True, help="held-out ones")
    one.add_argument("--text-tokenizer", required=True, help="of these tokens: a folder")
    one.add_argument("--out", required=True, help="the new folder")
    one.add_argument("--name", default="", help="of the run, for its row")
    one.add_argument("--rows", type=Path, help="a file of rows: a run whose name is there is not made again")
    one.add_argument("--device", default="cpu", help="of the training; timed is the CPU")
    one.add_argument("--speedup", type=float, default=1.5)
    one.add_argument("--rows-timed", type=int, default=8, help="of the timed regime")
    one.add_argument("--seq-len", type=int, default=128, help="of the timed regime")
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--length", type=int, default=64, help="tokens of an example at most")
    one.add_argument("--most", type=int, default=3, help="sentences of a training example at most")
    one.add_argument("--crops", type=float, default=0.0, help="the part of the training examples that is cut at words")
    one.add_argument("--bf16", action="store_true", help="recover under autocast to bfloat16")
    one.add_argument("--rate", type=float, default=5e-4)
    one.add_argument("--optimizer", choices=("auto", "args", "muon"), default="auto", help="as of `recover`")
    one.add_argument("--states-weight", type=float, default=1.0, help="of the squared difference of tokens' states")
    one.add_argument("--embedding-weight", type=float, default=0.0, help="of the cosine distance of embeddings")
    one.add_argument("--calibration", type=int, default=256, help="examples")
    one.add_argument("--refit", action=argparse.BooleanOptionalAction, default=True, help="by least squares, before")
    one.add_argument("--held-out", type=int, default=500, help="sentences")
    one.add_argument("--tokens", type=int, default=8_000_000, help="of each file that are read")
    one.add_argument("--timing-seconds", type=float, default=40.0, help="of the models in turns, at the end")
    one.add_argument("--until", type=float, default=0.0, help="second since the epoch at which all of it has ended")
    one.add_argument("--least-seconds", type=float, default=30.0, help="of training, or it is not begun")
    one.add_argument("--plan", type=Path, help="a hawada_report.json, whose plan is taken instead of a search")
    one.add_argument("--layers", type=int, help="how many stay, instead of a search; by Fisher information")
    one.add_argument("--ffn", type=int, help="how many channels stay in each, likewise")
    one.add_argument("--race", action="store_true", help="let other plans race against it")
    one.add_argument("--dropout", action="store_true", help="recover with the teacher's dropout on")
    one.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "table":
        text = table(read_rows(options.rows))
        replace_section(options.page, "encoder-rows", text) if options.page else print(text)
        return
    if options.rows and any(row["name"] == options.name for row in read_rows(options.rows)):
        print(f"{options.name!r} is in {options.rows}")
        return
    if Path(options.out).exists() and any(Path(options.out).iterdir()):
        one.error(f"{options.out} is not empty: give a new folder as --out")
    torch.manual_seed(options.seed)
    row = run(options)
    if options.rows:
        append_row(options.rows, row)
    print(json.dumps(row, indent=1))
    print(section(row))


if __name__ == "__main__":
    main()
