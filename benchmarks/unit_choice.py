"""
Which units go, and what a recovery learns from: criteria, gates and objectives at one shape, data and cost.

    python benchmarks/unit_choice.py criteria TEACHER TRAIN EVAL --case 13-18:9x3x1280 --device cuda --out rows.jsonl
    python benchmarks/unit_choice.py objectives TEACHER TRAIN EVAL --case 13-18:9x3x1536 --device cuda --out rows.jsonl
    python benchmarks/unit_choice.py table rows.jsonl

A case is the layers that go (`13-18`, `2+4`, `none`) and the sizes that stay (query heads x KV groups x FFN channels).
`criteria`: every contestant chooses which heads and channels go in the model without these layers; the result is
measured sliced, refitted by least squares, and after `--steps` of recovery from either. Steps that gates were trained
for are taken off the recovery's. `objectives`: one start, several losses of the recovery. A row that stands in --out
is not made again; with --shard I/N only every N-th run is made.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers.criteria import Moments, observe
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import PreTrainedModel
from work import Batch, Bench, whole

from hawada_peft import HawAdaConfig, HawAdaTrainer, Plan, Shape, collect_gates
from hawada_peft.distil.muon import MuonAdamW, matrices_of
from hawada_peft.gates.rows import theta_per_row
from hawada_peft.planning.importance import gate_importance
from hawada_peft.refit import reconstruct
from hawada_peft.vanilla.family import Layout, locate

Scores = Mapping[str, torch.Tensor]
"""By the names of `collect_gates`: what each unit is worth, of the gate's shape."""


@dataclass(frozen=True)
class Case:
    """What goes: whole layers, and down to which sizes the others are cut."""

    text: str
    layers: tuple[int, ...]
    shape: Shape

    @classmethod
    def of(cls, text: str, layout: Layout) -> Case:
        """From `13-18:9x3x1280`."""
        gone, sizes = text.split(":")
        dropped: set[int] = set()
        for part in [] if gone == "none" else gone.split("+"):
            first, _, last = part.partition("-")
            dropped |= set(range(int(first), int(last or first) + 1))
        layers = tuple(layer for layer in range(layout.dense.sizes()["num_hidden_layers"]) if layer not in dropped)
        heads, groups, ffn = map(int, sizes.split("x"))
        return cls(text, layers, Shape(heads, groups, ffn, len(layers)))


def plan_of(case: Case, layout: Layout, scores: Scores | None = None) -> Plan:
    """The plan that keeps the best units of the layers that stay; without scores everything in them."""
    dense = layout.dense.sizes()
    heads, channels = [], []
    for layer in case.layers:
        if scores is None:
            heads.append(tuple(range(dense["num_attention_heads"])))
            channels.append(tuple(range(dense["intermediate_size"])))
            continue
        per_group = layout.dense.heads_per_group
        table = scores[f"{layout.attention_out(layer)}"].reshape(-1, per_group)
        groups = _top(table.sum(1), case.shape.num_key_value_heads or 1)
        keep = case.shape.heads_per_group
        heads.append(tuple(g * per_group + h for g in groups for h in _top(table[g], keep)))
        channels.append(tuple(_top(scores[f"{layout.ffn_out(layer)}"].flatten(), case.shape.intermediate_size or 1)))
    return Plan(dense=layout.dense, layers=case.layers, heads=tuple(heads), channels=tuple(channels))


def _top(values: torch.Tensor, count: int) -> list[int]:
    return sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist())


def module_of(name: str) -> str:
    """The module that a gate sits on, by its name in `collect_gates`."""
    return name.split(".hawada_")[0].removeprefix("base_model.model.")


