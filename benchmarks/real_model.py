"""
Our race against its peers on a real pretrained model, at equal measured latency and equal steps.

    python benchmarks/real_teacher.py DIR/smollm2-135m
    python benchmarks/real_model.py data --teacher DIR/smollm2-135m --source-tokenizer BENCH/teachers/llama \\
        --train BENCH/text_train.npy.xz --eval BENCH/text_eval.npy --out DIR/data
    python benchmarks/real_model.py run --teacher DIR/smollm2-135m --data DIR/data --out rows.jsonl --dry-run
    python benchmarks/real_model.py run --teacher DIR/smollm2-135m --data DIR/data --out rows.jsonl --shard 0/4
    python benchmarks/real_model.py summary rows.jsonl

`data` re-tokenises a stream of another tokenizer's tokens: `train.npy` (windows of 512, uint16) and `eval.npy` (120
windows of 512 from the start of held-out text). `run` works through the cells (contestant, budget, seed, steps), the
most telling first, and adds a row to --out for each as it comes; cells that are there are skipped, one that fails
leaves its error and is tried again by the next run. With --shard I/N it takes its share: one process per GPU
(CUDA_VISIBLE_DEVICES=I), all with the same --out. `--dry-run` lists the cells with the seconds they will take on an
H100. `--tiny` runs all of it on a CPU in a minute, with a tiny model made on the spot.

Set-up: budgets are speedups of a prefill of 8x512 in bfloat16 as a CUDA graph, met from 0.99 times them on, for all
contestants alike; calibration on 64 windows of 512 from the training text; recovery by KL on all weights, batches of
16x512, AdamW, cosine, rate 5e-4, bf16 autocast; perplexity over 120 windows of 512. What a contestant trains before
(its gates, its race) is taken off its recovery. `before` is the model as cut and prepared, untrained.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from document import circumstances
from peers.peer import Prepared, Work
from peers.registry import PEERS
from reconstruction import read_tokens
from rows import Row, append_row, read_rows
from sizing import SHORT, Fit, Stopwatch, Timed, fit_amount
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from work import Bench, whole

from hawada_peft import Effort, LatencyBudget, Race, Shape, recover, slim
from hawada_peft.distil.raced import parts_of
from hawada_peft.errors import UnsettledTimingWarning
from hawada_peft.latency.regime import Regime
from hawada_peft.race import PREPARATIONS

RATE, LENGTH, EVAL_WINDOWS, CALIBRATION = 5e-4, 512, 120, 64
TRAIN_WINDOWS = 8000

OURS: dict[str, dict[str, Any]] = {
    "race": {},
    "race_short": {"plans": 3, "preparations": ("none", "least squares", "least squares, close")},
    "race_long": {"share": 0.3, "plans": 6},
    "race_anew": {"onward": "anew"},
    "race_cosine": {"preparations": ("none", "magnitude", "cosine")},
    "race_plans": {"preparations": ("none",)},
    "no_race": {"plans": 1, "preparations": ("none",)},
}
"""The package's own contestants: options of `Race`. The last takes the best run of layers as it is."""

MUON = "+muon"
"""Behind a peer's name: recovered by the optimizer that `recover` takes by itself, not by AdamW."""

FIRST, PEERS_ORDER = ("race", "minitron_depth"), ("shortgpt", "slicegpt", "flap", "llm_pruner", "tp_taylor")

SECONDS = {"step": 0.16, "ours": 110.0, "minitron_depth": 40.0, "peer": 60.0, "fixed": 8.0}
"""Rough costs on an H100: of a step of recovery, of finding a contestant's model, and of what all cells share."""


@dataclass(frozen=True)
class Cell:
    """One piece of work, and its place in the file of rows."""

    contestant: str
    budget: float
    seed: int
    steps: int

    @property
    def seconds(self) -> float:
        """What it takes on an H100, roughly."""
        own = SECONDS["ours"] if self.contestant in OURS else SECONDS.get(self.contestant, SECONDS["peer"])
        return SECONDS["fixed"] + own + SECONDS["step"] * self.steps


