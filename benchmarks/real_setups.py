"""Where the bench on real models runs: the work of each setup, and under which conditions its models are timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from latency_cases import parse_case
from transformers import LlamaConfig, LlamaForCausalLM

from hawada_peft import Effort, LatencyBudget
from hawada_peft.latency.clock import Clock
from hawada_peft.latency.regime import Regime
from hawada_peft.latency.toy import ToyClock


@dataclass(frozen=True)
class Setup:
    """
    What is the same for all cells.

    Args:
        regime: of all timings, `MODE:BATCH[xSEQ]:DTYPE:BACKEND`.
        device: of the training; the timing's as well, unless `on_cpu`.
        on_cpu: time on one CPU core, by processor time.
        train, evaluation: files in the folder of the data, as `work.read_pool` reads them.
        batch_size, rate, length: of the recovery.
        calibration: windows or images.
        eval_length, eval_examples: of held-out windows, or how many images.
        ours: our contestants, the most telling first.
        effort: how long models are timed.
    """

    regime: str = "prefill:8x512:bfloat16:cuda_graph"
    device: str = "cpu"
    on_cpu: bool = False
    train: str = "train.npy"
    evaluation: str = "eval.npy"
    batch_size: int = 16
    rate: float = 5e-4
    length: int = 512
    calibration: int = 64
    eval_length: int = 512
    eval_examples: int = 120
    ours: tuple[str, ...] = ("race",)
    effort: Effort = field(
        default_factory=lambda: Effort(min_rounds=15, max_rounds=60, max_seconds=4.0, tolerance=0.004)
    )

    @property
    def conditions(self) -> Regime:
        """Of all timings; without a GPU in float32, eager."""
        gpu = self.device.startswith("cuda") and not self.on_cpu
        mode, size, *_ = self.regime.split(":")
        text = self.regime if gpu or self.on_cpu else f"{mode}:{size}:float32:eager"
        return parse_case(f":{text}", self.device if gpu else "cpu").regime

    def budget(self, speedup: float) -> LatencyBudget:
        """The same conditions as a budget."""
        names = ("mode", "batch_size", "seq_len", "dtype", "backend", "device")
        given = {name: getattr(self.conditions, name) for name in names}
        return LatencyBudget(speedup=speedup, **{name: value for name, value in given.items() if value is not None})


def _on_one_core(setup: Setup, regime: str) -> Setup:
    effort = replace(setup.effort, max_seconds=2.0, clock=Clock(time.thread_time))
    return replace(setup, regime=regime, on_cpu=True, effort=effort)


_SMOLLM2 = Setup()
_LLAMA = Setup(
    regime="prefill:16x512:bfloat16:cuda_graph",
    train="text_train.npy.xz",
    evaluation="text_eval.npy",
    rate=1e-3,
    length=256,
    eval_examples=100,
    ours=("searched", "race"),
)
_VIT = Setup(
    regime="forward:64:bfloat16:cuda_graph",
    train="cifar_train.npz",
    evaluation="cifar_eval.npz",
    batch_size=64,
    calibration=256,
    eval_examples=2000,
    ours=("searched", "race"),
)

SETUPS = {
    "smollm2-gpu": _SMOLLM2,
    "smollm2-cpu": _on_one_core(_SMOLLM2, "prefill:1x128:float32:eager"),
    "llama-gpu": _LLAMA,
    "llama-cpu": _on_one_core(_LLAMA, "prefill:1x256:float32:eager"),
    "vit-gpu": _VIT,
    "vit-cpu": _on_one_core(_VIT, "forward:4:float32:eager"),
}
"""By the names that the command line takes."""


def tiny(folder: Path) -> tuple[str, Path, Setup]:
    """A tiny model, timed by a law of sizes, and data that repeat themselves: something to lose and to win back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    generator = np.random.default_rng(0)
    for name, count in (("train", 200), ("eval", 8)):
        starts, strides = generator.integers(0, 250, (count, 1)), generator.integers(1, 9, (count, 1))
        np.save(folder / f"{name}.npy", ((starts + strides * np.arange(32)) % 251).astype(np.uint16))
    effort = Effort(warmup=1, lead_in=0, min_rounds=3, max_rounds=5, max_seconds=0.5, clock=ToyClock())
    sizes = {"batch_size": 8, "length": 32, "calibration": 16, "eval_length": 32, "eval_examples": 8}
    setup = Setup("prefill:4x32:float32:eager", rate=1e-3, effort=effort, **sizes)  # type: ignore[arg-type]
    return str(folder / "teacher"), folder, setup
