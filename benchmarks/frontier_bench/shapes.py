"""First stage of the frontier bench: for every contestant and budget the size that meets it, by measured latency."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from document import circumstances
from latency_cases import parse_case
from peers.peer import Peer, Prepared, Work
from recipes import Recipe
from rows import Row, append_row, read_rows
from sizing import SHORT, Fit, Stopwatch, Timed, fit_amount
from transformers import PreTrainedModel
from work import Bench, kind_of

from hawada_peft import Plan, Shape, slim
from hawada_peft.basis.bases import gated_bases, plan_turn
from hawada_peft.basis.heads.projections import queries_of
from hawada_peft.errors import InfeasibleBudgetError, UnsupportedModelError
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.table import LatencyTable
from hawada_peft.latency.toy import ToyClock
from hawada_peft.planning.importance import gate_importance
from hawada_peft.search.narrow import NarrowTables
from hawada_peft.search.refitted import RefittedQuality
from hawada_peft.search.rounds import search
from hawada_peft.search.space import narrower_heads, narrower_sizes, search_space
from hawada_peft.search.timed import Timer, measure_table
from hawada_peft.vanilla.family import Layout, locate

Find = Callable[[float], tuple[Plan, PreTrainedModel]]
"""From a speedup to a plan and its slim model."""

PLAIN, ROTATED = "hawada", "hawada_rotated"
"""
The names of the sizes that the package's search finds: without the hidden size, and with it and the size of heads, cut
in bases.
"""

STRICTER = (1.0, 1.01, 1.02, 1.03)
"""What the search is asked for, times the budget, where its answer missed the budget in the contestants' timing."""


def parse_regime(text: str, device: str) -> Regime:
    """`MODE:BATCH[xSEQ]:DTYPE:BACKEND`, e.g. `prefill:1x256:float32:eager`."""
    return parse_case(f":{text}", device).regime


def effort_of(options: argparse.Namespace) -> Effort:
    """How long models are timed, those of the search and those of its peers."""
    rounds = options.timing_rounds
    return Effort(
        min_rounds=rounds,
        max_rounds=4 * rounds,
        max_seconds=options.timing_seconds,
        tolerance=0.004,
        clock=clock_of(options),
    )


def clock_of(options: argparse.Namespace) -> Clock:
    """The time that passes, that of the processor, or a toy's."""
    return {"wall": Clock, "cpu": partial(Clock, time.thread_time), "toy": ToyClock}[options.clock]()


