"""
Hidden width cut in a basis of the residual stream, and what it costs.

How far a rotated model differs from the dense one, for every family, in float32 and float64, and what is refused:

    python benchmarks/basis.py exact

Perplexity, or accuracy and agreement with the teacher, at some hidden sizes, cut as channels (Fisher) and in a basis,
before and after some steps of distillation; rows are appended to a file as they come, and done ones left out:

    python benchmarks/basis.py sizes --teacher TEACHER --data TRAIN --evaluation EVAL --sizes 336 288 240 \\
        --rows rows.jsonl [--steps 300 --rates 2e-4 5e-4 --device cuda --shard 0/4]

What finding a basis takes, of a model of some sizes with random weights:

    python benchmarks/basis.py seconds --model llama-3.2-1b --dtype bfloat16 --windows 16 --length 512 --device cuda

The picture of these rows:

    python benchmarks/basis.py picture rows.jsonl docs/pictures/basis.png
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from exactness import build
from latency_cases import PRESETS, random_inputs, random_model
from peft import get_peft_model
from rows import append_row, read_rows
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from work import Bench, add_work_arguments

from hawada_peft import HawAdaConfig, Plan
from hawada_peft.basis.basis import Basis
from hawada_peft.basis.find import find_basis
from hawada_peft.basis.proof import check_exact
from hawada_peft.basis.rotation import rotate, slim_in_basis
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.errors import HawAdaError, IllegalShapeError
from hawada_peft.planning.importance import gate_importance
from hawada_peft.surgery.slimming import slim
from hawada_peft.vanilla.family import FAMILIES, Family, locate, register_family
from hawada_peft.vanilla.legality import check_legal
from hawada_peft.vanilla.outputs import output_of
from hawada_peft.vanilla.rehoming import rehome
from hawada_peft.vanilla.rows.llama import LLAMA

POST_NORMS = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Families with norms between the blocks and the stream, and rows that someone might write for them."""


