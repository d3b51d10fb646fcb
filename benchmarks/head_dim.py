"""
Narrower heads against fewer heads of a ViT: at the same inner size of attention, and at the same latency.

Narrower heads are `narrow_heads`; whole heads and FFN channels are chosen by Fisher information, refitted by least
squares where that helps. With `--speedups` each attention has the FFN that makes the model so fast: processor time of
one CPU core, or the wall clock of another device, timed in turns with the dense model. With `--budgets` the package's
search finds the shapes, as `find_plan` does: with hidden sizes and sizes of heads, and without both.

    python benchmarks/head_dim.py --teacher TEACHER --data TRAIN.npz --evaluation EVAL.npz --batch-size 64 \\
        --calibration 256 [--speedups 1.18 1.5 2 | --shapes 6x16x280 4x32x224] \\
        [--recover 300 --device cuda --seeds 0 1 2]
    python benchmarks/head_dim.py --teacher TEACHER --data TRAIN.npz --evaluation EVAL.npz --batch-size 64 \\
        --calibration 256 --budgets 1.5 2
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from work import Batch, Bench, add_work_arguments

from hawada_peft import Effort, HawAdaConfig, LatencyBudget, Shape, find_plan, init_gates
from hawada_peft.basis import narrow_heads
from hawada_peft.latency import Clock, Regime, measure_many
from hawada_peft.processes import of_this_rank
from hawada_peft.refit.reconstruction import refit_model
from hawada_peft.vanilla.family import locate

PARTS = (1, 27 / 32, 21 / 32, 1 / 2, 11 / 32)
"""Of the size of a head."""

Sizes = tuple[int, int, int]
"""Heads, features of each, FFN channels."""


def cut(model: PreTrainedModel, batches: list[Batch], heads: int, ffn: int) -> PreTrainedModel:
    """A ViT with its heads and FFN channels that count most, refitted."""
    shape = Shape(num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=ffn)
    if shape.complete(locate(model).dense) == locate(model).dense:
        return model
    gated = get_peft_model(copy.deepcopy(model), HawAdaConfig(gates=("heads", "ffn")))
    init_gates(gated, batches)
    plan = gated.plan(shape)
    gated.apply_plan(plan)
    small = gated.merge_and_unload()
    refit_model(model, small, plan, batches, reduce=of_this_rank)
    return small


class Latencies:
    """
    What models of a ViT's class take.

    Args:
        model: the dense ViT.
        images: of a call.
    """

    def __init__(self, model: PreTrainedModel, images: int) -> None:
        self.model = model
        device = str(model.device)
        self.regime = Regime(mode="forward", batch_size=images, dtype="float32", backend="eager", device=device)
        clock = Clock(time.thread_time) if device == "cpu" else Clock()
        self.effort = Effort(clock=clock, max_rounds=200, max_seconds=60, tolerance=0.003)

    def build(self, sizes: Sizes) -> PreTrainedModel:
        """A model of other sizes, weights at random."""
        config = copy.deepcopy(self.model.config)
        config.num_attention_heads, config.head_dim, config.intermediate_size = sizes
        return type(self.model)(config).to(self.model.device).eval()

    def measure(self, wanted: set[Sizes]) -> dict[Sizes, float]:
        """Milliseconds, all in turns."""
        timings = measure_many({each: self.build(each) for each in sorted(wanted)}, self.regime, effort=self.effort)
        return {each: timing.median_ms for each, timing in timings.items()}


def as_fast(
    dense: Sizes, attentions: list[tuple[int, int]], latencies: Latencies, speedups: list[float]
) -> list[Sizes]:
    """Of each attention, heads and features of each, the FFN that gives the speedups, where there is one."""
    ffn, found = dense[2], list[Sizes]()
    ends = ffn, ffn // 4
    ms = latencies.measure({dense} | {(*each, width) for each in attentions for width in ends})
    for speedup in speedups:
        for each in attentions:
            wide, narrow = (ms[(*each, width)] for width in ends)
            width = ends[1] + (ms[dense] / speedup - narrow) * (ends[0] - ends[1]) / (wide - narrow)
            if 16 <= width <= 1.02 * ffn:
                found.append((*each, min(ffn, round(width / 8) * 8)))
    return found


def searched(bench: Bench, options: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """By budget and by whether bases are searched: the plan's sizes, its speed timed in turns, the refitted model."""
    batches, regime = bench.examples(options.calibration, seed), Latencies(bench.model, options.images).regime
    clock = Clock(time.thread_time) if regime.device == "cpu" else Clock()
    for budget in options.budgets:
        for rotate in (None, False):
            gated = get_peft_model(bench.load(), HawAdaConfig())
            limits = LatencyBudget(speedup=budget, batch_size=options.images, dtype="float32", backend="eager")
            started = time.perf_counter()
            found = find_plan(gated, limits, batches, rotate=rotate, effort=Effort.quick(clock=clock))
            seconds = time.perf_counter() - started
            gated.apply_plan(found.plan)
            small = gated.merge_and_unload(calibration=batches)
            yield {
                "seed": seed,
                "budget": budget,
                "bases": rotate is None,
                "shape": found.best.shape.to_dict(),
                "speedup": round(found.speedup, 3),
                "loss": round(found.best.measured_loss or 0.0, 4),
                "parameters": small.num_parameters(),
                "search_s": round(seconds),
                "steps": dict(found.steps),
                "before": bench.quality(small),
            }


