"""Which other versions of transformers load slim models and compute the same, for every family with a row.

    python benchmarks/other_versions.py write FOLDER                    # here, with hawada_peft
    /other/environment/bin/python benchmarks/other_versions.py read FOLDER    # needs torch, transformers, safetensors

The tiny models of the tests, with random weights and, where a class has them in one place, rotary parameters other
than its default. `read` prints a row per folder: OK where the first output is that of the version that wrote it, WRONG
where it differs, FAIL where the folder does not load. A family whose heads cannot go alone has none with fewer heads.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CUTS = {"ffn and layers": {"ffn": 0.5, "layers": 0.5}, "heads too": {"heads": 0.5, "ffn": 0.5, "layers": 0.5}}
EXPECTED = "expected.safetensors.out"
THETA = 5000.0


def write(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import transformers
    from conftest import KINDS, ROWS, Row, build
    from families import FURTHER, INPUTS, MIXTURES
    from peft import get_peft_model
    from zoo import ZOO

    from hawada_peft import HawAdaConfig, save_slim
    from hawada_peft.discovery.inputs import example_inputs
    from hawada_peft.errors import IllegalShapeError
    from hawada_peft.vanilla.family import FAMILIES

    rows = {getattr(transformers, row.config).model_type: row for row in (ROWS | KINDS | FURTHER | MIXTURES).values()}
    for model_type in FAMILIES:
        if model_type in ZOO and model_type not in rows:
            kind = ZOO[model_type]
            rows[model_type] = Row(kind.model, kind.config, kind.fields, FURTHER["roberta"].slim)
        if model_type not in rows:  # twins of roberta in all but their names
            config = transformers.CONFIG_MAPPING[model_type].__name__
            named = config.replace("Config", "ForSequenceClassification"), config
            rows[model_type] = replace(FURTHER["roberta"], model=named[0], config=named[1])
        for cut, keep_ratio in CUTS.items():
            rope = getattr(getattr(transformers, rows[model_type].config)(), "rope_parameters", None) or {}
            fields = {"rope_parameters": rope | {"rope_theta": THETA}} if "rope_theta" in rope else {}
            model = build(rows[model_type], **fields)
            gated = get_peft_model(model, HawAdaConfig())
            try:
                plan = gated.plan(keep_ratio=keep_ratio)
            except IllegalShapeError:
                continue
            if cut == "heads too" and plan.shape.num_attention_heads == plan.dense.num_attention_heads:
                continue
            slim = gated.merge_and_unload(plan=plan)
            place = folder / model_type / cut.replace(" ", "-")
            inputs = INPUTS[model_type]() if model_type in INPUTS else example_inputs(slim)
            save_slim(slim, place, inputs=inputs)
            with torch.no_grad():
                name, output = next((k, v) for k, v in slim(**inputs).items() if isinstance(v, torch.Tensor))
            tensors = {key: value.contiguous().clone() for key, value in (inputs | {"": output}).items()}
            save_file(tensors, place / EXPECTED, metadata={"output": name})


def read(folder: Path) -> None:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for place in sorted(folder.glob("*/*")):
        inputs = load_file(place / EXPECTED)
        expected = inputs.pop("")
        with safe_open(place / EXPECTED, "pt") as file:
            name = file.metadata()["output"]
        try:
            architecture = json.loads((place / "config.json").read_text(encoding="utf-8"))["architectures"][0]
            model = getattr(transformers, architecture).from_pretrained(place).eval()
            with torch.no_grad():
                gap = (model(**inputs)[name] - expected).abs().max() / expected.abs().max()
            result = "OK" if gap <= 1e-4 else "WRONG"
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            ImportError,
            StrictDataclassError,
        ) as error:
            result = f"FAIL ({type(error).__name__})"
        print(f"| {transformers.__version__} | {place.parent.name} | {place.name} | {result} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "write" and args.folder.exists():
        sys.exit(f"{args.folder} exists")
    (write if args.what == "write" else read)(args.folder)


if __name__ == "__main__":
    main()