def shapes(options: argparse.Namespace, peers: Mapping[str, Peer]) -> None:
    """
    Write the rows that `options.out` lacks.

    The contestants are shared out, so `--shard` splits them; seeds after the first start from what it found.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    shard, shards = map(int, options.shard.split("/"))
    kind = kind_of(options.data)
    able = [name for name in options.contestants if name in peers and kind in peers[name].kinds]
    mine = set(options.contestants) - set(peers)
    ours = [name for name, some in ((PLAIN, mine - {ROTATED}), (ROTATED, mine & {ROTATED})) if some]
    names = [*ours, *able][shard::shards]
    done = {(row["contestant"], row["budget"], row["seed"]): row for row in read_rows(options.out)}
    wanted = [
        (seed, name, budget)
        for seed in options.seeds
        for name in names
        if name not in ours or seed == options.seeds[0]
        for budget in options.budgets
        if (name, budget, seed) not in done
    ]
    if not wanted:
        return
    regime = parse_regime(options.regime, options.timing_device)
    bench = Bench(
        options.teacher, options.data, device=options.device, length=options.length, batch_size=options.batch_size
    )
    dense = bench.load().to(device=regime.device, dtype=regime.torch_dtype)
    watch = Stopwatch(dense, regime, effort_of(options))
    finders: dict[str, Find] = {}
    prepared: dict[tuple[str, int], Prepared] = {}
    for seed, name, budget in wanted:
        started = time.perf_counter()
        if name in ours:
            if name not in finders:
                finders[name] = searcher(bench, regime, options, rotate=name == ROTATED)
            row = hawada_row(finders[name], watch, budget)
        else:
            if (name, seed) not in prepared:
                prepared = {(name, seed): peers[name].prepare(work_of(bench, budget, seed, options))}
            one = prepared[name, seed]
            if one.steps:
                del prepared[name, seed]  # it was trained for this budget
            earlier = done.get((name, budget, options.seeds[0]))
            row = peer_row(bench, one, watch, budget, earlier)
        row = {"contestant": name, "budget": budget, "seed": seed} | row
        row |= {"regime": str(regime), "teacher": Path(options.teacher).name, "kind": bench.kind}
        row |= {"seconds": round(time.perf_counter() - started, 1)} | circumstances(options.timing_device)
        done[name, budget, seed] = row
        append_row(options.out, row)
        print(
            f"{name}, {budget}x, seed {seed}: {row['speedup']:.3f}x measured{'' if row['met'] else ' (unmet)'}, "
            f"{row['parameters']:,} parameters, {row['timings']} timings, {row['seconds']} s",
            flush=True,
        )


def work_of(bench: Bench, budget: float, seed: int, options: argparse.Namespace) -> Work:
    """What a peer is given."""
    batches = bench.examples(options.calibration, seed, labels=True)
    return Work(bench.load, batches, bench.stream(seed), budget, options.steps, seed)


def peer_row(bench: Bench, prepared: Prepared, watch: Stopwatch, budget: float, earlier: Row | None) -> Row:
    """The smallest amount that meets the budget, from that of another seed if there is one."""
    start = None
    if earlier is not None:
        timed = Timed(**{name: earlier[name] for name in Timed.__dataclass_fields__})
        start = Fit(earlier["amount"], timed, earlier["met"], earlier["timings"])

    def cut(amount: float) -> PreTrainedModel:
        return prepared.cut(bench.load(), amount)

    fit = fit_amount(cut, watch, budget, start=start)
    return {"amount": fit.amount, "steps": prepared.steps} | _row(fit.timed, fit.met, fit.timings)


def hawada_row(find: Find, watch: Stopwatch, budget: float) -> Row:
    """The search's shape, timed as the peers' models are; a stricter search if that misses the budget."""
    for number, factor in enumerate(STRICTER, 1):
        plan, model = find(budget * factor)
        timed = watch(model)
        met = timed.speedup >= SHORT * budget
        if met or number == len(STRICTER):
            break
    return {"shape": plan.shape.to_dict()} | _row(timed, met, number)


def _row(timed: Timed, met: bool, timings: int) -> Row:
    return asdict(timed) | {"speedup": timed.speedup, "met": met, "timings": timings}


def searcher(bench: Bench, regime: Regime, options: argparse.Namespace, *, rotate: bool = False) -> Find:
    """
    The package's search, as `find_plan` runs it, on the clock of the bench. Tables, importance and the loss of what
    was tried are made once, for all budgets. A budget out of reach gives the fastest shape that the tables know.
    """
    base = bench.model
    layout = locate(base)
    batches = bench.examples(options.calibration, options.seeds[0])
    in_heads = rotate and has_narrow_heads(layout)
    model = Recipe(rotate=rotate, narrow_heads=in_heads).model(bench.load(), batches)
    quality = RefittedQuality(model, batches, gate_importance(model, batches))
    tables = [table_for(base, regime, options)]
    streams = narrower_sizes(layout, multiple=tables[0].multiple) if rotate else []
    heads = narrower_heads(layout) if in_heads else []
    pairs = [(stream, size) for stream in (None, *streams) for size in (None, *heads)][1:]
    spaces = [search_space(layout, regime, multiple=tables[0].multiple, free=quality.free)]
    if pairs:
        alone = [*(Shape(hidden_size=size) for size in streams), *(Shape(head_dim=size) for size in heads)]
        narrow = NarrowTables(base, tables[0], alone, table_effort(options))
        for stream, size in pairs:
            both = Shape(hidden_size=stream, head_dim=size)
            tables.append(narrow(both))
            sizes = {"multiple": narrow.multiple(both), "hidden_size": stream, "head_dim": size}
            spaces.append(search_space(layout, regime, free=quality.free, **sizes))
    realise = Timer(base, regime, effort_of(options))

    def cut(shape: Shape) -> tuple[Plan, PreTrainedModel]:
        plan, bases = quality.plan(shape), gated_bases(model.get_base_model(), layout, ["default"])
        return plan, slim(base, plan, turn=plan_turn(base, plan, bases))

    def find(speedup: float) -> tuple[Plan, PreTrainedModel]:
        narrower = list(zip(spaces[1:], tables[1:], strict=True))
        try:
            result = search(spaces[0], tables[0], quality, LatencyBudget(speedup=speedup), realise, narrower=narrower)
        except InfeasibleBudgetError:
            pairs = zip(spaces, tables, strict=True)
            least = [table.estimate_sizes(*space.axes) / table.dense_ms for space, table in pairs]
            part = min(range(len(least)), key=lambda place: float(least[place].min()))
            return cut(spaces[part].shape(int(least[part].argmin())))
        tables[0] = result.table  # corrected by all that was timed
        if options.table:
            result.table.save(options.table)
        return cut(result.best.shape)

    return find


def has_narrow_heads(layout: Layout) -> bool:
    """Whether a model's heads can be made narrower."""
    try:
        return bool(queries_of(layout))
    except UnsupportedModelError:
        return False


def table_effort(options: argparse.Namespace) -> Effort:
    """How long tables are timed."""
    return Effort(
        min_rounds=7, max_rounds=40, max_seconds=options.timing_seconds, cache=False, clock=clock_of(options)
    )


def table_for(base: PreTrainedModel, regime: Regime, options: argparse.Namespace) -> LatencyTable:
    """The dense hidden size's table: from the file `--table`, or measured."""
    path = Path(options.table) if options.table else None
    if path is not None and path.exists():
        table = LatencyTable.load(path)
    else:
        table = measure_table(base, regime, effort=table_effort(options))
        if path is not None:
            table.save(path)
    table.check(regime=regime, base_sizes=locate(base).base_sizes(), device_name=clock_of(options).device_name(regime))
    return table
