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
import time
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes import Recipe, gated
from transformers import AutoConfig
from work import Bench

from hawada_peft import Plan, Shape
from hawada_peft.refit import reconstruct

CONTESTANTS = {
    "fisher": Recipe(aimed=False),
    "start": Recipe(),
    "closing": Recipe("closing"),
    "straight_through": Recipe("straight_through"),
    "hard_concrete": Recipe("hard_concrete"),
    "joint": Recipe("hard_concrete", lora_rank=16),
}
"""
One-shot: `fisher` ranks everything by one gradient, `start` is what `HawAdaTrainer` starts from (layers by dropping
them, the rest by importance without them). The others are trained for --gate-steps, `joint` for --joint-steps.
"""


def recipe_of(name: str, options: argparse.Namespace) -> Recipe:
    """The recipe of a contestant, with the steps and rates that were asked for."""
    recipe = CONTESTANTS[name]
    joint, trained = recipe.lora_rank > 0, recipe.relaxation is not None
    return replace(
        recipe,
        steps=(options.joint_steps if joint else options.gate_steps) if trained else 0,
        gate_rate=options.gate_rate,
        soft_fraction=options.soft_fraction,
        keep_better="never",  # a row is of the trained gates, whatever they are
        lora_rank=options.lora_rank if joint else 0,
        lora_rate=options.lora_rate,
    )


def run(bench: Bench, name: str, shape: Shape, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of one contestant."""
    started = time.perf_counter()
    model, used = gated(bench, recipe_of(name, options), shape, bench.examples(options.calibration, seed), seed)
    plan: Plan = model.applied_plan()  # type: ignore[operator]
    small = model.merge_and_unload().to(bench.device)  # type: ignore[operator]
    row: dict[str, Any] = {"contestant": name, "seed": seed, "layers": list(plan.layers), "steps": used}
    row["gate rate"] = options.gate_rate if used else None
    row["slice"] = bench.quality(small)
    report = reconstruct(bench.model, small, plan, bench.examples(options.calibration, seed + 1000))
    row["reconstruction"] = [report.before, report.after, report.applied]
    row["least squares"] = bench.quality(small)
    for steps in options.steps:
        student = copy.deepcopy(small)
        bench.distil(student, steps - used, options.rate, seed)
        row[f"KD {steps}"] = bench.quality(student)
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
    bench = Bench(
        options.teacher,
        options.train,
        options.eval,
        device=options.device,
        length=options.length,
        eval_length=options.length,
        batch_size=options.batch_size,
        eval_examples=options.eval_examples,
    )
    print(f"dense: {layers} layers, {bench.quality(bench.model)}", flush=True)
    for seed, text, name in runs:
        heads, groups, ffn, depth = map(int, text.split("x"))
        row = {"shape": text} | run(bench, name, Shape(heads, groups, ffn, depth), seed, options)
        print(json.dumps(row), flush=True)
        if options.out:
            with Path(options.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
