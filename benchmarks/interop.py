"""Slim models in other runtimes: torch.compile, ONNX, GGUF and llama.cpp, quantised loading.

    python benchmarks/interop.py                                        # tiny models, every family
    python benchmarks/interop.py --teacher TEACHER --shape 8 4 512 5    # a folder, cut to (heads, KV, FFN, layers)

What is not installed is left out, and named at the end. GGUF needs `gguf`, `sentencepiece` and a copy of llama.cpp's
converter (`--llama-cpp`, the folder with convert_hf_to_gguf.py; the source package of llama-cpp-python has one);
running it there needs `xllamacpp`.

All in float32, compared on the same tokens or pixels: the largest difference of logits over the largest logit. For
quantised loading that is the error of quantisation; beside it stands how often the most likely class stays.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)
from transformers.utils import logging

from hawada_peft import HawAdaConfig, Shape, save_slim
from hawada_peft.discovery.inputs import example_inputs
from hawada_peft.shipping import check_compile, check_onnx
from hawada_peft.vanilla.family import FAMILIES
from hawada_peft.vanilla.outputs import output_of

PACKAGES = ("onnxruntime", "gguf", "xllamacpp", "bitsandbytes", "torchao")
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4}
TEXT = {"num_key_value_heads": 4, "intermediate_size": 512, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1}
IMAGES = {"image_size": 16, "patch_size": 8, "intermediate_size": 512}

CUTS = {
    "dense": {"ffn": 1.0},
    "FFN and layers": {"ffn": 0.5, "layers": 0.5},
    "heads too": {"heads": 0.5, "ffn": 0.5, "layers": 0.5},
}

CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
# The converter knows tokenizers by a hash; that of these models splits text as GPT-2's does.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = [sys.argv[0], *sys.argv[2:]]
convert_hf_to_gguf.main()
"""
Result = tuple[str, str]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def tiny(folder: Path, cuts: list[str]) -> Iterator[tuple[str, Path]]:
    """Models of every family with random weights: dense, half of FFN and layers gone, half of the heads as well."""
    words = tokenizer()
    for model_type, family in FAMILIES.items():
        torch.manual_seed(0)
        images = family.kv_heads_field == ""
        fields = IMAGES if images else TEXT | {"vocab_size": 320, "pad_token_id": None}
        config = AutoConfig.for_model(model_type, **SIZES, **fields)
        auto = AutoModelForImageClassification if images else AutoModelForCausalLM
        found = auto._model_mapping[type(config)]
        model = (found[0] if isinstance(found, tuple) else found)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        for cut in cuts:
            place = folder / f"{model_type}, {cut}"
            gated = get_peft_model(copy.deepcopy(model), HawAdaConfig())
            plan = gated.plan(keep_ratio=CUTS[cut])
            save_slim(gated.merge_and_unload(plan=plan), place, processor=None if images else words)
            yield place.name, place


def cut(teacher: Path, sizes: list[int], folder: Path) -> Iterator[tuple[str, Path]]:
    config = AutoConfig.from_pretrained(teacher)
    text = config.architectures[0].endswith("ForCausalLM")
    auto = AutoModelForCausalLM if text else AutoModelForImageClassification
    gated = get_peft_model(auto.from_pretrained(teacher, dtype=torch.float32), HawAdaConfig())
    slim = gated.merge_and_unload(plan=gated.plan(Shape(*sizes)))
    save_slim(slim, folder / "slim", processor=AutoProcessor.from_pretrained(teacher) if text else None)
    yield f"{config.model_type} {tuple(sizes)}", folder / "slim"


def compare(found: torch.Tensor, expected: torch.Tensor) -> str:
    gap = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    return f"difference {gap:.1e}, same class {same:.1%}"


def gguf(folder: Path, model: PreTrainedModel, converter: Path, run: bool) -> Iterator[Result]:
    file = folder / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(converter), str(folder), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield "GGUF, llama.cpp's converter", f"refused: {done.stderr.strip().splitlines()[-1][:160]}"
        return
    yield "GGUF, llama.cpp's converter", "converted"
    inputs = example_inputs(model)
    expected = output_of(model, inputs)
    yield (
        "GGUF in transformers",
        attempt(
            lambda: compare(
                output_of(
                    AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32), inputs
                ),
                expected,
            )
        ),
    )
    if run:
        yield "GGUF in llama.cpp", attempt(lambda: in_llama_cpp(file, model, inputs["input_ids"]))


