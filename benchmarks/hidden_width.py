"""
What cutting the residual stream costs before any recovery, by what chooses the channels.

    python benchmarks/hidden_width.py TEACHER --calibration text_train.npy.xz --evaluation text_eval.npy

Perplexity of a causal LM on held-out windows at a few hidden sizes: channels chosen by Fisher importance, by its
reverse, and at random (the best and the worst of three draws).
"""

from __future__ import annotations

import argparse
import io
import lzma
import math
import random
from dataclasses import replace

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hawada_peft import HawAdaConfig, Plan
from hawada_peft.planning.importance import gate_importance
from hawada_peft.search.masked import MaskedQuality
from hawada_peft.search.space import narrower_sizes
from hawada_peft.vanilla.family import locate


def windows(path: str, count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one window each, from the start of the file."""
    with lzma.open(path) if path.endswith(".xz") else open(path, "rb") as file:
        tokens = np.load(io.BytesIO(file.read()))[: count * length].astype(np.int64)
    return [{"input_ids": row[None], "labels": row[None]} for row in torch.from_numpy(tokens).reshape(count, length)]


def perplexity(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.inference_mode():
        return math.exp(np.mean([model(**batch).loss.item() for batch in batches]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--windows", type=int, default=16, help="for calibration and for evaluation")
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(options.teacher).float().eval()
    calibration = windows(options.calibration, options.windows, options.length)
    evaluation = windows(options.evaluation, options.windows, options.length)
    layout, sizes = locate(base), narrower_sizes(locate(base))
    model = get_peft_model(base, HawAdaConfig(gates=("hidden",))).eval()
    print(f"dense, {layout.hidden_size}: perplexity {perplexity(model, evaluation):.2f}")
    quality = MaskedQuality(model, calibration[:1], gate_importance(model, calibration))
    scores = quality.scores.hidden
    if scores is None:
        raise SystemExit("the gates on hidden were not found")

    def at(kept: list[int]) -> float:
        plan = replace(
            Plan.keep_all(layout.dense),
            dense=replace(layout.dense, hidden_size=layout.hidden_size),
            hidden=tuple(sorted(kept)),
        )
        model.apply_plan(plan)
        return perplexity(model, evaluation)

    print("| hidden | Fisher | random, best | random, worst | Fisher reversed |\n|---|---|---|---|---|")
    order = scores.argsort(descending=True, stable=True).tolist()
    for size in sizes:
        drawn = [at(random.Random(seed).sample(order, size)) for seed in range(3)]
        row = [at(order[:size]), min(drawn), max(drawn), at(order[-size:])]
        print(f"| {size} | " + " | ".join(f"{value:,.1f}" for value in row) + " |")


if __name__ == "__main__":
    main()