@dataclass(frozen=True)
class Conditions:
    """What is the same for all cells, the tiny mode's sizes instead of the real ones."""

    device: str
    batch_size: int = 16
    rate: float = RATE
    length: int = LENGTH
    calibration: int = CALIBRATION
    eval_windows: int = EVAL_WINDOWS
    rows: int = 8
    effort: Effort = field(
        default_factory=lambda: Effort(min_rounds=15, max_rounds=60, max_seconds=4.0, tolerance=0.004)
    )

    @property
    def regime(self) -> Regime:
        """Of all timings."""
        gpu = self.device.startswith("cuda")
        return Regime(
            mode="prefill",
            batch_size=self.rows,
            seq_len=self.length,
            dtype="bfloat16" if gpu else "float32",
            backend="cuda_graph" if gpu else "eager",
            device=self.device,
        )

    def budget(self, speedup: float) -> LatencyBudget:
        """The same conditions as a budget."""
        names = ("mode", "batch_size", "seq_len", "dtype", "backend", "device")
        return LatencyBudget(speedup=speedup, **{name: getattr(self.regime, name) for name in names})


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells by their value: our race and its strongest peer, the other peers, then longer recoveries."""
    short, *longer = options.steps
    asked = options.contestants
    first = [name for name in FIRST if asked is None or name in asked]
    others = list(PEERS_ORDER) if asked is None else [name for name in asked if name not in FIRST]
    cells = [Cell(name, b, seed, short) for seed in options.seeds for b in options.budgets for name in first]
    seeds = options.seeds[:1] if asked is None else options.seeds
    cells += [Cell(name, b, seed, short) for seed in seeds for name in others for b in options.budgets]
    cells += [
        Cell(name, b, seed, steps)
        for steps in longer
        for seed in options.seeds[:1]
        for name in [*first, *(others if asked else [])]
        for b in options.budgets
    ]
    return cells


def shared_out(cells: Sequence[Cell], shards: int) -> list[list[Cell]]:
    """The cells in their order, each for the shard that has least to do so far."""
    parts: list[list[Cell]] = [[] for _ in range(shards)]
    for cell in cells:
        min(parts, key=lambda part: sum(each.seconds for each in part)).append(cell)
    return parts


def prepare_data(options: argparse.Namespace) -> None:
    """Re-tokenise the streams."""
    options.out.mkdir(parents=True, exist_ok=True)
    source, tokenizer = (AutoTokenizer.from_pretrained(name) for name in (options.source_tokenizer, options.teacher))
    for name, path, count in (("eval", options.eval, EVAL_WINDOWS), ("train", options.train, options.windows)):
        tokens: list[int] = []
        for piece in np.array_split(read_tokens(path), 400):
            if len(tokens) >= count * LENGTH:
                break
            text = source.decode(piece.tolist(), skip_special_tokens=True)
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        found = np.asarray(tokens[: count * LENGTH // LENGTH * LENGTH], dtype=np.uint16)
        windows = found[: len(found) // LENGTH * LENGTH].reshape(-1, LENGTH)
        np.save(options.out / f"{name}.npy", windows)
        print(f"{name}: {windows.shape[0]} windows of {LENGTH}, {windows.nbytes / 2**20:.1f} MiB")


def tiny(folder: Path) -> tuple[str, Path, Conditions]:
    """A tiny model and data that repeat themselves, so that there is something to lose and to win back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    generator = np.random.default_rng(0)
    for name, count in (("train", 200), ("eval", 8)):
        starts, strides = generator.integers(0, 250, (count, 1)), generator.integers(1, 9, (count, 1))
        np.save(folder / f"{name}.npy", ((starts + strides * np.arange(32)) % 251).astype(np.uint16))
    effort = Effort(warmup=1, lead_in=0, min_rounds=3, max_rounds=5, max_seconds=0.5)
    conditions = Conditions("cpu", 8, 1e-3, 32, 16, 8, 4, effort)
    return str(folder / "teacher"), folder, conditions