def in_llama_cpp(file: Path, model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """Log-probabilities of every next token after several prompts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(file), 256, 1, False, 0
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    found, expected = [], []
    for prompt in (tokens[0], tokens[1], tokens[0, :5]):
        with torch.no_grad():
            expected.append(model(prompt[None]).logits[0, -1].log_softmax(-1))
        asked = {"prompt": prompt.tolist(), "n_predict": 1, "n_probs": model.config.vocab_size, "cache_prompt": False}
        entries = None
        for seed in range(8):  # an end token that happens to be drawn comes without its probabilities
            answer = server.handle_completions(asked | {"seed": seed})["choices"][0]["logprobs"]
            if answer is not None and answer["content"]:
                entries = answer["content"][0]["top_logprobs"]
                break
        if entries is None:
            raise RuntimeError("only end tokens were drawn")
        row = torch.full_like(expected[-1], float("nan"))
        row[[entry["id"] for entry in entries]] = torch.tensor([entry["logprob"] for entry in entries])
        found.append(row)
    return compare(torch.stack(found), torch.stack(expected))


def quantised(folder: Path, model: PreTrainedModel, installed: set[str]) -> Iterator[Result]:
    inputs = example_inputs(model)
    expected = output_of(model, inputs)
    auto = AutoModelForCausalLM if model.can_generate() else AutoModelForImageClassification
    configs: dict[str, Any] = {}
    if "bitsandbytes" in installed:
        skip = {"llm_int8_skip_modules": ["lm_head", "classifier"]}  # an LM's head is left out by itself
        configs["bitsandbytes, 8 bit"] = BitsAndBytesConfig(load_in_8bit=True, **skip)
        configs["bitsandbytes, 4 bit (nf4)"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **skip)
    if "torchao" in installed:
        from torchao.quantization import Int8WeightOnlyConfig

        configs["torchao, int8 weights"] = TorchAoConfig(Int8WeightOnlyConfig())
    for name, config in configs.items():

        def load(config: Any = config) -> str:
            loaded = auto.from_pretrained(
                folder, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
            )
            return compare(output_of(loaded, inputs), expected)

        yield name, attempt(load)


def four_bit_sizes() -> Iterator[tuple[str, Result]]:
    """One linear layer of several sizes in 4 bits: its error, which is that of the format where all is well."""
    import bitsandbytes as bnb

    for rows, columns in ((64, 32), (64, 64), (64, 96), (64, 128), (64, 160), (64, 256), (32, 128), (48, 128)):

        def run(training: bool, rows: int = rows, columns: int = columns) -> str:
            torch.manual_seed(0)
            weight, inputs = torch.randn(rows, columns), torch.randn(16, columns)
            linear = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            with torch.no_grad():
                return compare(linear.to("cpu").train(training)(inputs), inputs @ weight.T)

        for training in (False, True):
            mode = "training" if training else "evaluation"
            result = attempt(partial(run, training))
            yield f"one layer, {rows} rows of {columns}", (f"bitsandbytes, 4 bit (nf4), {mode}", result)


def attempt(what: Any) -> str:
    """The script goes on, and prints what went wrong."""
    try:
        return str(what())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def results(folder: Path, args: argparse.Namespace, installed: set[str]) -> Iterator[Result]:
    config = AutoConfig.from_pretrained(folder)
    text = config.architectures[0].endswith("ForCausalLM")
    model = (AutoModelForCausalLM if text else AutoModelForImageClassification).from_pretrained(folder).eval()
    if "compile" in args.only:
        yield "torch.compile", (line := check_compile(model)).answer + ", " + line.detail
    if "onnx" in args.only and "onnxruntime" in installed:
        yield "ONNX", (line := check_onnx(model)).answer + ", " + line.detail
    if "gguf" in args.only and text and args.llama_cpp and "gguf" in installed:
        yield from gguf(folder, model, args.llama_cpp, "xllamacpp" in installed)
    if "quantised" in args.only:
        yield from quantised(folder, model, installed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--shape", type=int, nargs=4)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--only", nargs="+", default=["compile", "onnx", "gguf", "quantised", "sizes"])
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), help="of the tiny models")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    installed = {name for name in PACKAGES if importlib.util.find_spec(name)}
    print("| model | runtime | result |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sources = cut(args.teacher, args.shape, Path(folder)) if args.teacher else tiny(Path(folder), args.cuts)
        for name, place in sources:
            for runtime, result in results(place, args, installed):
                print(f"| {name} | {runtime} | {result} |", flush=True)
    if "sizes" in args.only and "bitsandbytes" in installed:
        for name, (runtime, result) in four_bit_sizes():
            print(f"| {name} | {runtime} | {result} |", flush=True)
    print(f"not installed: {sorted(set(PACKAGES) - installed) or 'none'}")


if __name__ == "__main__":
    main()
