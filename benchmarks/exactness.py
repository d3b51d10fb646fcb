"""Masked against slim: the largest difference of outputs, for every family, in float32 and float64.

    python benchmarks/exactness.py

Tiny models with random weights and gates; half of the heads and of the FFN and one of four layers go. Compared are
the gated model under its plan, the slim model in memory, and the slim model saved and reloaded through its Auto class.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from hawada_peft import HawAdaConfig, collect_gates, save_slim
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.vanilla.family import FAMILIES
from hawada_peft.vanilla.outputs import output_of

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4}
TEXT = {"num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 128, "pad_token_id": 0, "head_dim": 8}
IMAGES = {"image_size": 16, "patch_size": 8}


def build(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    images = FAMILIES[model_type].kv_heads_field == ""
    config = AutoConfig.for_model(model_type, **SIZES, **(IMAGES if images else TEXT))
    auto = AutoModelForImageClassification if images else AutoModelForCausalLM
    found = auto._model_mapping[type(config)]
    model = (found[0] if isinstance(found, tuple) else found)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def compare(model_type: str, dtype: torch.dtype) -> tuple[float, float, float]:
    model = build(model_type, dtype)
    inputs = example_inputs(model)
    gated = get_peft_model(model, HawAdaConfig())
    with torch.no_grad():
        for gate in collect_gates(gated).values():
            gate.theta.normal_()
    soft = output_of(gated, inputs)
    gated.apply_plan(gated.plan(keep_ratio={"heads": 0.5, "ffn": 0.5, "layers": 0.75}))
    masked = output_of(gated, inputs)
    slim = gated.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        reloaded = save_slim(slim, Path(folder) / "slim", reference=masked, inputs=inputs).max_difference
    return (
        (masked - soft).abs().max().item(),
        (masked - output_of(slim, inputs)).abs().max().item(),
        reloaded,
    )


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| family | dtype | effect of the plan | masked - slim | masked - slim, reloaded |")
    print("|---|---|---|---|---|")
    for model_type in FAMILIES:
        for dtype in (torch.float32, torch.float64):
            effect, slim, reloaded = compare(model_type, dtype)
            print(f"| {model_type} | {str(dtype)[6:]} | {effect:.2g} | {slim:.1e} | {reloaded:.1e} |")


if __name__ == "__main__":
    main()
