"""What gates and the export cost: injection time, gate parameters, adapter size, export time and peak memory.

    python benchmarks/export_cost.py --shape llama-3.2-1b --group-size 1

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
from latency_cases import PRESETS, parameter_mib, random_model
from peak import Peak
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from hawada_peft import HawAdaConfig, collect_gates

KEEP = {"heads": 0.5, "ffn": 0.5, "layers": 0.75}


def layer_mib(model: PreTrainedModel) -> float:
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return sum(p.numel() * p.element_size() for p in layers[0].parameters()) / 2**20


def planned(base: PreTrainedModel, group_size: int = 1) -> PeftModel:
    """The model with gates and a plan: half the heads, half the FFN, 3/4 of the layers."""
    model = get_peft_model(base, HawAdaConfig(group_size=group_size)).eval()
    model.apply_plan(model.plan(keep_ratio=KEEP))
    return model


def merged(model: PeftModel) -> tuple[PreTrainedModel, Peak]:
    """The slim model, and the time and memory of `merge_and_unload`. Nothing else should hold the dense model."""
    peak = Peak(str(model.device))
    with peak:
        slim = model.merge_and_unload()
    return slim, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(PRESETS), required=True)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="injections timed")
    arguments = parser.parse_args()

    base = random_model(PRESETS[arguments.shape], torch.bfloat16)
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
        model.apply_plan(model.plan(keep_ratio=KEEP))
        model.save_pretrained(folder)
        config = (Path(folder) / "adapter_config.json").stat().st_size

    del base
    slim, peak = merged(model)
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
                "export_s": round(peak.seconds, 2),
                "slim_mib": round(parameter_mib(slim), 1),
                "peak_above_dense_mib": round(peak.mib, 1),
                "peak_above_dense_and_slim_mib": round(peak.mib - parameter_mib(slim), 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