def by_module(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of unit gates by the name of the module that they sit on."""
    return {module_of(name): value.flatten() for name, value in values.items() if value.numel() > 1}


# ------------------------------------------------------------------ criteria


def fisher(model: PeftModel, batches: Sequence[Batch], without: Plan) -> Scores:
    """Squared gradients of the loss on targets that the model without the layers draws."""
    return by_module(gate_importance(model, batches, without))


def text(model: PeftModel, batches: Sequence[Batch], without: Plan) -> Scores:
    """Squared gradients of the loss on the text's own next tokens, or the images' labels."""
    labelled = [batch if "labels" in batch else batch | {"labels": batch["input_ids"]} for batch in batches]
    return by_module(gate_importance(model, labelled, without))


def kl_gradients(model: PeftModel, batches: Sequence[Batch], without: Plan) -> dict[str, torch.Tensor]:
    """(examples, units) per module: each example's gradient of the KL to the dense model, without the layers."""
    gates = {name: gate for name, gate in collect_gates(model).items() if gate.units > 1}
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    model.eval()
    for batch in batches:
        batch = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), model.disable_adapter():
            dense = functional.log_softmax(model(**batch).logits.float(), dim=-1)
        for gate in gates.values():
            gate.theta.requires_grad_(True)
        model.set_masks(without)
        size = len(dense)
        with theta_per_row(list(gates.values()), size) as thetas:
            found = functional.log_softmax(model(**batch).logits.float(), dim=-1)
            loss = functional.kl_div(found, dense, reduction="none", log_target=True).sum(-1)
            loss = loss.reshape(size, -1).mean(1).sum()
            for name, gradient in zip(gates, torch.autograd.grad(loss, thetas), strict=True):
                rows[name].append(gradient.double().reshape(size, -1).cpu())
        model.set_masks(None)
    return {module_of(name): torch.cat(parts) for name, parts in rows.items()}


def divergence(model: PeftModel, batches: Sequence[Batch], without: Plan) -> Scores:
    """Squared gradients of the KL to the dense model, at the model without the layers."""
    return {name: g.square().mean(0) for name, g in kl_gradients(model, batches, without).items()}


def activations(weighted: bool) -> Callable[[PeftModel, Sequence[Batch], Plan], Scores]:
    """Energy of what enters the output projections, times (Wanda-sp) the squared norm of their columns, or alone."""

    def score(model: PeftModel, batches: Sequence[Batch], without: Plan) -> Scores:
        model.eval()
        model.set_masks(without)
        base = model.get_base_model()
        layout = locate(base)
        ends = {
            end: base.get_submodule(end)
            for layer in range(layout.dense.sizes()["num_hidden_layers"])
            for end in (layout.attention_out(layer), layout.ffn_out(layer))
        }
        moments = {end: Moments() for end in ends}
        observe(model, batches, [(ends[end].get_base_layer(), moments[end].see) for end in ends])
        model.set_masks(None)
        scores = {}
        for end, module in ends.items():
            energy = (moments[end].squares / moments[end].tokens).cpu()
            if weighted:
                energy = energy * module.get_base_layer().weight.detach().double().square().sum(0).cpu()
            units = collect_units(model, end)
            scores[end] = energy.reshape(units, -1).sum(1)
        return scores

    return score


def collect_units(model: PeftModel, end: str) -> int:
    """Units of the gate at a module."""
    adapter = model.get_base_model().get_submodule(end)
    return max(gate.units for gate in adapter.gates("default").values())


def swaps(model: PeftModel, batches: Sequence[Batch], without: Plan, case: Case, layout: Layout) -> Scores:
    """
    Block-Fisher selection with compensation: in each module the units P go for which
    `min_m |G_P 1 + G_K m|^2 + l|m|^2` is least, G the per-example gradients of the KL: greedily, one after the other.

    Backward elimination of OBS (Hassibi, Stork, 1993) on the gates: with H = GᵀG + l I the unit of least
    `m_q^2 / [H^-1]_qq` goes, and the others' scales m take up what it did.
    """
    scores = {}
    for end, gradients in kl_gradients(model, batches, without).items():
        g = gradients / max(1e-12, float(gradients.norm()))
        units = g.shape[1]
        hessian = g.T @ g
        hessian += torch.eye(units, dtype=g.dtype) * (1e-1 * hessian.diagonal().mean() + 1e-20)
        inverse, scale = torch.linalg.inv(hessian), torch.ones(units, dtype=g.dtype)
        alive, order = torch.ones(units, dtype=torch.bool), []
        heads = end.endswith(layout.family.attention_out)
        keep = (case.shape.num_attention_heads if heads else case.shape.intermediate_size) or 1
        for _ in range(units - keep):
            cost = torch.where(alive, scale.square() / inverse.diagonal(), torch.inf)
            q = int(cost.argmin())
            scale = scale - inverse[:, q] * (scale[q] / inverse[q, q])
            inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
            alive[q] = False
            scale[q] = 0.0
            inverse[q, q] = 1.0
            order.append(q)
        rank = torch.full((units,), float(units), dtype=g.dtype)
        rank[order] = torch.arange(len(order), dtype=g.dtype)
        scores[end] = rank
    return scores


