"""What a training step costs: our gates, LoRA and IA3 on the same model, in the same distillation step.

    python benchmarks/step_cost.py llama-3.2-1b --device cuda --dtype bfloat16 --size 4x1024
    python benchmarks/step_cost.py vit-b16 --size 8x1 --rounds 10
    python benchmarks/step_cost.py FOLDER --size 2x128 --rounds 10

The true widths on a CPU core, with an eighth of the layers and of the vocabulary, so that each has its share:

    python benchmarks/step_cost.py llama-3.2-1b --part 8 --size 1x128 --threads 1 --cpu-time --only gates \
        "LoRA r=8 on q, v" --checkpointing off

A step is: the teacher's logits (the same model with the adapter disabled, no gradients), the student's, the KL
divergence on all of them (`kl_divergence`, the same for every adapter), the backward pass, AdamW on the adapter. The
adapters share one copy of the base weights and take turns, one step each per round, in an order that is rotated; the
figures are medians over the rounds after the warm-up. `--checkpointing both` does all of it without and with gradient
checkpointing. `--compile` compiles every adapter's model, in training and as its own teacher.

The peak is that of torch's allocator, as if each adapter were alone: the base weights, the adapter, its optimizer's
state, and the most that a step holds at once. On CUDA it is the median over the rounds; on the CPU it is added up from
the profiler's record of every allocation in one more step.

The model is a folder of a causal LM or a preset (random weights), with projections q_proj, k_proj and v_proj.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from latency_cases import PRESETS, random_inputs, random_model
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hawada_peft import HawAdaConfig
from hawada_peft.distil import get_student_logits, get_teacher_logits
from hawada_peft.distil.divergence import kl_divergence
from hawada_peft.vanilla.family import locate

GATES, QV, ALL = "gates", "LoRA r=8 on q, v", "LoRA r=8 on all linears"


def adapters(base: PreTrainedModel) -> dict[str, Callable[[], PeftConfig]]:
    """What is compared, for models with projections q_proj, k_proj and v_proj."""
    family = locate(base).family
    attention, ffn = (name.rpartition(".")[2] for name in (family.attention_out, family.ffn_out))
    return {
        GATES: HawAdaConfig,
        "gates, groups of 32": lambda: HawAdaConfig(group_size=32),
        QV: lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        ALL: lambda: LoraConfig(r=8, target_modules="all-linear"),
        "IA3 on k, v, FFN": lambda: IA3Config(target_modules=["k_proj", "v_proj", ffn], feedforward_modules=[ffn]),
        "IA3 on inputs of o, FFN": lambda: IA3Config(
            target_modules=[attention, ffn], feedforward_modules=[attention, ffn]
        ),
    }


MIB = 2**20


class Contestant:
    """An adapter on the shared weights, with its optimizer."""

    def __init__(self, base: PreTrainedModel, config: PeftConfig, checkpointing: bool, backend: str = "") -> None:
        shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
        self.model = get_peft_model(copy.deepcopy(base, shared), config).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.call: Any = torch.compile(self.model, backend=backend, dynamic=False) if backend else self.model
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        teacher = get_teacher_logits(self.call, batch)
        student = get_student_logits(self.call, batch)
        kl_divergence(student, teacher).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_mib(self) -> float:
        """The base weights, the adapter and its optimizer's state."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
        tensors = {*self.model.parameters(), *self.model.buffers(), *state}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def timed_step(contestant: Contestant, batch: dict[str, torch.Tensor], clock: Callable[[], float]) -> None:
    on_cuda = contestant.model.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = clock()
    contestant.step(batch)
    if on_cuda:
        torch.cuda.synchronize()
        contestant.peaks.append((torch.cuda.max_memory_allocated() - before) / MIB)
    contestant.seconds.append(clock() - start)


