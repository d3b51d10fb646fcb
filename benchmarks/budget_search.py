"""
Budgets asked for and met: the search run for several speedups in several regimes, its answers timed again.

With teachers in folders the quality is measured on calibration batches:

    python benchmarks/budget_search.py TEACHER:prefill:1x128:float32:eager --calibration text_train.npy \
        --save-curves curves.json

With sizes alone (presets) it is stretched from the curves of a teacher, relative to the dense sizes:

    python benchmarks/budget_search.py llama-3.2-1b:decode:1x1024:bfloat16:cuda_graph --curves curves.json \
        --device cuda
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import lzma
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_cases import Case, add_arguments, parse_case
from peft import get_peft_model

from hawada_peft import HawAdaConfig, Shape
from hawada_peft.errors import InfeasibleBudgetError
from hawada_peft.latency.budget import LatencyBudget
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.effort import Effort
from hawada_peft.latency.table import LatencyTable
from hawada_peft.planning.importance import gate_importance
from hawada_peft.search.answer import frontier
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.result import SearchResult
from hawada_peft.search.rounds import search
from hawada_peft.search.space import SearchSpace, search_space
from hawada_peft.search.state import Quality, Realise
from hawada_peft.search.timed import Timer, measure_table
from hawada_peft.vanilla.family import locate

FRACTIONS = tuple(part / 16 for part in range(1, 17))


class StretchedQuality:
    """A teacher's loss per axis, by the part that is kept, for a model of other sizes. Nothing can be measured."""

    meaning = "stretched from the curves of a teacher"

    def __init__(self, curves: dict[str, list[float]]) -> None:
        self.curves = curves

    def predict(self, space: SearchSpace) -> np.ndarray:
        groups, per_group, ffn, layers = space.axes
        heads, _, size, total = space.dense.sizes().values()
        parts = {"heads": groups * per_group / heads, "ffn": ffn / size, "layers": layers / total}
        return sum(np.interp(part, FRACTIONS, self.curves[axis]) for axis, part in parts.items())

    def evaluate(self, shape: Shape) -> None:
        return None

    def plan(self, shape: Shape) -> None:
        return None


def curves_of(quality: MaskedQuality, space: SearchSpace) -> dict[str, list[float]]:
    """The predicted loss of each axis alone, at sixteenths of it."""
    loss = quality.predict(space)
    heads, _, size, total = space.dense.sizes().values()
    full = loss[-1, :, -1]
    pairs = sorted({(pair.num_attention_heads / heads, float(full[i])) for i, pair in enumerate(space.heads)})
    best = [(part, min(nats for at, nats in pairs if at == part)) for part in sorted({p for p, _ in pairs})]
    dense = space.index(space.dense)
    row = np.unravel_index(dense, loss.shape)
    return {
        "heads": np.interp(FRACTIONS, *zip(*best, strict=True)).tolist(),
        "ffn": np.interp(FRACTIONS, [f / size for f in space.ffn], loss[row[0], row[1], :]).tolist(),
        "layers": np.interp(FRACTIONS, [n / total for n in space.layers], loss[:, row[1], row[2]]).tolist(),
    }


@dataclass(frozen=True)
class Answer:
    """What the search found for a budget, and both models timed again afterwards."""

    result: SearchResult
    seconds: float
    dense_ms: float
    ms: float

    @property
    def limit_ms(self) -> float:
        """What the budget allows of the dense model's latency, as timed again."""
        return self.result.budget.limit_ms(self.dense_ms)


