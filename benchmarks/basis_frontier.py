"""
The frontier of the two bench teachers with hidden sizes cut in a basis: hawada with and without it, and three peers.

`BENCH` holds `teachers/llama`, `teachers/vit`, `text_train.npy.xz`, `text_eval.npy`, `cifar_train.npz` and
`cifar_eval.npz`. On a machine with two GPUs, three calls of less than ten minutes each; all go on where they stopped,
so each can be given again until it prints nothing more:

    for i in 0 1; do CUDA_VISIBLE_DEVICES=$i python benchmarks/basis_frontier.py shapes --bench BENCH --folder OUT \\
        --cells llama-gpu vit-gpu --device cuda --shard $i/2 & done; wait
    for i in 0 1; do CUDA_VISIBLE_DEVICES=$i python benchmarks/basis_frontier.py shapes --bench BENCH --folder OUT \\
        --cells llama-cpu vit-cpu --device cuda --shard $i/2 & done; wait
    for i in 0 1 2 3 4 5; do CUDA_VISIBLE_DEVICES=$((i % 2)) python benchmarks/basis_frontier.py quality \\
        --bench BENCH --folder OUT --device cuda --shard $i/6 & done; wait

The first wants the GPUs for itself: it times on them. The second times by processor time, so that the third may run at
the same time for the cells that are there. On CPU cores alone `--device cpu` does all of it, slowly. Then, anywhere:

    python benchmarks/basis_frontier.py keep --folder OUT --into benchmarks/results/basis
    python benchmarks/basis_frontier.py table --folder benchmarks/results/basis --page docs/benchmarks.md

`keep` adds the rows to files that are committed; of the same run the last one counts. `table` prints them, or writes
the section `basis-frontier` of a page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import frontier
from document import replace_section
from frontier_bench.quality import shape_of
from peers.minitron import MINITRON_DEPTH
from peers.peer import Peer
from peers.shortgpt import SHORTGPT
from peers.slicegpt import SLICEGPT
from rows import Row, read_rows

from hawada_peft.errors import HawAdaError

PEERS: dict[str, Peer] = {"slicegpt": SLICEGPT, "minitron_depth": MINITRON_DEPTH, "shortgpt": SHORTGPT}
CONTESTANTS = ("hawada_rotated", "hawada_one_shot", *PEERS)
BUDGETS = ("1.25", "1.5", "2", "3")
SEEDS = ("0", "1", "2")

WORK = {
    "llama": (
        *("--data", "text_train.npy.xz", "--length", "256", "--batch-size", "16", "--calibration", "64"),
        *("--steps", "300"),
    ),
    "vit": ("--data", "cifar_train.npz", "--batch-size", "64", "--calibration", "256", "--steps", "300"),
}
"""As on the page of the frontier."""

EVALUATION = {"llama": "text_eval.npy", "vit": "cifar_eval.npz"}
REGIMES = {
    "llama-gpu": "prefill:16x512:bfloat16:cuda_graph",
    "vit-gpu": "forward:64:bfloat16:cuda_graph",
    "llama-cpu": "prefill:1x256:float32:eager",
    "vit-cpu": "forward:4:float32:eager",
}
"""By the cell: a teacher, and where it is timed."""

TIMING = {
    "gpu": ("--timing-device", "cuda", "--timing-seconds", "1", "--timing-rounds", "7"),
    "cpu": ("--clock", "cpu", "--threads", "1", "--timing-seconds", "2"),
}


def work(cell: str, options: argparse.Namespace) -> list[str]:
    """What both stages are given."""
    teacher = cell.partition("-")[0]
    given = [str(Path(options.bench) / each) if each.endswith((".xz", ".npz")) else each for each in WORK[teacher]]
    where = ["--teacher", str(Path(options.bench, "teachers", teacher)), "--device", options.device]
    return [*where, *given, "--seeds", *SEEDS, "--contestants", *options.contestants]


def shapes(options: argparse.Namespace) -> None:
    shard, shards = map(int, options.shard.split("/"))
    for cell in options.cells[shard::shards]:
        regime = ("--regime", REGIMES[cell], "--budgets", *options.budgets, *TIMING[cell.rpartition("-")[2]])
        files = ("--table", f"{options.folder}/{cell}-table.json", "--out", f"{options.folder}/{cell}-shapes.jsonl")
        frontier.main(["shapes", *work(cell, options), *regime, *files], PEERS)


def quality(options: argparse.Namespace) -> None:
    for cell in options.cells:
        evaluation = ("--eval", str(Path(options.bench, EVALUATION[cell.partition("-")[0]])), "--shard", options.shard)
        found = f"{options.folder}/{cell}-shapes.jsonl"
        if Path(found).exists():
            out = ("--shapes", found, "--out", f"{options.folder}/{cell}-quality.jsonl", "--part", options.part)
            frontier.main(["quality", *work(cell, options), *evaluation, *out], PEERS)


def keep(options: argparse.Namespace) -> None:
    """Add the rows to those that are committed, without command lines, which name folders."""
    options.into.mkdir(parents=True, exist_ok=True)
    for name in (f"{cell}-{stage}.jsonl" for cell in options.cells for stage in ("shapes", "quality")):
        rows = [*read_rows(options.into / name), *read_rows(f"{options.folder}/{name}")]
        found = {tuple(row[key] for key in ("contestant", "budget", "seed")): row for row in rows}
        lines = [json.dumps({**row, "command": ""}) + "\n" for row in found.values()]
        if lines:
            (options.into / name).write_text("".join(lines), encoding="utf-8")


def table(options: argparse.Namespace) -> None:
    """All cells as Markdown."""
    text = "\n\n".join(each for cell in options.cells if (each := section(options.folder, cell)))
    if options.page:
        replace_section(options.page, "basis-frontier", text)
    else:
        print(text)


def section(folder: str, cell: str) -> str:
    """A cell's table; empty if nothing was measured."""
    found = read_rows(f"{folder}/{cell}-shapes.jsonl")
    measured = [row for row in read_rows(f"{folder}/{cell}-quality.jsonl") if row["budget"] is not None]
    if not measured:
        return ""
    groups: dict[tuple[float, str], dict[int, Row]] = defaultdict(dict)
    for row in measured:
        groups[row["budget"], row["contestant"]][row["seed"]] = row
    metric = {"text": "perplexity", "image": "accuracy / agreement"}[measured[0]["kind"]]
    timed, trained = ("; ".join(dict.fromkeys(row["device"] for row in rows)) for rows in (found, measured))
    dates, versions = ("; ".join(dict.fromkeys(row[name] for row in measured)) for name in ("date", "versions"))
    columns = (
        f"budget | contestant | speedup | parameters | layers, heads, FFN, hidden | seeds | {metric} before | after"
    )
    lines = [
        f"**{cell}**: {REGIMES[cell]}, timed on {timed}, trained on {trained} ({dates}; {versions}).",
        f"| {columns} |\n{'|---' * 8}|",
    ]
    for (budget, name), rows in sorted(groups.items(), key=lambda item: item[0]):
        shape = shape_of(found, name, budget, min(rows))
        if shape is None:
            raise HawAdaError(f"{name} at {budget}x has a quality but no shape in {folder}")
        sizes = shape.get("shape", {})
        axes = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
        every = list(rows.values())
        before, after = ([row[part] for row in every if part in row] for part in ("before", "after"))
        told = {each: str(sizes.get(each) or "all") for each in axes}
        told["num_attention_heads"] += f" of {sizes['head_dim']}" if sizes.get("head_dim") else ""
        cut = ", ".join(told.values())
        lines[-1] += (
            f"\n| {budget:g}x | {name} | {shape['speedup']:.2f}x{'' if shape['met'] else ' (unmet)'} | "
            f"{every[0]['parameters']:,} | {cut} | {len(every)} | {shown(before)} | {shown(after)} |"
        )
    return "\n\n".join(lines)


