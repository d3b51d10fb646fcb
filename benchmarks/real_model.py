"""
Our race against its peers on a real pretrained model, at equal measured latency and equal steps.

    python benchmarks/real_models.py smollm2-135m DIR/smollm2-135m
    python benchmarks/real_model.py data --teacher DIR/smollm2-135m --source-tokenizer BENCH/teachers/llama \\
        --train BENCH/text_train.npy.xz --eval BENCH/text_eval.npy --out DIR/data
    COMMON="--teacher DIR/smollm2-135m --data DIR/data --out OUT/rows.jsonl --known OLD/rows.jsonl OLD/timings.jsonl"
    python benchmarks/real_model.py jobs $COMMON --only-time > time.txt
    python benchmarks/real_model.py jobs $COMMON > jobs.txt
    python benchmarks/jobs.py time.txt --devices 0 1 --per-device 1 --seconds 200 --log OUT/jobs.log
    python benchmarks/jobs.py jobs.txt --devices 0 1 --per-device 3 --seconds 340 --log OUT/jobs.log
    python benchmarks/real_model.py summary OLD/rows.jsonl OUT/rows.jsonl

`data` re-tokenises a stream of another tokenizer's tokens: `train.npy` (windows of 512, uint16) and `eval.npy` (120
windows of 512 from the start of held-out text). `jobs` prints one `run` per group of cells (contestant, budget, seed,
steps) that --known and --out lack, the most telling first; `jobs.py` spreads them over GPUs, several on each. Whoever
times a model has its GPU alone and waits until it is: so time first (`jobs --only-time`, one job on each GPU; nothing
is timed twice), then train. `run` adds a row to --out for each cell as it comes, and one to
`timings.jsonl` beside it for each model that it times; a cell that fails leaves its error and is tried again by the
next `jobs`. At the second --until nothing more is begun. Without `jobs.py`, `run` works through whatever is asked for
in one process; --shard I/N takes one of N shares, for `run` and `jobs`. `--tiny` runs all of it on a CPU in a minute,
with a tiny model made on the spot. Other command lines may be added to jobs.txt, such as that of trained gates:

    python benchmarks/unit_choice.py criteria DIR/smollm2-135m DIR/data/train.npy DIR/data/eval.npy --device cuda \\
        --case 13-18:9x3x1280 --contestants 'straight_through .02' --seeds 0 --out OUT/criteria.jsonl

Needs the package's own requirements and, for `tp_taylor`, torch-pruning. A job holds up to 22 GB of a GPU.

Besides SmolLM2 on a GPU there are other setups (--setup): SmolLM2 on one CPU core, and the two small teachers of the
frontier bench on both, of which --data is a folder with their files; their models are trained on the GPU. Each wants
an --out of its own. For the small teachers ours come first, with the plan of a search among those that race:

    for S in llama-cpu vit-cpu llama-gpu vit-gpu; do
        python benchmarks/real_model.py jobs --setup $S --teacher BENCH/teachers/${S%-*} --data BENCH \\
            --out OUT/$S.jsonl --budgets 1.25 1.5 2 3 --steps 300 --contestants searched race >> jobs.txt; done
    python benchmarks/jobs.py jobs.txt --devices 0 1 --per-device 4 --seconds 560 --log OUT/jobs.log

Set-up: budgets are speedups of a prefill of 8x512 in bfloat16 as a CUDA graph, met from 0.988 times them on, for all
contestants alike; calibration on 64 windows of 512 from the training text; recovery by KL on all weights, batches of
16x512, cosine, rate 5e-4, bf16 autocast; perplexity over 120 windows of 512. Peers recover by AdamW as their authors
do, and as NAME+muon by the optimizer that `recover` chooses. What a contestant trains before (its gates, its race) is
taken off its recovery. `before` is the model as cut and prepared, untrained; a model that misses its budget is not
recovered. A model's latency is that of a model with the same parameters, by name and shape.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from document import circumstances
from peers.registry import PEERS
from real_cells import MUON, OURS, Cell, Group, groups_of, shared_out, unmade
from real_setups import SETUPS, Setup, tiny
from real_work import Ground
from reconstruction import read_tokens
from rows import Row, append_row, read_rows
from transformers import AutoTokenizer
from turns import Turns

from hawada_peft.errors import UnsettledTimingWarning

LENGTH, EVAL_WINDOWS, TRAIN_WINDOWS = 512, 120, 8000


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


def made(options: argparse.Namespace) -> set[Cell]:
    """The cells that are there, those of the dense model among them."""
    found = [row for file in (*options.known, options.out) for row in read_rows(file) if "contestant" in row]
    return {Cell.of(row) for row in found if "error" not in row}


def chosen(options: argparse.Namespace) -> list[Group]:
    """The groups that are asked for: all in the order of their value, or one for each length and seed."""
    if options.contestants is None:
        ours = SETUPS[options.setup].ours
        return list(groups_of(options.budgets, options.seeds, options.steps, ours))
    names, budgets = tuple(options.contestants), tuple(options.budgets)
    return [Group(names, budgets, seed, steps) for steps in options.steps for seed in options.seeds]


def jobs(options: argparse.Namespace) -> int:
    """Print the command lines of what is missing."""
    shard, shards = map(int, options.shard.split("/"))
    common = ["--out", str(options.out)]
    if options.tiny:
        common.append("--tiny")
    else:
        common += ["--teacher", str(options.teacher), "--data", str(options.data)]
        common += ["--device", options.device, "--setup", options.setup]
    common += ["--known", *map(str, options.known)] if options.known else []
    missing = unmade(chosen(options), made(options))
    if options.only_time:
        peers = dict.fromkeys("race" if c.contestant in OURS else c.peer for group in missing for c in group.cells)
        budgets = tuple(options.budgets)
        missing = [Group((name,), budgets, options.seeds[0], options.steps[0]) for name in peers]
    for group in shared_out(missing, shard, shards):
        print(group.command(common, "time" if options.only_time else "run"))
    return 0


def ground(options: argparse.Namespace, folder: str) -> Ground:
    """The work at hand, by the options."""
    teacher, data, setup = options.teacher, options.data, replace(SETUPS[options.setup], device=options.device)
    if options.tiny:
        teacher, data, setup = tiny(Path(folder))
    if setup.on_cpu:
        torch.set_num_threads(1)
    if setup.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # of what is computed outside autocast, for all alike
    timings = options.out.with_name("timings.jsonl")
    return Ground(teacher, data, setup, timings, Turns(options.turns), [*options.known, options.out])


def time_models(options: argparse.Namespace) -> int:
    """Time what the cells will ask about; 1 if something failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = ground(options, folder)
        for cell in dict.fromkeys(cell for group in chosen(options) for cell in group.cells):
            if options.until and time.time() > options.until:
                break
            started, said = time.perf_counter(), "timed"
            try:
                work.time(cell)
            except Exception as error:  # the others are still worth having
                failed, said = 1, f"{type(error).__name__}: {error}"
            print(f"{cell.contestant}, {cell.budget}x: {said}, {time.perf_counter() - started:.1f} s", flush=True)
    return failed


