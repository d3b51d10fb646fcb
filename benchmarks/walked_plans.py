"""What walks through a model's files choose and cost: layers by loss beside layers by influence, hidden sizes, memory.

    python benchmarks/walked_plans.py --base smollm2-135m --tokens smol_eval.npy --spill /some/disk [--device cuda]

One line of JSON for each step, with its processor and wall seconds and the peak of the memory since the start (of the
resident set, and of the GPU): the basis, the activity, every layer alone and the hidden sizes, and each number of
layers with the loss of every choice that was tried. Losses are KL in nats of the model with the rest closed, nothing
refitted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stream_export import memory

from hawada_peft import Shape
from hawada_peft.planning.ranking import rank
from hawada_peft.refit.activity import activity_of
from hawada_peft.search.space import narrower_sizes
from hawada_peft.vanilla.family import locate
from hawada_peft.walked import ActivityQuality, checkpoint_basis
from hawada_peft.walked.judged import JudgedQuality
from hawada_peft.walked.walk import open_walk


def step(name: str, device: str, make: Callable[[], Any], tell: Callable[[Any], dict[str, Any]]) -> Any:
    """Do something, and print what it gave and took."""
    wall, processor = time.perf_counter(), time.process_time()
    found = make()
    line = {
        "step": name,
        "processor_seconds": round(time.process_time() - processor, 1),
        "seconds": round(time.perf_counter() - wall, 1),
        "peak_rss_mb": round(memory("self", "VmHWM")),
    }
    if device.startswith("cuda"):
        line["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print(json.dumps(line | tell(found)), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a language model")
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of token ids")
    parser.add_argument("--spill", type=Path, help="folder for hidden states")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2, help="windows per batch")
    parser.add_argument("--dropped", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    flat = np.load(options.tokens, mmap_mode="r").reshape(-1)[: options.windows * options.length]
    windows = torch.from_numpy(flat.astype(np.int64)).reshape(options.windows, options.length)
    batches = [{"input_ids": rows} for rows in windows.split(options.rows)]
    places = {"device": options.device, "spill": options.spill}
    print(json.dumps({"positions": windows.numel(), "rss_before_mb": round(memory("self", "VmRSS"))}))
    basis = step("basis", options.device, lambda: checkpoint_basis(options.base, batches, **places), lambda _: {})
    with open_walk(options.base, batches, **places) as walk:
        layout = locate(walk.weights.model)
        total, sizes = layout.dense.sizes()["num_hidden_layers"], narrower_sizes(layout)
        activity = step(
            "activity",
            options.device,
            lambda: ActivityQuality(layout, activity_of(walk.start(), walk.batches), basis),
            lambda _: {},
        )
        quality = step(
            "layers alone, hidden sizes",
            options.device,
            lambda: JudgedQuality(walk, activity, sizes),
            lambda made: {
                "plans": len(made.losses),
                "hidden": {size: round(made.evaluate(Shape(hidden_size=size)), 4) for size in sizes},
            },
        )

        def told(plan: Any) -> dict[str, Any]:
            shape = plan.shape
            tried = {each: loss for each, loss in quality.losses.items() if each.shape == shape}
            influence = rank(layout, activity.scores, shape)
            return {
                "layers": len(plan.layers),
                "tried": len(tried),
                "gone": sorted(set(range(total)) - set(plan.layers)),
                "loss": round(tried[plan], 4),
                "gone_by_influence": sorted(set(range(total)) - set(influence.layers)),
                "loss_by_influence": round(quality.losses[influence], 4),
            }

        for dropped in options.dropped:
            shape = Shape(num_hidden_layers=total - dropped)
            step(f"without {dropped}", options.device, lambda shape=shape: quality.plan(shape), told)


if __name__ == "__main__":
    main()
