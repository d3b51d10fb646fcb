"""
Seconds of the processor that `inspect` and `get_peft_model` take, for configs of published models, without weights.

    python benchmarks/inspecting.py

Each is found anew, then read from the cache folder in a fresh process's place, then from the process. Gates are put,
by the default config, on all that was found of the model on the meta device.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from hawada_peft import HawAdaConfig
from hawada_peft.discovery import Anatomy, inspect, inspected
from hawada_peft.vanilla.skeleton import build_empty

TOKENS = {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        TOKENS
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "Qwen3-VL-8B": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "text_config": TOKENS
            | {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "patch_size": 16,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
}


def timed(config: PreTrainedConfig) -> tuple[Anatomy, float]:
    start = time.process_time()
    found = inspect(config)
    return found, time.process_time() - start


def gated(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> float:
    """Of `get_peft_model` alone."""
    model = build_empty(model_class, copy.deepcopy(config))
    start = time.process_time()
    get_peft_model(model, HawAdaConfig())
    return time.process_time() - start


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| model | first, s | from the folder, s | from the process, s | gates, s | axes | layers that may go |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HAWADA_CACHE"] = folder
        for name, (model, kind, fields) in MODELS.items():
            config = getattr(transformers, kind)(**fields, architectures=[model])
            found, first = timed(config)
            inspected._known.clear()
            _, second = timed(config)
            _, third = timed(config)
            gates = gated(getattr(transformers, model), config)
            layers = ", ".join(f"{len(stack.free)} of {stack.count}" for stack in found.stacks)
            axes = ", ".join(axis.name for axis in found.axes)
            print(
                f"| {name} | {first:.1f} | {second:.3f} | {third:.4f} | {gates:.2f} | {axes} | {layers} |", flush=True
            )


if __name__ == "__main__":
    main()