class Ground:
    """The work at hand: the teacher with its data, the clock, and what is known of latencies from earlier rows."""

    def __init__(self, teacher: str, data: Path, conditions: Conditions, out: Path) -> None:
        self.conditions, self.out, self.regime = conditions, out, conditions.regime
        self.bench = Bench(
            teacher,
            str(data / "train.npy"),
            str(data / "eval.npy"),
            device=conditions.device,
            length=conditions.length,
            eval_length=conditions.length,
            batch_size=conditions.batch_size,
            eval_examples=conditions.eval_windows,
        )
        dense = self.bench.load().to(device=self.regime.device, dtype=self.regime.torch_dtype)
        self.watch = Stopwatch(dense, self.regime, conditions.effort)
        self.device = circumstances(conditions.device)["device"]
        self._prepared: dict[tuple[str, int], Prepared] = {}

    def rows(self) -> Iterator[Row]:
        """The rows of this device that are no errors."""
        yield from (row for row in read_rows(self.out) if row["device"] == self.device and "error" not in row)

    def dense(self) -> Row:
        """The dense model's row."""
        quality = self.bench.quality(self.bench.model)
        return {"before": quality, "after": quality, "parameters": self.bench.model.num_parameters()}

    def ours(self, cell: Cell) -> Row:
        """A race and the recovery after it."""
        bench = self.bench
        known: dict[Shape, float] = {}
        for row in self.rows():
            for sizes, part in row.get("latencies", ()):
                known.setdefault(Shape.from_dict(sizes), part)
        race = Race(
            budget=self.conditions.budget(cell.budget),
            tolerance=1 / SHORT - 1,
            neighbours=False,
            effort=self.conditions.effort,
            latencies=known,
            **OURS[cell.contestant],
        )
        calibration = bench.examples(self.conditions.calibration, cell.seed)
        with tempfile.TemporaryDirectory() as folder:
            slimmed = recover(
                bench.load(),
                bench.arguments(folder, cell.steps, self.conditions.rate, cell.seed),
                train_dataset=bench.pool(cell.seed),
                data_collator=whole,
                calibration=calibration,
                race=race,
            )
        record, small = slimmed.race, slimmed.model
        winner = record.entrant(record.winner or "")
        after = bench.quality(small)
        plain = slim(bench.model, winner.plan).to(bench.device)
        cut = bench.quality(plain)
        fitted, _ = parts_of(calibration, race.held_out, "input_ids")
        PREPARATIONS[winner.preparation](bench.model, plain, winner.plan, fitted)
        timed = self.watch(slim(bench.model, winner.plan))
        dense_ms = record.dense_ms or 1.0
        return {
            "slice": cut,
            "before": bench.quality(plain),
            "after": after,
            "speedup": timed.speedup,
            "met": timed.speedup >= SHORT * cell.budget,
            "winner": winner.name,
            "source": winner.source,
            "layers": list(winner.plan.layers),
            "race_steps": record.cost,
            "race_seconds": record.seconds + sum(run.seconds for run in record.runs),
            "led_throughout": record.led_throughout,
            "lengths": record.lengths,
            "race": [
                {"name": record.entrant(run.entrant).name, "source": record.entrant(run.entrant).source}
                | {"start": record.entrant(run.entrant).start}
                | asdict(run)
                for run in record.runs
            ],
            "latencies": [[shape.to_dict(), ms / dense_ms] for shape, ms in record.latencies.items()],
            "parameters": small.num_parameters(),
        }

    def peer(self, cell: Cell) -> Row:
        """A peer, cut to the budget and recovered."""
        bench, key = self.bench, (cell.contestant, cell.seed)
        if key not in self._prepared:
            batches = bench.examples(self.conditions.calibration, cell.seed, labels=True)
            work = Work(bench.load, batches, bench.stream(cell.seed), cell.budget, cell.steps, cell.seed)
            self._prepared = {key: PEERS[cell.contestant.removesuffix(MUON)].prepare(work)}
        prepared = self._prepared[key]
        fit = fit_amount(
            lambda amount: prepared.cut(bench.load(), amount), self.watch, cell.budget, start=self._start(cell)
        )
        model = prepared.cut(bench.load(), fit.amount).to(bench.device)
        before = bench.quality(model)
        optimizer = "muon" if cell.contestant.endswith(MUON) else "args"
        bench.distil(model, cell.steps - prepared.steps, self.conditions.rate, cell.seed, optimizer)
        return {
            "before": before,
            "after": bench.quality(model),
            "speedup": fit.timed.speedup,
            "met": fit.met,
            "amount": fit.amount,
            "timed": asdict(fit.timed),
            "timings": fit.timings,
            "own_steps": prepared.steps,
            "parameters": model.num_parameters(),
        }

    def _start(self, cell: Cell) -> Fit | None:
        """What another cell of the contestant and the budget found."""
        for row in self.rows():
            if (row["contestant"].removesuffix(MUON), row["budget"]) == (
                cell.contestant.removesuffix(MUON),
                cell.budget,
            ):
                return Fit(row["amount"], Timed(**row["timed"]), row["met"], row["timings"])
        return None