def autocast(bench: Bench) -> torch.autocast:
    """bf16 on a GPU."""
    return torch.autocast(bench.device.split(":")[0], dtype=torch.bfloat16, enabled=bench.device != "cpu")


def by_trainer(
    bench: Bench, case: Case, start: Scores, relaxation: str, steps: int, rate: float, seed: int
) -> PeftModel:
    """Gates of the product, started in the order of the scores and trained to the case's shape; under their plan."""
    model = get_peft_model(bench.load(), HawAdaConfig())
    with torch.no_grad():
        for name, gate in collect_gates(model).items():
            if gate.units == 1:
                layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
                gate.theta.fill_(gate.start.theta + (0.5 if layer in case.layers else -0.5))
                continue
            end = module_of(name)
            order = start[end].argsort().argsort().float() / max(1, len(start[end]) - 1)
            gate.theta.copy_((gate.start.theta + (order - 0.5)).reshape(gate.theta.shape))
    with tempfile.TemporaryDirectory() as folder:
        HawAdaTrainer(
            model,
            bench.arguments(
                folder,
                steps,
                rate,
                seed,
                lr_scheduler_type="constant",
                warmup_steps=0,
                relaxation=relaxation,
                calibration_examples=0,  # what training does, without a comparison with the start
                soft_fraction=1.0 if relaxation == "straight_through" else 0.75,
            ),
            shape=case.shape,
            train_dataset=bench.pool(seed),
            data_collator=whole,
        ).train()
    return model


CRITERIA = ("kl", "fisher", "text", "wanda", "energy", "swaps", "random")
TRAINED = {
    "straight_through .02": 0.02,
    "straight_through .1": 0.1,
    "hard_concrete .05": 0.05,
    "closing .01": 0.01,
}


def choose(bench: Bench, name: str, case: Case, seed: int, options: argparse.Namespace) -> tuple[PeftModel, int]:
    """A gated model under the plan of a contestant, and the steps that it took."""
    model = get_peft_model(bench.load(), HawAdaConfig())
    layout = locate(model.get_base_model())
    batches = bench.examples(options.calibration, seed)
    without = plan_of(case, layout)
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        scores: Scores = {
            end: torch.rand(collect_units(model, end), generator=generator)
            for layer in case.layers
            for end in (layout.attention_out(layer), layout.ffn_out(layer))
        }
    elif name == "fisher":
        scores = fisher(model, batches, without)
    elif name == "text":
        scores = text(model, bench.examples(options.calibration, seed, labels=True), without)
    elif name == "wanda":
        scores = activations(True)(model, batches, without)
    elif name == "energy":
        scores = activations(False)(model, batches, without)
    elif name == "swaps":
        scores = swaps(model, batches, without, case, layout)
    else:
        scores = divergence(model, batches, without)
    if name in TRAINED:
        steps = options.gate_steps
        return by_trainer(bench, case, scores, name.split()[0], steps, TRAINED[name], seed), steps
    model.apply_plan(plan_of(case, layout, scores))
    return model, 0