def run(options: argparse.Namespace) -> int:
    """Work through the cells; 1 if one failed."""
    shard, shards = map(int, options.shard.split("/"))
    done, failed, dense = made(options), 0, Cell("dense", None, None, None)  # type: ignore[arg-type]
    cells = [cell for group in shared_out(chosen(options), shard, shards) for cell in group.cells]
    cells = [cell for cell in dict.fromkeys(cells) if cell not in done]
    if not cells:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = ground(options, folder)
        setup: Setup = work.setup
        facts = {"setup": "tiny" if options.tiny else options.setup, "rate": setup.rate}
        facts |= {"calibration": setup.calibration, "batch": setup.batch_size}
        facts |= {"trained_on": circumstances(setup.device)["device"]}
        for cell in [*([] if dense in done else [dense]), *cells]:
            own = None if cell is dense else cell
            if own is not None and options.until and time.time() + work.expected(own) > options.until:
                print(f"{cell.contestant}, {cell.budget}x, seed {cell.seed}: no time left", flush=True)
                continue
            row: Row = asdict(cell)
            started = time.perf_counter()
            try:
                row |= work.row(own)
            except Exception as error:  # whatever goes wrong in one, the others are still worth having
                failed += 1
                row |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
            if setup.device.startswith("cuda"):
                torch.cuda.empty_cache()
            row |= {"seconds": round(time.perf_counter() - started, 1), "regime": str(work.regime)}
            if own is not None or dense not in made(options):
                append_row(options.out, circumstances(setup.device) | row | facts)
            print(line_of(row), flush=True)
    return int(failed > 0)


