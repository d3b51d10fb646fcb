"""The cases of the latency benchmarks: a model, a regime, and the parts that both scripts share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

from hawada_peft.latency.regime import Regime

PRESETS = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "vit-b16": ViTConfig(),
}
"""Models by their sizes alone; latency needs no weights."""


@dataclass(frozen=True)
class Case:
    """A model (a folder or a preset) under a regime."""

    model: str
    regime: Regime

    def load(self) -> PreTrainedModel:
        """The dense model: with its weights from a folder, on the meta device from a preset."""
        config = PRESETS.get(self.model) or AutoConfig.from_pretrained(self.model)
        auto = AutoModelForImageClassification if hasattr(config, "patch_size") else AutoModelForCausalLM
        if self.model in PRESETS:
            with torch.device("meta"):
                return auto.from_config(config)
        return auto.from_pretrained(self.model).to(dtype=self.regime.torch_dtype, device=self.regime.device)

    def __str__(self) -> str:
        return f"{Path(self.model).name}: {self.regime}"


def parse_case(text: str, device: str) -> Case:
    """`MODEL:MODE:BATCH[xSEQ]:DTYPE:BACKEND`, e.g. `llama-3.2-1b:prefill:8x1024:bfloat16:eager`."""
    model, mode, size, dtype, backend = text.rsplit(":", 4)
    batch, _, seq = size.partition("x")
    regime = Regime(
        mode=mode,
        batch_size=int(batch),
        seq_len=int(seq) if seq else None,
        dtype=dtype,
        backend=backend,
        device=device,
    )
    return Case(model, regime)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both scripts take."""
    parser.add_argument("cases", nargs="+", help=parse_case.__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: as torch decides")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time by the thread's processor time: for --threads 1 on a machine shared with other work",
    )
    parser.add_argument("--out", default="", help="a JSON file for the raw figures")
    parser.add_argument("--allow-rehome", action="store_true")


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    ranks = [values.argsort().argsort().astype(float) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])
