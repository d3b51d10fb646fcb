"""Second stage of the frontier bench: the quality of every contestant before and after the same recovery."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from document import circumstances
from peers.peer import Peer
from recipes import Recipe, gated
from rows import Row, append_row, read_rows
from sizing import sizes_of
from transformers import PreTrainedModel
from work import Bench

from frontier_bench.shapes import PLAIN, ROTATED, work_of
from hawada_peft import Plan, Shape
from hawada_peft.basis.bases import gated_bases, plan_turn
from hawada_peft.errors import UntiedEmbeddingsWarning
from hawada_peft.refit import reconstruct
from hawada_peft.vanilla.family import locate

HAWADA = {
    "hawada_one_shot": Recipe(),
    "hawada_trained": Recipe("hard_concrete"),
    "hawada_joint": Recipe("hard_concrete", lora_rank=16),
    "hawada_rotated": Recipe(rotate=True),
}
"""
The package's own contestants. Those that cut the hidden size share a shape, and so do the others; all are refitted by
least squares before anything is measured.
"""

GATE_STEPS = 64
"""Of trained gates; a quarter of all steps where that is less. They are taken off the recovery."""


def shape_name(contestant: str) -> str:
    """Under which name the sizes of a contestant were found."""
    if contestant not in HAWADA:
        return contestant
    return ROTATED if HAWADA[contestant].rotate else PLAIN


def shape_of(shapes: Sequence[Row], contestant: str, budget: float, seed: int) -> Row | None:
    """How a contestant meets a budget: the row of the seed, or else of the first seed that was timed."""
    name = shape_name(contestant)
    found = [row for row in shapes if (row["contestant"], row["budget"]) == (name, budget)]
    return next((row for row in found if row["seed"] == seed), found[0] if found else None)


def runs_of(shapes: Sequence[Row], contestants: Sequence[str], seeds: Sequence[int]) -> list[tuple[int, str, Row]]:
    """(seed, contestant, row of its shape), the first seed of everything before the second."""
    budgets = sorted({row["budget"] for row in shapes})
    runs = [
        (seed, name, shape_of(shapes, name, budget, seed))
        for seed in seeds
        for budget in budgets
        for name in contestants
    ]
    return [(seed, name, row) for seed, name, row in runs if row is not None]


def quality(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """Write the rows that `options.out` lacks."""
    shard, shards = map(int, options.shard.split("/"))
    found = read_rows(options.out)
    # A row of `--part before` does not stand in the way of one with both.
    done = {
        (row["contestant"], row["budget"], row["seed"]) for row in found if options.part == "before" or "after" in row
    }
    runs = runs_of(read_rows(options.shapes), options.contestants, options.seeds)[shard::shards]
    runs = [(seed, name, row) for seed, name, row in runs if (name, row["budget"], seed) not in done]
    dense = shard == 0 and ("dense", None, None) not in done
    if not runs and not dense:
        return
    bench = Bench(
        options.teacher,
        options.data,
        options.eval,
        device=options.device,
        length=options.length,
        eval_length=options.eval_length,
        batch_size=options.batch_size,
        eval_examples=options.eval_examples,
    )
    settings: Row = {"total_steps": options.steps, "eval_examples": sum(len(b["labels"]) for b in bench.held_out)}
    settings |= {"kind": bench.kind, "batch_size": options.batch_size, "calibration": options.calibration}
    settings |= {"length": options.length, "eval_length": options.eval_length} if bench.kind == "text" else {}
    settings |= circumstances(options.device)
    if dense:
        both = bench.quality(bench.model)
        row = {"contestant": "dense", "budget": None, "seed": None, "before": both, "after": both}
        append_row(options.out, row | {"parameters": bench.model.num_parameters()} | settings)
    for seed, name, shape in runs:
        started = time.perf_counter()
        if name in HAWADA:
            model, row = hawada(bench, name, shape, seed, options)
        else:
            model, row = peer(bench, peers[name], shape, seed, options)
        row |= {"parameters": model.num_parameters(), "as_timed": _same_sizes(model, bench, shape)}
        row["before"] = bench.quality(model)
        if options.part == "both":
            bench.distil(model, options.steps - row["steps"], options.rate, seed)
            row["after"] = bench.quality(model)
        row = {"contestant": name, "budget": shape["budget"], "seed": seed} | row
        row |= {"seconds": round(time.perf_counter() - started, 1)} | settings
        append_row(options.out, row)
        print(
            f"{name}, {shape['budget']}x, seed {seed}: {row['before']} {row.get('after', '')} {row['seconds']} s",
            flush=True,
        )


def hawada(
    bench: Bench, name: str, row: Row, seed: int, options: argparse.Namespace
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Gates ranked or trained to the shape, merged, refitted on the batches that everybody calibrates on."""
    recipe = HAWADA[name]
    if recipe.relaxation is not None:
        steps = min(GATE_STEPS, options.steps // 4)
        recipe = replace(recipe, steps=steps, lora_rate=options.lora_rate)
    batches = bench.examples(options.calibration, seed)
    model, used = gated(bench, recipe, Shape.from_dict(row["shape"]), batches, seed)
    plan: Plan = model.applied_plan()
    base = model.get_base_model()
    turn = plan_turn(bench.model, plan, gated_bases(base, locate(base), ["default"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the slim model keeps its plain weights")  # the row says so
        warnings.simplefilter("ignore", UntiedEmbeddingsWarning)
        small = model.merge_and_unload().to(bench.device)
        plain = bench.quality(small)
        coordinates = None if turn is None else turn.write
        report = reconstruct(bench.model, small, plan, batches, coordinates=coordinates)
    return small, {"steps": used, "slice": plain, "reconstructed": report.applied, "layers": list(plan.layers)}


def peer(
    bench: Bench, peer: Peer, row: Row, seed: int, options: argparse.Namespace
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A peer's model, cut by the amount that was found for it."""
    prepared = peer.prepare(work_of(bench, row["budget"], seed, options))
    return prepared.cut(bench.load(), row["amount"]).to(bench.device), {"steps": prepared.steps}


def _same_sizes(model: PreTrainedModel, bench: Bench, row: Row) -> bool:
    """Whether the model has the sizes that were timed; training on another device may have led to others."""
    timed = [tuple(pair) if pair else None for pair in row["sizes"]]
    return sizes_of(model, bench.model) == timed and model.num_parameters() == row["parameters"]