def answer(
    space: SearchSpace,
    table: LatencyTable,
    quality: Quality,
    budget: LatencyBudget,
    realise: Realise,
    again: Realise,
    repeats: int = 3,
) -> Answer:
    """
    Search, then build and time the answer and the dense model anew; the median ratio counts.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget.
    """
    started = time.perf_counter()
    result = search(space, table, quality, budget, realise)
    seconds = time.perf_counter() - started
    runs = [again([result.best.shape]) for _ in range(repeats)]
    pairs = sorted((t[result.best.shape].median_ms / t[space.dense].median_ms, t[space.dense].median_ms) for t in runs)
    ratio, dense = pairs[len(pairs) // 2]
    return Answer(result, seconds, dense, ratio * dense)


def pass_seconds(space: SearchSpace, table: LatencyTable, losses: np.ndarray) -> float:
    """What estimating all shapes and finding the best for every latency takes."""
    started = time.perf_counter()
    frontier(table.estimate_sizes(*space.axes).numpy().ravel(), losses.ravel())
    return time.perf_counter() - started


def calibration_batches(path: str, case: Case, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one row of text (tokens in .npy or .npy.xz) or of eight images (.npz with jpeg, offsets)."""
    device = case.regime.device
    if path.endswith(".npz"):
        from PIL import Image

        data = np.load(path)
        offsets, jpeg = data["offsets"], data["jpeg"]
        images = []
        for start, end in list(itertools.pairwise(offsets))[: 8 * count]:
            with Image.open(io.BytesIO(jpeg[start:end].tobytes())) as image:
                images.append(np.asarray(image.convert("RGB"), dtype=np.float32))
        pixels = torch.from_numpy((np.stack(images) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous().to(device)
        return [{"pixel_values": pixels[start : start + 8]} for start in range(0, len(pixels), 8)]
    opened = lzma.open(path) if path.endswith(".xz") else open(path, "rb")  # noqa: SIM115
    with opened as file:
        tokens = np.load(io.BytesIO(file.read()))
    rows = torch.from_numpy(tokens[: count * 256].astype(np.int64)).reshape(count, 256).to(device)
    return [{"input_ids": rows[index : index + 1]} for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--budgets", default="speedup=1.25,speedup=1.5,speedup=2")
    parser.add_argument("--calibration", default="", help="a file of calibration data, for teachers")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--curves", default="", help="a file of curves, for presets")
    parser.add_argument("--save-curves", default="")
    parser.add_argument("--table-seconds", type=float, default=6.0, help="per group of timed models")
    parser.add_argument("--search-seconds", type=float, default=15.0, help="per round of the search")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    columns = "case, asked, limit ms, dense ms, timed again ms, over asked, x, layers, heads/KV, FFN, nats, rounds, s"
    print("| " + columns.replace(", ", " | ") + " |")
    print("|" + "---|" * 13)
    raw: list[dict[str, Any]] = []
    clock = Clock(time.thread_time) if options.cpu_time else Clock()
    for text in options.cases:
        case = parse_case(text, options.device)
        base = case.load()
        layout = locate(base)
        quick = Effort(min_rounds=7, max_rounds=40, max_seconds=options.table_seconds, cache=False, clock=clock)
        table = measure_table(base, case.regime, effort=quick)
        space = search_space(layout, case.regime, multiple=table.multiple)
        if options.calibration:
            batches = calibration_batches(options.calibration, case, options.batches)
            model = get_peft_model(base, HawAdaConfig())
            started = time.perf_counter()
            quality: Any = MaskedQuality(model, batches, gate_importance(model, batches))
            quality.predict(space)
            print(f"quality curves: {time.perf_counter() - started:.0f} s")
            if options.save_curves:
                Path(options.save_curves).write_text(json.dumps(curves_of(quality, space)), encoding="utf-8")
        else:
            quality = StretchedQuality(json.loads(Path(options.curves).read_text(encoding="utf-8")))
        seconds = pass_seconds(space, table, quality.predict(space))
        print(f"one pass over {len(space):,} shapes: {seconds:.3f} s; table {table.seconds:.0f} s; {table}")
        effort = replace(quick, min_rounds=15, max_rounds=100, max_seconds=options.search_seconds, tolerance=0.003)
        realise = Timer(base, case.regime, effort)
        again = Timer(base, case.regime, replace(effort, max_rounds=150))
        for asked in options.budgets.split(","):
            name, _, value = asked.partition("=")
            budget = LatencyBudget(**{name: float(value)})
            try:
                found = answer(space, table, quality, budget, realise, again)
            except InfeasibleBudgetError as error:
                print(f"| {case} | {asked} | infeasible: {error} |")
                continue
            result, dense, ms, limit = found.result, found.dense_ms, found.ms, found.limit_ms
            table = result.table
            best, loss = result.best.shape.sizes(), result.best.measured_loss
            print(
                f"| {case} | {asked} | {limit:.3f} | {dense:.3f} | {ms:.3f} | {ms / limit:.4f} | {dense / ms:.3f} | "
                f"{best['num_hidden_layers']} | {best['num_attention_heads']}, {best['num_key_value_heads']}"
                f" | {best['intermediate_size']} | "
                f"{result.best.predicted_loss if loss is None else loss:.4f} | {result.rounds} | {seconds:.0f} |",
                flush=True,
            )
            points = [[c.estimate_ms, c.predicted_loss, c.shape.to_dict()] for c in result.frontier]
            raw.append({"case": text, "asked": asked, "best": best, "ms": ms, "dense": dense, "frontier": points})
            if options.out:
                Path(options.out).write_text(json.dumps(raw), encoding="utf-8")


if __name__ == "__main__":
    main()