def wide_norms(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' RMSNorms compute in float32 whatever they get: torch's own in their place."""
    for name, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def rotated_difference(model_type: str, dtype: torch.dtype, *, wide: bool) -> float:
    """Of the outputs of a model and of `rotate` of it, relative to the largest output."""
    model = build(model_type, dtype)
    inputs = example_inputs(model)
    batch = {
        name: torch.randn(64, *each.shape[1:]).to(dtype)
        if each.is_floating_point()
        else torch.randint(128, (16, *each.shape[1:]))
        for name, each in inputs.items()
    }
    found = rotate(model, [batch])
    pair = [wide_norms(each) if wide else each for each in (model, found)]
    dense, turned = (output_of(each, inputs) for each in pair)
    return float((dense - turned).abs().max() / dense.abs().max())


def exact() -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    print("| family | float32 | float64 | float64, norms too |\n|---|---|---|---|")
    for model_type in list(FAMILIES):
        kinds = ((torch.float32, False), (torch.float64, False), (torch.float64, True))
        found = [rotated_difference(model_type, dtype, wide=wide) for dtype, wide in kinds]
        print(f"| {model_type} | {' | '.join(f'{each:.1e}' for each in found)} |", flush=True)
    print("| family | |\n|---|---|")
    for model_type, norms in POST_NORMS.items():
        row: Family = replace(LLAMA, hidden_norms=norms, twin="", twin_fields=())
        register_family(model_type, row)
        try:
            check_exact(locate(build(model_type, torch.float64)))
            print(f"| {model_type} | not refused |")
        except HawAdaError as error:
            print(f"| {model_type} | refused: {error} |")


class Cuts:
    """The cut models of one teacher: every choice is made once, when it is first needed."""

    def __init__(self, bench: Bench, calibration: int, seed: int) -> None:
        self.bench, self.model, self.layout = bench, bench.model, locate(bench.model)
        self.batches = bench.examples(calibration, seed)
        self.seed = seed
        self._order: list[int] = []
        self._bases: dict[str, Basis] = {}

    def cut(self, choice: str, size: int) -> PreTrainedModel:
        dense = replace(self.layout.dense, hidden_size=self.layout.hidden_size)
        plan = replace(Plan.keep_all(self.layout.dense), dense=dense, hidden=self.kept(choice, size))
        plan = replace(plan, rotated=choice != "channels")
        home: PreTrainedModel = self.model
        try:
            check_legal(self.layout, plan.shape)
        except IllegalShapeError:
            home = rehome(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if choice == "channels":
                return slim(home, plan)
            return slim_in_basis(home, plan, self.basis(choice), keep_tied=choice == "tied")

    def kept(self, choice: str, size: int) -> tuple[int, ...]:
        if choice != "channels":
            return tuple(range(size))
        if not self._order:
            gated = get_peft_model(self.bench.load(), HawAdaConfig(gates=("hidden",)))
            (importance,) = gate_importance(gated, self.batches).values()
            self._order = importance.argsort(descending=True, stable=True).tolist()
        return tuple(sorted(self._order[:size]))

    def basis(self, choice: str) -> Basis:
        if choice not in self._bases:
            start = time.perf_counter()
            if choice == "unscaled":
                found = self.basis("basis")
                found = replace(found, scales=torch.ones_like(found.scales))
            else:
                found = find_basis(self.model, self.batches, seed=self.seed)
            self._bases[choice] = found
            print(f"{choice}: {time.perf_counter() - start:.1f} s, {found.nbytes / 1e6:.1f} MB", flush=True)
        return self._bases[choice]


def sizes(options: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    index, shards = (int(part) for part in options.shard.split("/"))
    jobs = list(itertools.product(options.choices, options.sizes, options.seeds, options.rates))[index::shards]
    keys = ("teacher", "choice", "size", "seed", "rate", "steps", "calibration")
    done = {tuple(row[key] for key in keys) for row in read_rows(options.rows)} if options.rows else set()
    bench = Bench(
        options.teacher,
        options.data,
        options.evaluation,
        device=options.device,
        length=options.length,
        eval_length=options.eval_length,
        batch_size=options.batch_size,
        eval_examples=options.eval_examples,
    )
    print("dense", bench.quality(bench.model), flush=True)
    cuts: dict[int, Cuts] = {}
    for choice, size, seed, rate in jobs:
        row: dict[str, Any] = dict(zip(keys, (options.teacher, choice, size, seed, rate, options.steps,
                                              options.calibration), strict=True))  # fmt: skip
        if tuple(row[key] for key in keys) in done:
            continue
        if seed not in cuts:
            cuts[seed] = Cuts(bench, options.calibration, seed)
        student = cuts[seed].cut(choice, size)
        row |= {"device": options.device, "parameters": student.num_parameters(), "before": bench.quality(student)}
        if options.steps:
            bench.distil(student, options.steps, rate, seed)
            row["after"] = bench.quality(student)
        print(row, flush=True)
        if options.rows:
            append_row(options.rows, row)


def seconds(options: argparse.Namespace) -> None:
    """Of the wall clock and of the processor, and the most memory beside the model's."""
    model = random_model(PRESETS[options.model], getattr(torch, options.dtype), options.device)
    cuda = model.device.type == "cuda"
    batches = [random_inputs(model, 1, options.length) for _ in range(options.windows)]
    before = 0
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    found = find_basis(model, batches)
    if cuda:
        torch.cuda.synchronize()
    peak = f", {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB beside the model" if cuda else ""
    print(
        f"{options.model}, {options.dtype}, {options.windows} windows of {options.length} on {options.device}, "
        f"{torch.get_num_threads()} threads: {time.perf_counter() - wall:.1f} s, "
        f"{time.process_time() - processor:.1f} s of the processor{peak}; {found.nbytes / 1e6:.1f} MB"
    )


def picture(options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    rows = [row for row in read_rows(options.rows) if row["steps"] == 0]
    for choice, label in (("basis", "directions of a basis"), ("channels", "channels (Fisher)")):
        mine = sorted((row for row in rows if row["choice"] == choice), key=lambda row: row["size"])
        metric = "accuracy" if "accuracy" in mine[0]["before"] else "perplexity"
        axes.plot([row["size"] for row in mine], [row["before"][metric] for row in mine], marker="o", label=label)
    axes.set_xlabel("hidden size")
    axes.set_ylabel(f"{metric}, without training")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("exact")
    some = commands.add_parser("sizes")
    add_work_arguments(some)
    some.add_argument("--evaluation", required=True)
    some.add_argument("--sizes", type=int, nargs="+", required=True)
    some.add_argument("--choices", nargs="+", default=["basis", "channels"], help="also: unscaled, tied")
    some.add_argument("--seeds", type=int, nargs="+", default=[0])
    some.add_argument("--rates", type=float, nargs="+", default=[2e-4])
    some.add_argument("--eval-length", type=int, default=512)
    some.add_argument("--eval-examples", type=int, help="windows or images, from the start of the file")
    some.add_argument("--shard", default="0/1", help="i/n: every n-th job from the i-th on")
    some.add_argument("--rows", help="file of JSON lines to append to")
    some.set_defaults(steps=0)
    timed = commands.add_parser("seconds")
    timed.add_argument("--model", choices=PRESETS, default="llama-3.2-1b")
    timed.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    timed.add_argument("--windows", type=int, default=16)
    timed.add_argument("--length", type=int, default=512)
    timed.add_argument("--device", default="cpu")
    drawn = commands.add_parser("picture")
    drawn.add_argument("rows")
    drawn.add_argument("output")
    options = parser.parse_args()
    {"exact": lambda _: exact(), "sizes": sizes, "seconds": seconds, "picture": picture}[options.command](options)


if __name__ == "__main__":
    main()