def profiled_peak(contestant: Contestant, batch: dict[str, torch.Tensor]) -> float:
    """The most that one step holds at once on the CPU, in MiB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.step(batch)
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def load(name: str, dtype: torch.dtype, device: str, part: int = 1) -> PreTrainedModel:
    """A folder's model; or a preset's, with so small a part of its layers and its vocabulary."""
    if name in PRESETS:
        config = copy.deepcopy(PRESETS[name])
        config.num_hidden_layers //= part
        if hasattr(config, "vocab_size"):
            config.vocab_size //= part
        return without_cache(random_model(config, dtype, device))
    return without_cache(AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device))


def without_cache(model: PreTrainedModel) -> PreTrainedModel:
    """The model without a KV cache, which training has no use for."""
    if model.can_generate():
        model.config.use_cache = False
    return model


def compare(
    base: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    *,
    only: Collection[str] = (),
    rounds: int = 20,
    warm_up: int = 3,
    checkpointing: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    backend: str = "",
) -> list[dict[str, object]]:
    """A row per adapter, or per one of `only`."""
    made = {name: make for name, make in adapters(base).items() if not only or name in only}
    contestants = {name: Contestant(base, make(), checkpointing, backend) for name, make in made.items()}
    names = list(contestants)
    for turn in range(warm_up + rounds):
        for place in range(len(names)):
            timed_step(contestants[names[(turn + place) % len(names)]], batch, clock)
    rows = []
    for name, contestant in contestants.items():
        seconds = contestant.seconds[warm_up:]
        peaks = contestant.peaks[warm_up:] or [profiled_peak(contestant, batch)]
        rows.append(
            {
                "adapter": name,
                "checkpointing": checkpointing,
                "compiled": backend,
                "trainable": sum(parameter.numel() for parameter in contestant.trained),
                "ms": 1000 * statistics.median(seconds),
                "ms_quartiles": [1000 * cut for cut in statistics.quantiles(seconds, n=4)[::2]],
                "peak_mib": contestant.held_mib() + statistics.median(peaks),
            }
        )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    ratios = "to LoRA q, v | to LoRA all"
    lines = [
        f"| adapter | trainable | step, ms (quartiles) | {ratios} | peak, MiB | {ratios} |",
        "|---" * 8 + "|",
    ]
    reference = {row["adapter"]: row for row in rows}
    for row in rows:
        low, high = row["ms_quartiles"]
        cells = [str(row["adapter"]), f"{row['trainable']:,}", f"{row['ms']:.1f} ({low:.1f} to {high:.1f})"]
        cells += [ratio(row, reference, other, "ms") for other in (QV, ALL)]
        cells += [f"{row['peak_mib']:.0f}"]
        cells += [ratio(row, reference, other, "peak_mib") for other in (QV, ALL)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(row: dict[str, object], reference: dict[object, dict[str, object]], other: str, figure: str) -> str:
    """A figure in parts of another adapter's, if that was measured."""
    return f"{row[figure] / reference[other][figure]:.3f}" if other in reference else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, or one of {sorted(PRESETS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", default="2x128", help="BATCHxSEQ; SEQ does not matter for images")
    parser.add_argument("--part", type=int, default=1, help="of a preset's layers and vocabulary: one part of so many")
    parser.add_argument("--only", nargs="+", default=[], help="adapters, by their names; all if left out")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before those that count")
    parser.add_argument("--checkpointing", default="both", choices=["off", "on", "both"])
    parser.add_argument("--compile", nargs="?", const="inductor", default="", help="by this backend of torch.compile")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: as torch decides")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time by the process's processor time: for --threads 1 on a machine shared with other work",
    )
    parser.add_argument("--out", default="", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cpu_time and (arguments.device != "cpu" or torch.get_num_threads() != 1):
        parser.error("--cpu-time is for --device cpu with --threads 1")
    transformers.logging.set_verbosity_error()

    base = load(arguments.model, getattr(torch, arguments.dtype), arguments.device, arguments.part)
    device = torch.cuda.get_device_name() if base.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{Path(arguments.model).name}, {arguments.size}, {arguments.dtype}, {device}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}; {arguments.rounds} rounds"
    )
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    batch = random_inputs(base, *(int(number) for number in arguments.size.split("x")))
    rows: list[dict[str, object]] = []
    for checkpointing in {"off": [False], "on": [True], "both": [False, True]}[arguments.checkpointing]:
        found = compare(
            base,
            batch,
            only=arguments.only,
            rounds=arguments.rounds,
            warm_up=arguments.warm_up,
            checkpointing=checkpointing,
            clock=clock,
            backend=arguments.compile,
        )
        how = f"gradient checkpointing {'on' if checkpointing else 'off'}, {arguments.compile or 'eager'}"
        print(f"\n{how}\n\n{table(found)}", flush=True)
        rows += found
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
