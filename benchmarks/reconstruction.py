"""
What least-squares reconstruction gives back, and what it costs.

Quality, of a teacher in a folder: units by Fisher importance, then sliced, refitted in one shot (moments of the dense
model) and in sequence (`reconstruct`); perplexity of held-out windows, or accuracy and agreement on held-out images:

    python benchmarks/reconstruction.py quality TEACHER TRAIN EVAL --shapes 8x512 8x384x5

Cost, of random weights at given sizes: seconds and peak memory of `reconstruct`:

    python benchmarks/reconstruction.py cost llama-3.2-1b --device cuda --windows 64 --seq-len 512
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import lzma
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from document import circumstances
from latency_cases import PRESETS, parameter_mib, random_inputs, random_model
from peak import Peak
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from hawada_peft import HawAdaConfig, Plan, Shape, init_gates, slim
from hawada_peft.refit import reconstruct
from hawada_peft.refit.held_out import HELD_OUT
from hawada_peft.refit.projections import as_projection, choose, new_moments
from hawada_peft.refit.reconstruction import DAMPINGS
from hawada_peft.vanilla.family import locate

Batches = list[dict[str, torch.Tensor]]


def read_tokens(path: str) -> np.ndarray:
    with lzma.open(path) if path.endswith(".xz") else open(path, "rb") as file:
        return np.load(io.BytesIO(file.read()))


def windows(tokens: np.ndarray, starts: np.ndarray, length: int, rows: int) -> Batches:
    stacked = torch.tensor(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))
    return [{"input_ids": part, "labels": part} for part in stacked.split(rows)]


def images(path: str, count: int, rows: int) -> Batches:
    from PIL import Image

    data = np.load(path)
    jpeg, pixels = data["jpeg"], []
    for start, end in itertools.islice(itertools.pairwise(data["offsets"]), count):
        with Image.open(io.BytesIO(jpeg[start:end].tobytes())) as image:
            pixels.append((np.asarray(image.convert("RGB"), dtype=np.float32) / 255 - 0.5) / 0.5)
    stacked = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2)
    labels = torch.tensor(data["labels"][:count].astype(np.int64))
    parts = zip(stacked.split(rows), labels.split(rows), strict=True)
    return [{"pixel_values": pixels, "labels": labels} for pixels, labels in parts]


def logits(model: PreTrainedModel, batches: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            yield model(**inputs).logits.float(), batch["labels"].to(model.device)


def quality(model: PreTrainedModel, batches: Batches, dense_classes: torch.Tensor | None) -> dict[str, float]:
    """Perplexity of text; accuracy and agreement with the dense model's classes, in %, of images."""
    if dense_classes is None:
        losses = [functional.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
                  for out, labels in logits(model, batches)]  # fmt: skip
        return {"perplexity": math.exp(sum(losses) / sum(batch["labels"][:, 1:].numel() for batch in batches))}
    found = classes(model, batches)
    labels = torch.cat([batch["labels"] for batch in batches]).to(found.device)
    return {
        "accuracy": 100 * (found == labels).double().mean().item(),
        "agreement": 100 * (found == dense_classes).double().mean().item(),
    }


def classes(model: PreTrainedModel, batches: Batches) -> torch.Tensor:
    return torch.cat([out.argmax(-1) for out, _ in logits(model, batches)])


def one_shot(dense: PreTrainedModel, small: PreTrainedModel, plan: Plan, batches: Batches) -> None:
    """Every projection refitted on the dense model's inputs of its kept units, towards its dense output."""
    layout, there = locate(dense), locate(small)
    held = max(1, round(HELD_OUT * len(batches)))
    fits = []
    for index, layer in enumerate(plan.layers):
        heads = (torch.tensor(plan.heads[index])[:, None] * layout.head_dim + torch.arange(layout.head_dim)).flatten()
        channels = torch.tensor(plan.channels[index])
        for source, name, kept in (
            (layout.attention_out(layer), there.attention_out(index), heads),
            (layout.ffn_out(layer), there.ffn_out(index), channels),
        ):
            module = as_projection(small.get_submodule(name), name)
            fits.append((dense.get_submodule(source), name, module, kept, (new_moments(module), new_moments(module))))
    with ExitStack() as hooks, torch.no_grad():
        current = {"held": 0}
        for source, _, _, kept, moments in fits:

            def add(_module: Any, args: Any, out: torch.Tensor, kept: Any = kept, moments: Any = moments) -> None:
                moments[current["held"]].add(args[0].flatten(0, -2)[:, kept.to(out.device)], out.flatten(0, -2))

            hooks.callback(source.register_forward_hook(add).remove)
        for number, batch in enumerate(batches):
            current["held"] = int(number >= len(batches) - held)
            dense(**{name: value.to(dense.device) for name, value in batch.items() if name != "labels"})
    for _, name, module, _, (fitted, held_out) in fits:
        choose(name, module, fitted, held_out, None, DAMPINGS)