def line_of(row: Row) -> str:
    """A row for people."""
    name = f"{row['contestant']}, {row['budget']}x, seed {row['seed']}, {row['steps']} steps"
    if "error" in row:
        return f"{name}: failed after {row['seconds']} s: {row['error'][:300]}"
    before, after = (shown([row], stage) for stage in ("before", "after"))
    speed = f", {row['speedup']:.3f}x{'' if row['met'] else ' (unmet)'}" if "speedup" in row else ""
    won = f", {row['winner']} ({row['source']}), {row['race_steps']:.0f} steps of race" if "winner" in row else ""
    return f"{name}: {before} -> {after}{speed}{won}, {row['seconds']} s"


def summary(options: argparse.Namespace) -> int:
    """Means and spreads over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    rows = [row for path in options.rows for row in read_rows(path)]
    for row in rows:
        if "error" not in row and "contestant" in row:
            groups[row["steps"] or 0, row["budget"] or 0.0, row["contestant"]].append(row)
    print("| steps | budget | contestant | seeds | speedup | before | after |", "|---" * 7 + "|", sep="\n")
    for (steps, budget, name), found in sorted(groups.items()):
        parts = [shown(found, stage) for stage in ("before", "after")]
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


def shown(rows: Sequence[Row], stage: str) -> str:
    """What was measured at a stage, metric by metric."""
    there = [row[stage] for row in rows if stage in row]
    return " / ".join(spread(each[metric] for each in there) for metric in there[0]) if there else "not recovered"


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
    names = [*OURS, *PEERS, *(f"{name}{MUON}" for name in PEERS)]
    verbs = {
        "time": (time_models, "time what the cells ask about"),
        "run": (run, "work through the cells"),
        "jobs": (jobs, "print the command lines"),
    }
    for name, (do, words) in verbs.items():
        part = commands.add_parser(name, help=words)
        part.set_defaults(do=do)
        part.add_argument("--teacher", help="a folder")
        part.add_argument("--data", type=Path, help="a folder with the setup's data files")
        part.add_argument("--out", type=Path, required=True, help="rows are added to this file")
        part.add_argument("--known", type=Path, nargs="+", default=[], help="rows and timings from before; only read")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--contestants", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
        part.add_argument("--budgets", type=float, nargs="+", default=[1.25, 1.5, 2.0])
        part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        part.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="in all")
        part.add_argument("--setup", choices=SETUPS, default="smollm2-gpu", help="real_setups.py says what they are")
        part.add_argument("--shard", default="0/1", help="I/N")
        if name == "jobs":
            part.add_argument("--only-time", action="store_true", help="lines that only time what the others will ask")
        part.add_argument("--until", type=float, help="second since the epoch after which nothing is begun")
        part.add_argument("--turns", type=Path, help="path of a lock that all processes on the device share")
        part.add_argument(
            "--tiny", action="store_true", help="a tiny model on the CPU; give few steps, such as --steps 12"
        )
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
