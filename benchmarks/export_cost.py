"""What gates and the export cost: injection time, gate parameters, adapter size, export time and peak memory.

    python benchmarks/export_cost.py --shape llama-1b --group-size 1

Builds a model with random weights, places gates, closes half of the heads and of the FFN and a quarter of the layers,
and exports in memory. The peak is that of resident memory during `merge_and_unload`, sampled by the kernel
(`VmHWM`, reset before), above what the process held just before. One case per process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

from hawada_peft import HawAdaConfig, collect_gates

MODELS = {
    # Llama-3.2-1B: 16 layers, 32 query heads in 8 KV groups.
    "llama-1b": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            vocab_size=128256,
            tie_word_embeddings=True,
        )
    ),
    "vit-b16": lambda: ViTForImageClassification(ViTConfig(num_labels=1000)),
}


def memory_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def parameter_mib(model: PreTrainedModel) -> float:
    return sum(p.numel() * p.element_size() for p in set(model.parameters())) / 2**20


def layer_mib(model: PreTrainedModel) -> float:
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return sum(p.numel() * p.element_size() for p in layers[0].parameters()) / 2**20


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return MODELS[name]().eval()
    finally:
        torch.set_default_dtype(default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(MODELS), required=True)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="injections timed")
    arguments = parser.parse_args()

    base = build(arguments.shape)
    dense_mib, one_layer = parameter_mib(base), layer_mib(base)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        model = get_peft_model(base, HawAdaConfig(group_size=arguments.group_size))
        seconds.append(time.perf_counter() - start)
        if len(seconds) < arguments.repeats:
            base = model.unload()
    gates = sum(gate.units for gate in collect_gates(model).values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = (Path(folder) / "adapter_model.safetensors").stat().st_size
        model.apply_plan(model.plan(keep_ratio={"heads": 0.5, "ffn": 0.5, "layers": 0.75}))
        model.save_pretrained(folder)
        config = (Path(folder) / "adapter_config.json").stat().st_size

    del base
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    start = time.perf_counter()
    slim = model.merge_and_unload()
    export_seconds = time.perf_counter() - start
    peak = memory_mib("VmHWM") - before
    print(
        json.dumps(
            {
                "shape": arguments.shape,
                "group_size": arguments.group_size,
                "dense_mib": round(dense_mib, 1),
                "one_layer_mib": round(one_layer, 1),
                "injection_s": round(statistics.median(seconds), 3),
                "gate_parameters": gates,
                "adapter_weights_kb": round(weights / 1000, 1),
                "adapter_config_with_plan_kb": round(config / 1000, 1),
                "export_s": round(export_seconds, 2),
                "slim_mib": round(parameter_mib(slim), 1),
                "peak_above_dense_mib": round(peak, 1),
                "peak_above_dense_and_slim_mib": round(peak - parameter_mib(slim), 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