def sizes_of(text: str) -> Sizes:
    """Out of `"6x16x280"`."""
    heads, size, ffn = map(int, text.split("x"))
    return heads, size, ffn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_arguments(parser)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--recover", type=int, default=0, help="steps of distillation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="of narrower heads; parts of the dense one if left out")
    parser.add_argument("--speedups", type=float, nargs="+", help="the FFN of each attention gives these")
    parser.add_argument(
        "--shapes", nargs="+", type=sizes_of, help="these, as 6x16x280: heads, features, FFN; not timed"
    )
    parser.add_argument("--budgets", type=float, nargs="+", help="speedups for which a search finds the shapes")
    parser.add_argument("--images", type=int, default=4, help="of a timed call")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(
        options.teacher,
        options.data,
        options.evaluation,
        device=options.device,
        batch_size=options.batch_size,
        eval_examples=options.eval_examples,
    )
    if options.budgets:
        for seed in options.seeds:
            for row in searched(bench, options, seed):
                print(row, flush=True)
        return
    layout = locate(bench.model)
    heads, ffn = (layout.dense.sizes()[name] for name in ("num_attention_heads", "intermediate_size"))
    dense = heads, layout.head_dim, ffn
    sizes = options.sizes or [round(part * layout.head_dim) for part in PARTS]
    ms: Mapping[Sizes, float] = {}
    if options.shapes:
        work, sizes = options.shapes, sorted({size for _, size, _ in options.shapes})
    elif options.speedups:
        latencies = Latencies(bench.model, options.images)
        attentions = [(heads, size) for size in sizes] + [(count, dense[1]) for count in range(heads, 1, -1)]
        work = as_fast(dense, attentions, latencies, options.speedups)
        ms = latencies.measure({dense, *work})
    else:
        fewer = [(round(heads * size / layout.head_dim), layout.head_dim, ffn) for size in sizes]
        work = [(heads, size, ffn) for size in sizes] + fewer
    for seed in options.seeds:
        batches = bench.examples(options.calibration, seed)
        narrow = {size: narrow_heads(bench.load(), batches, size) for size in sizes} | {layout.head_dim: bench.load()}
        for each in dict.fromkeys(work):
            count, size, width = each
            model = copy.deepcopy(cut(narrow[size], batches, count, width))
            row = {"seed": seed, "heads": f"{count} of {size}", "ffn": width, "parameters": model.num_parameters()}
            if ms:
                row |= {"ms": round(ms[each], 3), "speedup": round(ms[dense] / ms[each], 3)}
            row["before"] = bench.quality(model)
            if options.recover:
                bench.distil(model, options.recover, None, seed)
                row["after"] = bench.quality(model)
            print(row, flush=True)


if __name__ == "__main__":
    main()
