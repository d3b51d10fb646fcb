"""
Estimated against measured latency over random legal shapes that the table has not seen.

    python benchmarks/latency_error.py llama-3.2-1b:prefill:8x1024:bfloat16:eager vit-b16:forward:64:float32:eager \
        --device cuda
    python benchmarks/latency_error.py TEACHER_FOLDER:prefill:1x128:float32:eager --device cpu --threads 1

Decode, whole answers, experts and the text tower of a model of images and text, on a CPU core shared with other work:

    python benchmarks/latency_error.py llama-small:decode:4x256:float32:eager \
        llama-small:generate:1x64+16:float32:eager mixtral-small:prefill:1x64:float32:eager \
        llava-small:prefill:1x64:float32:eager --threads 1 --cpu-time --tie

Of several towers that run in a call the shapes are combinations, and what each tower saves is added, as a search does:

    python benchmarks/latency_error.py clip-small:forward:4x16:float32:eager --towers text_config vision_config \
        --threads 1 --cpu-time --tie

Of narrower residual streams too, by tables as a search has them: of the narrowest measured, of others between:

    python benchmarks/latency_error.py llama-3.2-1b:prefill:8x1024:bfloat16:eager vit-b16:forward:64:float32:eager \
        --device cuda --hidden 1 0.75 0.5 --tie --table-seconds 2 --check-seconds 3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_cases import Case, add_arguments, parse_case, rank_correlation
from peft import get_peft_model
from transformers import PreTrainedModel

from hawada_peft import HawAdaConfig
from hawada_peft.latency.build import random_shapes
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.measuring import measure_built
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.timing import Timing
from hawada_peft.planning.sizes import hidden_multiple
from hawada_peft.search.narrow import NarrowTables
from hawada_peft.search.timed import check_regime, measure_table
from hawada_peft.search.timed_models import realiser, realiser_of
from hawada_peft.search.together import Numbers, Together
from hawada_peft.vanilla.family import locate
from hawada_peft.vanilla.legality import fit_hidden, legal_head_shapes
from hawada_peft.vanilla.shape import Shape


def tables_of(
    options: argparse.Namespace, effort: Effort, cases: Sequence[str]
) -> Iterator[tuple[Case, str, PreTrainedModel, LatencyTable]]:
    """Of each case and each of its hidden sizes, in the order asked for: the table, and what it is of."""
    for text in cases:
        case = parse_case(text, options.device)
        model = case.load()
        layout, dense = locate(model), measure_table(model, case.regime, effort=effort)
        wishes = [replace(layout.dense, hidden_size=round(part * layout.hidden_size)) for part in options.hidden]
        step = hidden_multiple(layout, 1)
        sizes = [layout.complete(fit_hidden(layout, wish, step=step)).hidden_size for wish in wishes]
        narrower = [size for size in sizes if size not in (None, layout.hidden_size)]
        cut = [Shape(hidden_size=size) for size in narrower]
        narrow = NarrowTables(model, dense, cut, effort) if narrower else None
        for size in sizes:
            yield case, text, model, narrow(Shape(hidden_size=size)) if narrow and size in narrower else dense


def sizes_of(shape: Shape | Together) -> list[dict[str, int]]:
    """Of every tower, for JSON."""
    return [each.to_dict() for each in (shape.shapes if isinstance(shape, Together) else (shape,))]


def in_combination(options: argparse.Namespace, effort: Effort, checked: Effort, case: Case) -> dict[str, Any]:
    """Combinations of random shapes of several towers: what is expected of them, and what they take."""
    model = get_peft_model(case.load(), HawAdaConfig(towers=tuple(options.towers))).get_base_model()
    layouts = check_regime(model, case.regime)
    tables = [measure_table(model, case.regime, effort=effort, tower=layout.tower) for layout in layouts]
    drawn = [
        random_shapes(layout.dense, legal_head_shapes(layout), table.multiple, options.shapes, seed=12345 + number)
        for number, (layout, table) in enumerate(zip(layouts, tables, strict=True))
    ]
    numbers, build = Numbers.of(layouts), realiser_of(layouts, case.regime)
    found = [numbers.complete(shapes) for shapes in zip(*drawn, strict=True)]
    dense = Together(tuple(layout.dense for layout in layouts))
    timings = measure_built(lambda each: build(each.shapes), found, case.regime, reference=dense, effort=checked)
    saved = [
        sum(1 - table.estimate(shape) / table.dense_ms for table, shape in zip(tables, each.shapes, strict=True))
        for each in found
    ]
    estimates = tables[0].dense_ms * (1 - np.array(saved))
    return {
        "case": f"{case}, {len(layouts)} towers",
        "table": tables[0],
        "seconds": sum(table.seconds for table in tables),
        "shapes": found,
        "dense": dense,
        "timings": timings,
        "estimates": estimates,
        "affine": estimates,
    }


def alone(
    options: argparse.Namespace, checked: Effort, case: Case, model: PreTrainedModel, table: LatencyTable
) -> dict[str, Any]:
    """Random shapes of a hidden size: what is expected of them, and what they take."""
    layout, size = locate(model), None
    if "dense_hidden_size" in table.base_sizes:
        size = int(table.base_sizes["hidden_size"])
    heads, build = legal_head_shapes(layout, size), realiser(layout, case.regime)
    shapes = random_shapes(layout.narrowed(size), heads, table.multiple, options.shapes, seed=12345)
    affine = replace(table, realised=())
    return {
        "case": str(case) if size is None else f"{case}, hidden {size}",
        "table": table,
        "seconds": table.seconds,
        "shapes": shapes,
        "dense": layout.dense,
        "timings": measure_built(build, shapes, case.regime, reference=layout.dense, effort=checked),
        "estimates": np.array([table.estimate(shape) for shape in shapes]),
        "affine": np.array([affine.estimate(shape) for shape in shapes]),
    }


def checked_cases(options: argparse.Namespace, effort: Effort) -> Iterator[dict[str, Any]]:
    """Everything that is asked for, in that order."""
    checked = replace(effort, min_rounds=10, max_rounds=60, max_seconds=options.check_seconds, tolerance=0.005)
    for text in options.cases:
        if options.towers:
            yield in_combination(options, effort, checked, parse_case(text, options.device)) | {"text": text}
        else:
            for case, _, model, table in tables_of(options, effort, [text]):
                yield alone(options, checked, case, model, table) | {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--shapes", type=int, default=30)
    parser.add_argument("--hidden", type=float, nargs="+", default=[1.0], help="parts of the dense hidden size")
    parser.add_argument("--towers", nargs="+", default=[], help="of the model, whose sizes vary together")
    parser.add_argument("--table-seconds", type=float, default=6.0, help="per group of timed models")
    parser.add_argument(
        "--tie", action="store_true", help="scale by the dense model timed beside the shapes, where the machine drifts"
    )
    parser.add_argument("--check-seconds", type=float, default=15.0, help="per group of timed models")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    columns = "case, dense ms, table s, multiple, shapes, median, p95, max, bias, rank, affine median, affine p95"
    print("| " + columns.replace(", ", " | ") + " |")
    print("|" + "---|" * 12)
    raw = []
    clock = Clock(time.thread_time) if options.cpu_time else Clock()
    effort = Effort(min_rounds=7, max_rounds=40, max_seconds=options.table_seconds, cache=False, clock=clock)
    for each in checked_cases(options, effort):
        shapes, table, estimates = each["shapes"], each["table"], each["estimates"]
        timings: Mapping[Any, Timing] = each["timings"]
        again = timings[each["dense"]].median_ms
        scale = table.dense_ms / again if options.tie else 1.0
        real = np.array([timings[shape].median_ms * scale for shape in shapes])
        spread = max(timing.error for timing in timings.values())
        error, rough = np.abs(estimates / real - 1), np.abs(each["affine"] / real - 1)
        found = (np.median(error), np.percentile(error, 95), error.max(), np.median(estimates / real - 1))
        shares = " | ".join(f"{value:.2%}" for value in found)
        print(
            f"| {each['case']} | {table.dense_ms:.3f} | {each['seconds']:.0f} | {table.multiple} | {len(shapes)} | "
            f"{shares} | {rank_correlation(estimates, real):.4f} | {np.median(rough):.2%} | "
            f"{np.percentile(rough, 95):.2%} |",
            flush=True,
        )
        print(f"timers known to {spread:.2%} at worst", file=sys.stderr, flush=True)
        points = [
            {"shape": sizes_of(shape), "ms": ms, "estimate": e}
            for shape, ms, e in zip(shapes, real.tolist(), estimates.tolist(), strict=True)
        ]
        raw.append(
            {
                "case": each["text"],
                "what": each["case"],
                "dense_again": again,
                "spread": spread,
                "table": table.to_dict(),
                "points": points,
            }
        )
        if options.out:
            Path(options.out).write_text(json.dumps(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