def run(options: argparse.Namespace) -> int:
    """Work through the cells; 1 if one failed."""
    shard, shards = map(int, options.shard.split("/"))
    cells = cells_of(options)
    done = {
        (row["contestant"], row["budget"], row["seed"], row["steps"])
        for row in read_rows(options.out)
        if "error" not in row
    }
    mine = shared_out(cells, shards)[shard]
    mine = [cell for cell in mine if (cell.contestant, cell.budget, cell.seed, cell.steps) not in done]
    if options.dry_run:
        for cell in mine:
            print(
                f"{cell.contestant:16} {cell.budget:5}x  seed {cell.seed}  {cell.steps:5} steps  {cell.seconds:5.0f} s"
            )
        print(f"{len(mine)} cells, {sum(cell.seconds for cell in mine) / 60:.0f} minutes on an H100")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            teacher, data, conditions = tiny(Path(folder))
        else:
            teacher, data = options.teacher, options.data
            conditions = Conditions(options.device, calibration=options.calibration, batch_size=options.batch_size)
            conditions = replace(conditions, rate=options.rate, eval_windows=options.eval_windows)
        if conditions.device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # of what is computed outside autocast, for all alike
        work = Ground(teacher, data, conditions, options.out)
        if shard == 0 and ("dense", None, None, None) not in done:
            mine = [None, *mine]  # type: ignore[list-item]
        for cell in mine:
            row: Row = {"contestant": "dense", "budget": None, "seed": None, "steps": None}
            row |= {} if cell is None else asdict(cell)
            started = time.perf_counter()
            try:
                if cell is None:
                    row |= work.dense()
                else:
                    row |= work.ours(cell) if cell.contestant in OURS else work.peer(cell)
            except Exception as error:  # whatever goes wrong in one, the others are still worth having
                failed += 1
                row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
            if conditions.device.startswith("cuda"):
                torch.cuda.empty_cache()
            row |= {"seconds": round(time.perf_counter() - started, 1), "regime": str(work.regime)}
            row |= {"rate": conditions.rate, "calibration": conditions.calibration, "batch": conditions.batch_size}
            append_row(options.out, row | circumstances(conditions.device))
            print(line_of(row), flush=True)
    return int(failed > 0)


