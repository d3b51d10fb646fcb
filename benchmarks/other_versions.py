"""Which other versions of transformers load slim models and compute the same, for every family.

    python benchmarks/other_versions.py write FOLDER                    # here, with hawada_peft
    /other/environment/bin/python benchmarks/other_versions.py read FOLDER    # needs torch, transformers, safetensors

Tiny models with random weights and rotary parameters other than the class's default. `read` prints one row: OK where
the logits are those of the version that wrote them, WRONG where they differ, FAIL where the folder does not load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
TEXT = {"num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 128, "pad_token_id": 0, "head_dim": 8} | ROPE
IMAGES = {"image_size": 16, "patch_size": 8}
CUTS = {"ffn and layers": {"ffn": 0.5, "layers": 0.5}, "heads too": {"heads": 0.5, "ffn": 0.5, "layers": 0.5}}


def write(folder: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

    from hawada_peft import HawAdaConfig, save_slim
    from hawada_peft.discovery.inputs import example_inputs
    from hawada_peft.vanilla.family import FAMILIES
    from hawada_peft.vanilla.outputs import output_of

    for model_type, family in FAMILIES.items():
        for cut, keep_ratio in CUTS.items():
            torch.manual_seed(0)
            images = family.kv_heads_field == ""
            config = AutoConfig.for_model(model_type, **SIZES, **(IMAGES if images else TEXT))
            auto = AutoModelForImageClassification if images else AutoModelForCausalLM
            found = auto._model_mapping[type(config)]
            model = (found[0] if isinstance(found, tuple) else found)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            gated = get_peft_model(model, HawAdaConfig())
            slim = gated.merge_and_unload(plan=gated.plan(keep_ratio=keep_ratio))
            place = folder / model_type / cut.replace(" ", "-")
            save_slim(slim, place)
            inputs = example_inputs(slim)
            save_file({**inputs, "logits": output_of(slim, inputs).clone()}, place / "expected.safetensors.out")


def read(folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for place in sorted(folder.glob("*/*")):
        expected = load_file(place / "expected.safetensors.out")
        logits = expected.pop("logits")
        auto = AutoModelForImageClassification if "pixel_values" in expected else AutoModelForCausalLM
        try:
            model = auto.from_pretrained(place).eval()
            with torch.no_grad():
                gap = (model(**expected).logits - logits).abs().max() / logits.abs().max()
            result = "OK" if gap <= 1e-4 else "WRONG"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            result = f"FAIL ({type(error).__name__})"
        print(f"| {transformers.__version__} | {place.parent.name} | {place.name} | {result} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "write" and args.folder.exists():
        sys.exit(f"{args.folder} exists")
    (write if args.what == "write" else read)(args.folder)


if __name__ == "__main__":
    main()
