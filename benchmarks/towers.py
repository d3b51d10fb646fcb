"""
A search over both towers of a small CLIP by the real clock: does what it finds meet the budget when it is timed anew?

    python benchmarks/towers.py --speedup 1.5

Weights and data are random, as nothing is recovered: this is about latency. The answer is slimmed and timed beside the
dense model, round after round, by a timer that the search has not used; time is that of the processor, so that a busy
machine gives the same ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel

from hawada_peft import HawAdaConfig, LatencyBudget, find_plan
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.latency import Clock, Effort

ROWS, LENGTH = 8, 32


def build(layers: int) -> CLIPModel:
    """Two towers of one size; the text's runs 32 tokens, the image's 50 patches."""
    sizes = {
        "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": layers,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 4096, "max_position_embeddings": 64, "eos_token_id": 4095},
        vision_config=sizes | {"image_size": 112, "patch_size": 16},
        projection_dim=128,
    )
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def milliseconds(models: dict[str, torch.nn.Module], rounds: int) -> dict[str, list[float]]:
    """Of each call of each model, in turns, by the thread's processor time."""
    inputs = example_inputs(next(iter(models.values())), rows=ROWS, length=LENGTH)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 3):
            for name, model in models.items():
                start = time.thread_time()
                model(**inputs)
                if turn >= 3:
                    found[name].append(1e3 * (time.thread_time() - start))
    return found


def main() -> None:
    """One search, and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dense = build(options.layers)
    batches = [example_inputs(dense, rows=ROWS, length=LENGTH)]
    model = get_peft_model(build(options.layers), HawAdaConfig(towers=("text_config", "vision_config")))
    budget = LatencyBudget(speedup=options.speedup, batch_size=ROWS, seq_len=LENGTH)
    start = time.process_time()
    found = find_plan(
        model, budget, batches, effort=Effort.quick(clock=Clock(time.thread_time), cache=False), refit=False
    )
    seconds = time.process_time() - start
    model.apply_plan(found.plan)
    slim = model.merge_and_unload(verify=False)
    timed = {
        name: statistics.median(values)
        for name, values in milliseconds({"dense": dense, "slim": slim}, options.rounds).items()
    }
    print("| | asked | by the search | timed anew |\n|---|---|---|---|")
    print(f"| speedup | {options.speedup:.2f} | {found.speedup:.3f} | {timed['dense'] / timed['slim']:.3f} |")
    print(f"| dense, ms | | {found.dense_ms:.2f} | {timed['dense']:.2f} |")
    print(f"| slim, ms | {found.limit_ms:.2f} | {found.ms:.2f} | {timed['slim']:.2f} |")
    print(
        f"\n{found.plan}; {found.shapes:,} combinations, {len(found.measured)} timed, {seconds:.0f} s of the processor"
    )


if __name__ == "__main__":
    main()
