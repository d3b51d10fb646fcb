"""Least squares layer by layer from the files, at Llama-3.1-8B's widths: memory and processor time.

    python benchmarks/larger_than_memory.py --work-dir /some/disk --layers 2 4

Writes random bfloat16 weights of a few layers (3 GB with 4, 16 GB with 32), and slims them to 16 of 32 heads and FFN
10752 of 14336 with `slim_checkpoint(..., calibration=..., low_memory=True)`, in a process of its own. The data
are random tokens: what is measured does not depend on them. For each number of layers one line of JSON: seconds,
processor seconds, the peak of the anonymous memory (what the process allocated itself, sampled ten times a second),
and that of its resident set as the kernel keeps it (VmHWM, with pages of mapped files, which the system takes back
when others need memory). From two numbers of layers follows the cost of one, and of the whole model.
Everything written is deleted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from stream_export import memory, write_base

from hawada_peft import Plan, slim_checkpoint
from hawada_peft.files.checkpoint import Checkpoint
from hawada_peft.vanilla.family import locate

VOCABULARY, LAYERS = 128256, 32


def plan_of(base: Path) -> Plan:
    """Every other query head, and every fourth channel goes."""
    full = Plan.keep_all(locate(Checkpoint(base).skeleton).dense)
    heads = tuple(tuple(head for head in each if head % 2) for each in full.heads)
    channels = tuple(tuple(channel for channel in each if channel % 4) for each in full.channels)
    return Plan(full.dense, full.layers, heads, channels)


def slim_here(base: Path, target: Path, windows: int, tokens: int) -> None:
    """In the process whose memory is measured."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(VOCABULARY, (1, tokens), generator=generator)} for _ in range(windows)]
    plan, before = plan_of(base), memory("self", "VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    written = slim_checkpoint(base, None, target, plan=plan, calibration=batches, low_memory=True)
    result = {
        "layers": len(plan.layers),
        "positions": windows * tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "rss_before_mb": round(before),
        "peak_rss_mb": round(memory("self", "VmHWM")),
        "reconstruction": str(written.reconstruction),
    }
    print(json.dumps(result))


def measured(work: Path, layers: int, windows: int, tokens: int) -> dict[str, float]:
    """Write a base, slim it in another process, and watch that."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        base = Path(folder) / "base"
        dense = write_base(base, layers=layers, vocabulary=VOCABULARY)
        words = [str(base), str(Path(folder) / "slim"), str(windows), str(tokens)]
        process = subprocess.Popen([sys.executable, __file__, "--here", *words], stdout=subprocess.PIPE, text=True)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory(process.pid, "RssAnon"))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(process.returncode)
        assert process.stdout is not None
        return json.loads(process.stdout.read()) | {"dense_mb": round(dense / 1e6), "peak_anonymous_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        base, target, windows, tokens = given.here
        slim_here(Path(base), Path(target), int(windows), int(tokens))
        return
    found = []
    for layers in given.layers:
        found.append(measured(given.work_dir, layers, given.windows, given.tokens))
        print(json.dumps(found[-1]), flush=True)
    if len(found) > 1 and found[0]["layers"] < found[-1]["layers"]:
        first, last = found[0], found[-1]
        count = last["layers"] - first["layers"]
        per_layer = {
            name: (last[name] - first[name]) / count for name in ("seconds", "processor_seconds", "peak_anonymous_mb")
        }
        whole = {name: round(last[name] + (LAYERS - last["layers"]) * each) for name, each in per_layer.items()}
        print(json.dumps({"per_layer": per_layer, f"of_{LAYERS}_layers": whole}))


if __name__ == "__main__":
    main()
