"""
Which experts go: by the Fisher information of gates on the router, or by what experts add (REAP), at equal counts.

    python benchmarks/experts.py --steps 300 --keep 6 4 2 --seeds 2 --threads 1

A small Mixtral (hidden 64, 3 layers, 8 experts, 2 per token) is trained on the language reference that ships with
Python. Then each criterion, on `--windows` windows of its training text, says which experts stay in every layer, and
the cut model is compared with the whole one on held-out topics: KL of the predictions per token, in nats, and
perplexity, before any recovery. "random" is the mean of three draws; "routed" counts how often experts are chosen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

from hawada_peft import HawAdaConfig, Shape, collect_gates
from hawada_peft.demo.data import VOCABULARY, load_topics, stack
from hawada_peft.planning import expert_outputs, gate_importance

CONFIG = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    output_router_logits=False,
    router_aux_loss_coef=0.01,
)

Batch = dict[str, torch.Tensor]


def trained(train: Sequence[Batch], steps: int, seed: int) -> MixtralForCausalLM:
    """A model after some steps of 8 windows."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(train), (8,), generator=generator).tolist()
        loss = model(**stack([train[row] for row in rows]), output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def log_probabilities(model: torch.nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Of the next tokens, (rows, positions, tokens) per batch."""
    with torch.no_grad():
        return [model(input_ids=batch["input_ids"]).logits.double().log_softmax(-1) for batch in batches]


def routed(model: Any, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """How often every expert is chosen."""
    names = [name for name in collect_gates(model) if "hawada_experts" in name]
    counts = {name: torch.zeros(CONFIG.num_local_experts, dtype=torch.float64) for name in names}
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], output_router_logits=True).router_logits
            for name, each in zip(names, logits, strict=True):
                chosen = each.topk(CONFIG.num_experts_per_tok).indices
                counts[name] += chosen.flatten().bincount(minlength=len(counts[name]))
    return counts


def measured(model: Any, scores: Mapping[str, torch.Tensor], keep: int, held: Sequence[Batch], dense: Any) -> Any:
    """KL and perplexity of the model that keeps the experts with the highest scores in every layer."""
    gates = collect_gates(model)
    for name, score in scores.items():
        order = torch.empty(len(score))
        order[score.argsort(stable=True)] = torch.linspace(-1, 1, len(score))
        gates[name].theta.data.copy_(gates[name].start.theta + order)
    model.apply_plan(model.plan(Shape(num_experts=keep)))
    found = log_probabilities(model, held)
    model.apply_plan(None)
    pairs = list(zip(dense, found, strict=True))
    kl = torch.cat([(one.exp() * (one - two)).sum(-1).flatten() for one, two in pairs]).mean()
    losses = [
        functional.nll_loss(two[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        for two, batch in zip(found, held, strict=True)
    ]
    return float(kl), math.exp(sum(map(float, losses)) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4, 2])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_topics()
    held = [stack(data.held_out[first : first + 8]) for first in range(0, 48, 8)]
    print("| seed | dense perplexity | experts kept | criterion | KL | perplexity |\n|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        model = trained(data.train, options.steps, seed)
        gated: Any = get_peft_model(model, HawAdaConfig(gates=("experts",))).eval()
        some = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: options.windows]
        rows = [data.train[row] for row in some.tolist()]
        batches = [stack(rows[first : first + 8]) for first in range(0, len(rows), 8)]
        plain = [{"input_ids": batch["input_ids"]} for batch in batches]
        dense = log_probabilities(gated, held)
        _, before = measured(gated, {}, CONFIG.num_local_experts, held, dense)
        counts, total = routed(gated, batches), expert_outputs(gated, plain)
        reap = expert_outputs(gated, plain, routed=True)
        draws = torch.Generator().manual_seed(seed)
        contestants = {
            "Fisher, the text's labels": [gate_importance(gated, batches)],
            "Fisher, drawn labels": [gate_importance(gated, plain)],
            "outputs per routed token (REAP)": [reap],
            "outputs over all tokens": [total],
            "routed": [counts],
            "random": [{name: torch.rand(8, generator=draws) for name in counts} for _ in range(3)],
        }
        for keep in options.keep:
            for name, several in contestants.items():
                found = [measured(gated, scores, keep, held, dense) for scores in several]
                kl, perplexity = (sum(column) / len(found) for column in zip(*found, strict=True))
                print(f"| {seed} | {before:.2f} | {keep} of 8 | {name} | {kl:.4f} | {perplexity:.2f} |", flush=True)


if __name__ == "__main__":
    main()
