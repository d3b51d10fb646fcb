"""What torch.compile does to steps of a gated and of a slim model: eager and compiled, side by side.

    python benchmarks/compile.py llama-3.2-1b --device cuda --dtype bfloat16 --size 4x1024
    python benchmarks/compile.py vit-b16 --size 2x1 --rounds 10
    python benchmarks/compile.py tiny-llama --backend aot_eager

A step in training is a forward and a backward pass of the mean squared logits, in evaluation a forward pass without
gradients. Gated: with the gates open, soft (gradually closing, at another progress in every step) and under a plan
that is applied in training as well. Everything is compiled with `fullgraph=True`; the eager and the compiled step take
turns on the same model, and the figures are medians over the rounds after the warm-up. Beside them: how often a step
was traced in all its rounds (1 is the first time), and the seconds of the first compiled step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from latency_cases import PRESETS, random_inputs, random_model
from peft import get_peft_model
from torch import nn
from torch._dynamo.utils import counters

from hawada_peft import HawAdaConfig, collect_gates, slim
from hawada_peft.gates.relaxation import RELAXATIONS

TINY = {
    "tiny-llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4,
        )
    ),
    "tiny-vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6, image_size=64,
            patch_size=8,
        )
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in a phase: `before` prepares each step, which gets its number."""

    name: str
    model: nn.Module
    training: bool
    before: Callable[[int], None] = lambda _step: None


def cases(base: transformers.PreTrainedModel, steps: int) -> list[Case]:
    """Those of a gated model, one after the other on the same model; then those of its slim one."""
    gated: Any = get_peft_model(base, HawAdaConfig())
    plan, relaxation = gated.plan(keep_ratio=0.5), RELAXATIONS["closing"]
    small = slim(copy.deepcopy(gated).unload(), plan)

    def phase(relax: bool, masked: bool, applied: bool) -> Callable[[int], None]:
        def before(step: int) -> None:
            if step == 0:
                gated.apply_plan(plan if applied else None, in_training=True)
                if masked:
                    gated.base_model.set_masks(plan)
            for gate in collect_gates(gated).values():
                gate.relaxation = relaxation.at(step / steps) if relax else None

        return before

    return [
        Case("gated, open, training", gated, True, phase(False, False, False)),
        Case("gated, soft, training", gated, True, phase(True, True, False)),
        Case("gated, under a plan, training", gated, True, phase(False, False, True)),
        Case("gated, under a plan, evaluation", gated, False, phase(False, False, True)),
        Case("slim, training", small, True),
        Case("slim, evaluation", small, False),
    ]


def step(call: Callable[..., Any], model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    if model.training:
        call(**batch)["logits"].float().square().mean().backward()
        model.zero_grad(set_to_none=True)
    else:
        with torch.no_grad():
            call(**batch)
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def measure(case: Case, batch: dict[str, torch.Tensor], backend: str, rounds: int, warm_up: int) -> dict[str, Any]:
    """Medians in milliseconds, and what the compiler did."""
    torch._dynamo.reset()
    counters.clear()
    model = case.model.train(case.training)
    calls = {"eager": model, "compiled": torch.compile(model, backend=backend, fullgraph=True)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        case.before(turn)
        for name in sorted(calls, reverse=turn % 2 == 1):
            start = time.perf_counter()
            step(calls[name], model, batch)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(found[warm_up:]) for name, found in seconds.items()}
    return medians | {"traced": counters["stats"]["unique_graphs"], "first": seconds["compiled"][0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted({*PRESETS, *TINY}), help="random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", default="2x128", help="BATCHxSEQ; SEQ does not matter for images")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before those that count")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    if arguments.model in TINY:
        base = TINY[arguments.model]().to(device=arguments.device, dtype=dtype)
    else:
        base = random_model(PRESETS[arguments.model], dtype, arguments.device)
    if base.can_generate():
        base.config.use_cache = False
    batch = random_inputs(base, *(int(number) for number in arguments.size.split("x")))
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.model}, {arguments.size}, {arguments.dtype}, {device}; torch {torch.__version__}, backend "
        f"{arguments.backend}; {arguments.rounds} rounds\n\n| step | eager, ms | compiled, ms | ratio | traced | "
        "first step, s |\n|---|---|---|---|---|---|"
    )
    for case in cases(base, arguments.rounds + arguments.warm_up):
        found = measure(case, batch, arguments.backend, arguments.rounds, arguments.warm_up)
        ratio = found["compiled"] / found["eager"]
        print(
            f"| {case.name} | {found['eager']:.1f} | {found['compiled']:.1f} | {ratio:.3f} | {found['traced']} | "
            f"{found['first']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
