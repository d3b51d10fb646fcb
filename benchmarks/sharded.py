"""Gate steps and recovery steps of sharded models (FSDP2), on one GPU and on several: time, memory, equality, resume.

    torchrun --nproc-per-node=2 benchmarks/sharded.py gates --out results.jsonl
    torchrun --nproc-per-node=2 benchmarks/sharded.py recovery --out results.jsonl
    python benchmarks/sharded.py gates --out results.jsonl          # the same on one GPU, not sharded
    python benchmarks/sharded.py equality --gpus 2 --out results.jsonl
    python benchmarks/sharded.py all --gpus 2 --out results.jsonl   # all of the above, one after the other

`gates` and `recovery` train Llama-3.1-8B shapes (`--model llama-3.2-1b` and others for less) with random weights in
bf16 for `--steps` steps by the package's own trainers; every process makes the weights on its CPU, and the GPU holds
its shard. The batch is that of each GPU, so the work per GPU is the same for every number of GPUs. A line of the
results holds the median step time over the steps after the first three, the peak of torch's allocator on each GPU in
training and in the start (importance of the gates), and tokens per second in all.

`equality` trains gates with LoRA, and recovers, at a small shape in float32: on one GPU; on all with the same batches;
killed (SIGKILL) on all after the second of six steps and resumed on one GPU (gates), or on half of the GPUs
(recovery, from four GPUs). A line holds the largest difference of any trained number, and whether the plans are equal.

Needs nothing but the package: about 2 minutes for each of `gates` and `recovery`. `equality` runs its seven trainings
at once, in twice the time that a process takes to start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from latency_cases import PRESETS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.initialization import no_init_weights

from hawada_peft import GateTrainingArguments, HawAdaConfig, HawAdaTrainer, Plan, Shape, recover
from hawada_peft.distil.sharded import whole
from hawada_peft.processes import run_program
from hawada_peft.vanilla.family import locate

SHAPES = PRESETS | {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if WORLD > 1 else {}
UNTIMED = 3
"""Steps before those that count."""


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, with labels: importance is that of the same loss in every number of processes."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows = torch.randint(vocabulary, (rows, length), generator=draw)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Watch(TrainerCallback):
    """Times steps and looks at the allocator."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start_peak = 0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.start_peak = peak()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        self._began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._began)