def parse_shape(text: str) -> Shape:
    heads, ffn, *layers = map(int, text.split("x"))
    return Shape(num_attention_heads=heads, intermediate_size=ffn, num_hidden_layers=layers[0] if layers else None)


def run_quality(options: argparse.Namespace) -> None:
    vision = options.train.endswith(".npz")
    auto = AutoModelForImageClassification if vision else AutoModelForCausalLM
    base = auto.from_pretrained(options.teacher, dtype=torch.float32).to(options.device).eval()
    if vision:
        calibration = images(options.train, options.windows, options.rows)
        held_out = images(options.eval, options.eval_windows, 8 * options.rows)
    else:
        length, tokens = options.seq_len, read_tokens(options.train)
        starts = np.random.default_rng(options.seed).integers(0, len(tokens) - length, options.windows)
        calibration = windows(tokens, starts, length, options.rows)
        starts = np.arange(options.eval_windows) * length
        held_out = windows(read_tokens(options.eval), starts, length, options.rows)
    model = get_peft_model(base, HawAdaConfig(gates=("heads", "ffn", "layers")))
    init_gates(model, calibration)
    plans = {text: model.plan(parse_shape(text)) for text in options.shapes}
    base = model.unload()
    dense_classes = classes(base, held_out) if vision else None
    rows = [{"shape": "dense", "form": "dense"} | quality(base, held_out, dense_classes)]
    print(json.dumps(rows[-1]), flush=True)
    for text, plan in plans.items():
        sliced = slim(base, plan)
        for form in ("slice", "one-shot", "sequential"):
            small = copy.deepcopy(sliced)
            start, extra = time.perf_counter(), {}
            if form == "one-shot":
                one_shot(base, small, plan, calibration)
            elif form == "sequential":
                result = reconstruct(base, small, plan, calibration)
                extra = {"kl_before": result.before, "kl_after": result.after, "applied": result.applied}
                extra["dampings"] = [refit.damping for refit in result.refits]
            seconds = time.perf_counter() - start
            row = {"shape": text, "layers": plan.layers, "form": form, "seconds": round(seconds, 1)}
            rows.append(row | quality(small, held_out, dense_classes) | extra)
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1))


def cost(
    dense: PreTrainedModel, *, windows: int = 64, seq_len: int = 512, rows: int = 8, seed: int = 0
) -> dict[str, float | int | str]:
    """Seconds and peak memory of `reconstruct` towards half the heads, half the FFN and 3/4 of the layers."""
    torch.manual_seed(seed)
    model = get_peft_model(dense, HawAdaConfig(gates=("heads", "ffn", "layers")))
    plan = model.plan(keep_ratio={"heads": 0.5, "ffn": 0.5, "layers": 0.75})
    dense = model.unload()
    del model
    small = slim(dense, plan)
    batches = [
        {name: values.cpu() for name, values in random_inputs(dense, min(rows, windows - start), seq_len).items()}
        for start in range(0, windows, rows)
    ]
    peak = Peak(str(dense.device))
    with warnings.catch_warnings(), peak:
        warnings.filterwarnings("ignore", "the slim model keeps its plain weights")  # weights and tokens are noise
        result = reconstruct(dense, small, plan, batches)
    return {
        "dtype": str(dense.dtype).removeprefix("torch."),
        "windows": windows,
        "seq_len": seq_len,
        "slim": plan.shape.to_dict(),
        "seconds": peak.seconds,
        "dense_mib": parameter_mib(dense),
        "slim_mib": parameter_mib(small),
        "peak_above_both_mib": peak.mib,
        "projections": len(result.refits),
    }


def run_cost(options: argparse.Namespace) -> None:
    dense = random_model(PRESETS[options.model], getattr(torch, options.dtype), options.device, options.seed)
    row = {"model": options.model, "device": circumstances(options.device)["device"]}
    row |= cost(dense, windows=options.windows, seq_len=options.seq_len, rows=options.rows, seed=options.seed)
    print(json.dumps(row, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(row, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("quality")
    first.add_argument("teacher", help="a folder with a causal language model or an image classifier")
    first.add_argument(
        "train", help="tokens (.npy, .npy.xz) or images (.npz with jpeg, offsets, labels) to calibrate on"
    )
    first.add_argument("eval", help="held-out data of the same kind")
    first.add_argument("--shapes", nargs="+", required=True, help="HEADSxFFN or HEADSxFFNxLAYERS")
    first.add_argument("--eval-windows", type=int, default=64, help="windows or images of the held-out data")
    first.set_defaults(run=run_quality)
    second = commands.add_parser("cost")
    second.add_argument("model", choices=sorted(PRESETS))
    second.add_argument("--dtype", default="bfloat16")
    second.set_defaults(run=run_cost)
    for command in (first, second):
        command.add_argument("--windows", type=int, default=64, help="calibration windows or images")
        command.add_argument("--seq-len", type=int, default=512)
        command.add_argument("--rows", type=int, default=8, help="windows or images per batch")
        command.add_argument("--device", default="cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", default="", help="a JSON file for the figures")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