def line_of(row: Row) -> str:
    """A row for people."""
    name = f"{row['contestant']}, {row['budget']}x, seed {row['seed']}, {row['steps']} steps"
    if "error" in row:
        return f"{name}: failed after {row['seconds']} s: {row['error'][:300]}"
    before, after = (row[part]["perplexity"] for part in ("before", "after"))
    speed = f", {row['speedup']:.3f}x{'' if row['met'] else ' (unmet)'}" if "speedup" in row else ""
    won = f", {row['winner']} ({row['source']}), {row['race_steps']:.0f} steps of race" if "winner" in row else ""
    return f"{name}: {before:.2f} -> {after:.2f}{speed}{won}, {row['seconds']} s"


def summary(options: argparse.Namespace) -> int:
    """Means and spreads over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    rows = [row for path in options.rows for row in read_rows(path)]
    for row in rows:
        if "error" not in row:
            groups[row["steps"] or 0, row["budget"] or 0.0, row["contestant"]].append(row)
    print("| steps | budget | contestant | seeds | speedup | before | after |", "|---" * 7 + "|", sep="\n")
    for (steps, budget, name), found in sorted(groups.items()):
        parts = [spread(row[part]["perplexity"] for row in found) for part in ("before", "after")]
        speed = spread(row.get("speedup", 1.0) for row in found) + (
            "" if all(r.get("met", True) for r in found) else " unmet"
        )
        print(f"| {steps} | {budget} | {name} | {len(found)} | {speed} | {parts[0]} | {parts[1]} |")
    raced = [row for row in rows if "led_throughout" in row]
    if raced:
        led = sum(row["led_throughout"] for row in raced)
        print(f"\nThe leader after the first rung won {led} of {len(raced)} races.")
    for row in (row for row in rows if "error" in row):
        print(line_of(row))
    return 0


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    found = np.array(list(values))
    return f"{found.mean():.2f}" + (f" ± {found.std(ddof=1):.2f}" if len(found) > 1 else "")


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    data = commands.add_parser("data", help="re-tokenise")
    data.add_argument("--teacher", required=True, help="the folder whose tokenizer is used")
    data.add_argument("--source-tokenizer", required=True, help="of the tokens in the files")
    data.add_argument("--train", required=True, help="a stream of tokens, .npy or .npy.xz")
    data.add_argument("--eval", required=True, help="held-out tokens")
    data.add_argument("--windows", type=int, default=TRAIN_WINDOWS, help="of training text, at most")
    data.add_argument("--out", type=Path, required=True)
    data.set_defaults(do=prepare_data)
    part = commands.add_parser("run", help="work through the cells")
    part.add_argument("--teacher", help="a folder")
    part.add_argument("--data", type=Path, help="a folder with train.npy and eval.npy")
    part.add_argument("--out", type=Path, required=True, help="rows are added to this file")
    part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    names = [*OURS, *PEERS, *(f"{name}{MUON}" for name in PEERS)]
    part.add_argument("--contestants", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    part.add_argument("--budgets", type=float, nargs="+", default=[1.25, 1.5, 2.0])
    part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    part.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="in all; after the first for one seed")
    part.add_argument("--calibration", type=int, default=CALIBRATION, help="windows")
    part.add_argument("--batch-size", type=int, default=16)
    part.add_argument("--rate", type=float, default=RATE)
    part.add_argument("--eval-windows", type=int, default=EVAL_WINDOWS)
    part.add_argument("--shard", default="0/1", help="I/N")
    part.add_argument("--dry-run", action="store_true")
    part.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU; give few steps, such as --steps 12"
    )
    part.set_defaults(do=run)
    last = commands.add_parser("summary", help="means over seeds")
    last.add_argument("rows", type=Path, nargs="+")
    last.set_defaults(do=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = parser_of().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
        warnings.simplefilter("ignore", UnsettledTimingWarning)  # the spread is in the rows
        return options.do(options) or 0


if __name__ == "__main__":
    raise SystemExit(main())