class Kill(TrainerCallback):
    """Kills its process after the second step, when its checkpoint is written."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # the checkpoint is complete
            os.kill(os.getpid(), signal.SIGKILL)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def random_llama(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """On the CPU; matrices repeat one block of random numbers, norms are ones."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with no_init_weights():
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    block = 0.02 * torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0))
    block = block.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            if parameter.ndim < 2:
                flat.fill_(1)
                continue
            for start in range(0, flat.numel(), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
    return model.eval()


def target_of(model: LlamaForCausalLM) -> Shape:
    """Three quarters of the layers and half of the FFN."""
    dense = locate(model).dense.sizes()
    return Shape(
        intermediate_size=dense["intermediate_size"] // 2, num_hidden_layers=3 * dense["num_hidden_layers"] // 4
    )


def even_plan(model: LlamaForCausalLM) -> Plan:
    """The first channels of the first layers, at `target_of`."""
    layout, shape = locate(model), target_of(model)
    full, count = Plan.keep_all(layout.dense), shape.num_hidden_layers or 0
    channels = tuple(range(shape.intermediate_size or 0))
    return replace(full, layers=full.layers[:count], heads=full.heads[:count], channels=(channels,) * count)


def train_gates(model: LlamaForCausalLM, folder: Path, options: dict[str, Any], **more: Any) -> HawAdaTrainer:
    rows, lora = more.pop("rows"), more.pop("lora", None)
    target = target_of(model)
    if more.pop("depth_too", True) is False:
        target = replace(target, num_hidden_layers=None)
    gated = get_peft_model(model, HawAdaConfig(lora=lora))
    args = GateTrainingArguments(str(folder), **options, **SHARDED, soft_fraction=0.5, calibration_examples=8)
    trainer = HawAdaTrainer(gated, args, shape=target, train_dataset=rows, callbacks=more.pop("callbacks", []))
    trainer.train(**more)
    return trainer


def timed(what: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    batch, length = (int(number) for number in arguments.size.split("x"))
    config = SHAPES[arguments.model]
    began = time.perf_counter()
    model = random_llama(config, torch.bfloat16)
    made, watch = time.perf_counter() - began, Watch()
    rows = Tokens(WORLD * batch * arguments.steps + 64, length, config.vocab_size)
    options = {
        "per_device_train_batch_size": batch,
        "max_steps": arguments.steps,
        "gradient_checkpointing": not arguments.no_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": arguments.steps,
        "max_grad_norm": 0.0,
    }
    if what == "gates":
        extra = {"rows": rows, "callbacks": [watch], "depth_too": False}
        train_gates(model, folder, options | {"keep_better": "never"}, **extra)
    else:
        args = TrainingArguments(str(folder), **options, **SHARDED, optim="adamw_torch")
        plan = even_plan(model)
        recover(model, args, train_dataset=rows, plan=plan, optimizer="args", callbacks=[watch])
    peaks = torch.tensor([watch.start_peak, peak()], dtype=torch.float64) / 2**30
    every = [peaks]
    if WORLD > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        every = [torch.zeros_like(peaks, device=device) for _ in range(WORLD)]
        torch.distributed.all_gather(every, peaks.to(device))
    seconds = watch.seconds[UNTIMED:]
    median = statistics.median(seconds)
    return {
        "what": what,
        "model": arguments.model,
        "gpus": WORLD,
        "size_per_gpu": arguments.size,
        "checkpointing": not arguments.no_checkpointing,
        "step_ms": round(1000 * median, 2),
        "step_ms_quartiles": [round(1000 * each, 2) for each in statistics.quantiles(seconds, n=4)[::2]],
        "tokens_per_s": round(WORLD * batch * length / median),
        "peak_gib_start": [round(float(each[0]), 2) for each in every],
        "peak_gib": [round(float(each[1]), 2) for each in every],
        "weights_made_s": round(made, 1),
    }


def small(what: str, folder: Path, *, killed: bool) -> None:
    """One training of `equality`; what it ends with is left in the folder."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)  # LoRA is drawn
    folder.mkdir(parents=True, exist_ok=True)
    model = random_llama(SHAPES["llama-tiny"], torch.float32)
    set_aside = 2 if what == "gates" else 0  # so that every epoch is whole steps, in any number of processes
    rows = Tokens(32 + set_aside, 32, model.config.vocab_size)
    resume = bool(list(folder.glob("checkpoint-*")))
    options: dict[str, Any] = {
        "per_device_train_batch_size": 8 // WORLD,
        "max_steps": 6,
        "learning_rate": 0.05 if what == "gates" else 1e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": not torch.cuda.is_available(),
    }
    calls = [Kill()] if killed else []
    if what == "gates":
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        more = {"rows": rows, "lora": lora, "callbacks": calls, "resume_from_checkpoint": resume}
        gated: Any = train_gates(model, folder, options | {"keep_better": "sliced"}, **more).gated
        plan, tensors = gated.applied_plan(), {n: whole(p.detach()) for n, p in gated.named_parameters()}
        tensors = {n: t for n, t in tensors.items() if gated.get_parameter(n).requires_grad}
    else:
        args = TrainingArguments(str(folder), **options, **SHARDED, optim="adamw_torch")
        more = {"plan": even_plan(model), "optimizer": "args", "callbacks": calls, "resume_from_checkpoint": resume}
        done = recover(model, args, train_dataset=rows, **more)
        plan, tensors = done.plan, dict(done.model.state_dict())
    save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / f"{RANK}.safetensors")
    (folder / f"{RANK}.json").write_text(plan.to_json())


def launched(gpus: int, *arguments: str, device: int = 0) -> int:
    """This script in so many processes, one for each GPU, or in one on the GPU `device`; its exit status."""
    script = [str(Path(__file__).resolve()), *arguments]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={gpus}", f"--master-port={free_port()}"]
    used = range(gpus) if gpus > 1 else [device]
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, used)), "OMP_NUM_THREADS": "1"}
    print("$", "torchrun" if gpus > 1 else "python", gpus, *arguments, flush=True)
    return subprocess.run(
        [sys.executable, *(launcher if gpus > 1 else []), *script], env=os.environ | devices, check=False
    ).returncode


def free_port() -> int:
    """One that nobody listens at, for trainings at the same time."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def compared(first: Path, second: Path) -> dict[str, Any]:
    """Of what two trainings left; a training that failed has left nothing."""
    ranks = sorted(second.glob("*.safetensors"))
    if not ranks or not (first / "0.safetensors").exists():
        return {"ranks": len(ranks), "failed": True}
    expected, plan = load_file(first / "0.safetensors"), (first / "0.json").read_text()
    differences = [float((load_file(rank)[n] - t).abs().max()) for rank in ranks for n, t in expected.items()]
    plans = all(rank.with_suffix(".json").read_text() == plan for rank in ranks)
    return {"ranks": len(ranks), "largest_difference": max(differences), "plans_equal": plans}


def equality(gpus: int, root: Path, out: str) -> None:
    """Trainings at the same time, since each takes longer to start than to run; a line when what it needs is there."""

    def train(what: str, where: str, count: int, device: int = 0, kill: bool = False) -> int:
        killed = ["--kill"] if kill else []
        return launched(count, "small", what, "--folder", str(root / f"{what}-{where}"), *killed, device=device)

    def resume(what: str) -> dict[str, Any]:
        fewer = 1 if what == "gates" else gpus // 2
        status = train(what, "again", gpus, kill=True)
        train(what, "again", fewer)
        return {"what": f"killed and resumed, {what}", "gpus": [gpus, fewer], "killed_status": status}

    with ThreadPoolExecutor(8) as pool:
        several = {what: pool.submit(train, what, "several", gpus) for what in ("gates", "recovery")}
        resumed = {what: pool.submit(resume, what) for what in ("gates", "recovery") if what == "gates" or gpus > 3}
        alone = [pool.submit(train, what, "alone", 1, device % gpus) for device, what in enumerate(several)]
        wait(alone)
        for what, done in several.items():
            done.result()
            line = {"what": f"equality, {what}", "gpus": gpus}
            write([line | compared(root / f"{what}-alone", root / f"{what}-several")], out)
        for what, again in resumed.items():
            write([again.result() | compared(root / f"{what}-alone", root / f"{what}-again")], out)


def write(lines: list[dict[str, Any]], out: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    for line in lines:
        text = json.dumps(line | versions)
        print(text, flush=True)
        if out:
            with Path(out).open("a") as file:
                file.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gates", "recovery", "equality", "all", "small"])
    parser.add_argument("which", nargs="?", choices=["gates", "recovery"], help="of `small`, a part of `equality`")
    parser.add_argument("--model", default="llama-3.1-8b", choices=[name for name in SHAPES if "llama" in name])
    parser.add_argument("--size", default="2x1024", help="BATCHxSEQ on each GPU")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    parser.add_argument("--gpus", type=int, default=2, help="of `equality` and `all`")
    parser.add_argument("--folder", default="", help="of `small`")
    parser.add_argument("--kill", action="store_true", help="of `small`")
    parser.add_argument("--out", default="", help="a JSONL file that lines are added to")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.what == "small":
        small(arguments.which, Path(arguments.folder), killed=arguments.kill)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what in ("gates", "recovery"):
            shared = Path(folder)
            line = timed(arguments.what, arguments, shared)
            if RANK == 0:
                write([line], arguments.out)
        elif arguments.what == "equality":
            equality(arguments.gpus, Path(folder), arguments.out)
        else:
            same = ["--model", arguments.model, "--size", arguments.size, "--steps", str(arguments.steps)]
            for what in ("gates", "recovery"):
                for gpus in (1, arguments.gpus):
                    launched(gpus, what, *same, "--out", arguments.out)
            equality(arguments.gpus, Path(folder), arguments.out)


if __name__ == "__main__":
    run_program(main)