def shown(found: Sequence[dict[str, float]]) -> str:
    """Means and standard deviations of what was measured."""
    parts = []
    for metric in found[0] if found else ():
        values = [each[metric] for each in found]
        spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        parts.append(f"{statistics.mean(values):.2f}{spread}")
    return " / ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in {"shapes": shapes, "quality": quality, "keep": keep, "table": table}.items():
        part = commands.add_parser(name)
        part.set_defaults(run=run)
        part.add_argument("--folder", required=True, help="for the rows")
        part.add_argument("--cells", nargs="+", choices=REGIMES, default=list(REGIMES))
        if name == "keep":
            part.add_argument("--into", type=Path, required=True, help="a folder of rows")
        if name == "table":
            part.add_argument("--page", type=Path)
        if name in ("keep", "table"):
            continue
        part.add_argument("--bench", required=True, help="a folder: see above")
        part.add_argument("--device", default="cuda", help="of training and importance")
        part.add_argument("--shard", default="0/1", help="I/N: every N-th cell, or run, from the I-th on")
        part.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
        part.add_argument("--budgets", nargs="+", default=BUDGETS)
        part.add_argument("--part", choices=("before", "both"), default="both")
    options = parser.parse_args(arguments)
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    options.run(options)


if __name__ == "__main__":
    main()