def criterion(bench: Bench, name: str, case: Case, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of one contestant."""
    model, used = choose(bench, name, case, seed, options)
    plan: Plan = model.applied_plan()
    small = model.merge_and_unload().to(bench.device)
    row: dict[str, Any] = {"steps": used, "slice": bench.quality(small)}
    refitted = copy.deepcopy(small)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the slim model keeps its plain weights")  # the row says so
        report = reconstruct(bench.model, refitted, plan, bench.examples(options.calibration, seed + 1000))
    row |= {"applied": report.applied, "least squares": bench.quality(refitted)}
    for label, start in (("after", small), ("least squares, after", refitted)):
        bench.distil(start, options.steps - used, options.rate, seed)
        row[label] = bench.quality(start)
    return row


# ---------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Variant:
    """
    A recovery.

    Args:
        loss: "kl"; "entropy" weights positions by the teacher's entropy, "sure" by `1 / (1 + entropy)`; "top": the
            teacher's 64 likeliest classes and the rest as one.
        states: weight of `1 - cosine` of every kept layer's output to the dense layer's.
        labels: weight of the text's own next tokens.
        rate: factor on the learning rate; with Muon on that of the matrices alone.
        optimizer: "adamw", or "muon" for the matrices of the layers.
        beta2: of AdamW.
        written: train on text that the dense model wrote.
    """

    loss: str = "kl"
    states: float = 0.0
    labels: float = 0.0
    rate: float = 1.0
    optimizer: str = "adamw"
    beta2: float = 0.999
    written: bool = False


OBJECTIVES = {
    "kl": Variant(),
    "muon": Variant(optimizer="muon"),
    "muon, rate x2": Variant(optimizer="muon", rate=2.0),
    "states .5": Variant(states=0.5),
    "top": Variant("top"),
    "entropy": Variant("entropy"),
    "labels .3": Variant(labels=0.3),
    "rate x2": Variant(rate=2.0),
    "beta2 .95": Variant(beta2=0.95),
    "sure": Variant("sure"),
    "muon, rate x4": Variant(optimizer="muon", rate=4.0),
    "states 2": Variant(states=2.0),
    "written": Variant(written=True),
}


def kl_of(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """From log-probabilities (..., classes): the loss, ()."""
    if kind == "top":
        values, classes = teacher.topk(64, dim=-1)
        chosen = student.gather(-1, classes)
        rest = [torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (values, chosen)]
        return ((values.exp() * (values - chosen)).sum(-1) + rest[0].exp() * (rest[0] - rest[1])).mean()
    terms = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if kind == "kl":
        return terms.mean()
    entropy = -(teacher.exp() * teacher).sum(-1)
    weight = entropy if kind == "entropy" else 1 / (1 + entropy)
    return (terms * weight).sum() / weight.sum()


def train(
    bench: Bench, small: PreTrainedModel, case: Case, variant: Variant, seed: int, steps: int, rate: float
) -> None:
    """Recover in place: bf16 autocast, cosine after a tenth of warm-up, gradients of norm 1 at most."""
    small.train().requires_grad_(True)
    betas, parameters = (0.9, variant.beta2), small.parameters()
    optimizer: torch.optim.Optimizer
    if variant.optimizer == "muon":
        optimizer = MuonAdamW(parameters, rate, matrices=matrices_of(small), muon_rate=variant.rate, betas=betas)
    else:
        fused = bench.device != "cpu"
        optimizer = torch.optim.AdamW(parameters, rate * variant.rate, betas=betas, weight_decay=0.0, fused=fused)
    warm = min(20, steps // 10)

    def schedule(step: int) -> float:
        if step < warm:
            return (step + 1) / max(1, warm)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    stream = bench.stream(seed)
    if variant.written:
        rows = written(bench, steps * bench.batch_size // 4, seed)
        generator = torch.Generator().manual_seed(seed)
        stream = (
            {"input_ids": rows[torch.randint(len(rows), (bench.batch_size,), generator=generator)].long()}
            for _ in iter(int, 1)
        )
    after = [layer + 1 for layer in case.layers[:-1]]  # of hidden_states: what comes out of a kept layer
    for _ in range(steps):
        batch = {name: value for name, value in next(stream).items() if name != "labels"}
        states = variant.states > 0
        with torch.no_grad(), autocast(bench):
            dense = bench.model(**batch, output_hidden_states=states)
        with autocast(bench):
            found = small(**batch, output_hidden_states=states)
        teacher = functional.log_softmax(dense.logits.float(), dim=-1)
        student = functional.log_softmax(found.logits.float(), dim=-1)
        loss = kl_of(student, teacher, variant.loss)
        if states:
            pairs = zip(found.hidden_states[1:-1], [dense.hidden_states[place] for place in after], strict=True)
            terms = [(1 - functional.cosine_similarity(a.float(), b.float(), dim=-1)).mean() for a, b in pairs]
            loss = loss + variant.states * torch.stack(terms).mean()
        if variant.labels:
            ids = batch["input_ids"]
            text_loss = functional.nll_loss(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = (1 - variant.labels) * loss + variant.labels * text_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    small.eval()


def written(bench: Bench, count: int, seed: int) -> torch.Tensor:
    """Windows that the dense model wrote itself, each after 16 tokens of the text."""
    picks = torch.randperm(len(bench.train_pool), generator=torch.Generator().manual_seed(seed))[:count]
    rows = []
    torch.manual_seed(seed)
    for part in picks.split(600):
        prompt = bench.train_pool.rows[part.to(bench.train_pool.rows.device)][:, :16].long()
        more = {"min_new_tokens": bench.length - 16, "max_new_tokens": bench.length - 16}
        with autocast(bench), torch.inference_mode():
            mask = torch.ones_like(prompt)
            rows.append(bench.model.generate(prompt, attention_mask=mask, do_sample=True, top_k=0, **more))
    return torch.cat(rows)


def objective(bench: Bench, name: str, case: Case, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One recovery."""
    small: PreTrainedModel = slim_of(bench, case, seed, options)
    row: dict[str, Any] = {"slice": bench.quality(small)}
    started = time.perf_counter()
    train(bench, small, case, OBJECTIVES[name], seed, options.steps, options.rate)
    return row | {"after": bench.quality(small), "training_seconds": round(time.perf_counter() - started, 1)}


def slim_of(bench: Bench, case: Case, seed: int, options: argparse.Namespace) -> PreTrainedModel:
    """The sliced model of the case, by the divergence's gradients."""
    model, _ = choose(bench, "kl", case, seed, options)
    return model.merge_and_unload().to(bench.device)


# --------------------------------------------------------------------- frame


def table(path: str) -> None:
    """Mean and spread over seeds; rows of contestants that failed are left out."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" not in row:
            groups[row["case"], row["contestant"]].append(row)
    stages = list(dict.fromkeys(k for rows in groups.values() for r in rows for k in r if isinstance(r[k], dict)))
    print("| case | contestant | seeds | " + " | ".join(stages) + " |")
    print("|---" * (3 + len(stages)) + "|")
    for (case, name), rows in sorted(groups.items()):
        cells = []
        for stage in stages:
            columns = list(zip(*(list(row[stage].values()) for row in rows if stage in row), strict=True))
            each = [
                f"{statistics.mean(c):.2f}" + (f" ±{statistics.stdev(c):.2f}" if len(c) > 1 else "") for c in columns
            ]
            cells.append(" / ".join(each))
        print(f"| {case} | {name} | {len(rows)} | " + " | ".join(cells) + " |")


def main() -> None:
    """Make the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["criteria", "objectives", "table"])
    parser.add_argument("teacher")
    parser.add_argument("train", nargs="?")
    parser.add_argument("eval", nargs="?")
    parser.add_argument("--case", nargs="+", default=[])
    parser.add_argument("--contestants", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of the recovery, gate steps included")
    parser.add_argument("--gate-steps", type=int, default=48)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--eval-examples", type=int, default=120)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.study == "table":
        table(options.teacher)
        return
    warnings.simplefilter("ignore", FutureWarning)
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
    layout = locate(bench.model)
    run, names = (criterion, [*CRITERIA, *TRAINED]) if options.study == "criteria" else (objective, list(OBJECTIVES))
    out = Path(options.out) if options.out else None
    done = set()
    for file in out.parent.glob(f"{out.stem}*.jsonl") if out else ():
        done |= {
            (row["case"], row["contestant"], row["seed"])
            for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
        }
    shard, shards = map(int, options.shard.split("/"))
    runs = list(itertools.product(options.seeds, options.case, options.contestants or names))[shard::shards]
    print(f"dense {bench.quality(bench.model)}", flush=True)
    for seed, text_of_case, name in runs:
        if (text_of_case, name, seed) in done:
            continue
        started = time.perf_counter()
        row = {"case": text_of_case, "contestant": name, "seed": seed}
        try:
            row |= run(bench, name, Case.of(text_of_case, layout), seed, options)
        except (RuntimeError, ValueError) as error:  # one that fails does not take the others along
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        row["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps(row), flush=True)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
