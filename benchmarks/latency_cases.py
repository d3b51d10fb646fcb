"""The cases of the latency benchmarks: a model, a regime, and the parts that both scripts share."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from hawada_peft.latency.regime import Regime

SMALL_TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""Sizes of a small Llama, alone and as the tower of another model."""

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
    "llama-small": LlamaConfig(**SMALL_TEXT, tie_word_embeddings=True),
    "mixtral-small": MixtralConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
    ),
    "llava-small": LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=64,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(**SMALL_TEXT),
        image_token_index=8191,
    ),
    "clip-small": CLIPConfig(
        projection_dim=256,
        text_config={
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "image_size": 64,
            "patch_size": 8,
        },
    ),
    "llama-tiny": LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "vit-tiny": ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
    ),
}
"""Models by their sizes alone; latency needs no weights."""


def auto_class(config: PreTrainedConfig) -> type:
    """What builds the model of a config: two encoders, images and text, an image classifier, or a causal model."""
    if isinstance(config, CLIPConfig):
        return AutoModel
    if hasattr(config, "vision_config"):
        return AutoModelForImageTextToText
    return AutoModelForImageClassification if hasattr(config, "patch_size") else AutoModelForCausalLM


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model of a config with random weights, made on the device, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        return auto_class(config).from_config(copy.deepcopy(config), dtype=dtype).eval()


def random_inputs(model: PreTrainedModel, count: int, seq_len: int | None) -> dict[str, torch.Tensor]:
    """So many random images, or rows of `seq_len` random tokens, in the model's dtype on its device."""
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (count, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, dtype=model.dtype, device=model.device)}
    return {"input_ids": torch.randint(config.vocab_size, (count, seq_len or 1), device=model.device)}


def parameter_mib(model: torch.nn.Module) -> float:
    """MiB of all weights."""
    return sum(p.numel() * p.element_size() for p in set(model.parameters())) / 2**20


@dataclass(frozen=True)
class Case:
    """A model (a folder or a preset) under a regime."""

    model: str
    regime: Regime

    def load(self) -> PreTrainedModel:
        """The dense model: with its weights from a folder, on the meta device from a preset."""
        config = PRESETS.get(self.model) or AutoConfig.from_pretrained(self.model)
        auto = auto_class(config)
        if self.model in PRESETS:
            with torch.device("meta"):
                return auto.from_config(config)
        return auto.from_pretrained(self.model).to(dtype=self.regime.torch_dtype, device=self.regime.device)

    def __str__(self) -> str:
        return f"{Path(self.model).name}: {self.regime}"


def parse_case(text: str, device: str) -> Case:
    """
    `MODEL:MODE:BATCH[xSEQ]:DTYPE:BACKEND`, e.g. `llama-3.2-1b:prefill:8x1024:bfloat16:eager`; whole answers as
    `llama-3.2-1b:generate:8x512+128:bfloat16:eager`, the tokens of prompt and answer. With a static cache of so many
    tokens: `llama-3.2-1b:decode:8x512@1024:bfloat16:eager`.
    """
    model, mode, size, dtype, backend = text.rsplit(":", 4)
    size, _, static = size.partition("@")
    batch, _, tokens = size.partition("x")
    seq, _, output = tokens.partition("+")
    regime = Regime(
        mode=mode,
        batch_size=int(batch),
        seq_len=int(seq) if seq and not output else None,
        prompt=int(seq) if output else None,
        output=int(output) if output else None,
        static_cache=int(static) if static else None,
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


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, for values without ties."""
    ranks = [values.argsort().argsort().astype(float) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])
