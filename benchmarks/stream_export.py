"""The streaming export of a checkpoint with Llama-3.1-8B shapes: memory, speed against a file copy, bytes, kills.

    python benchmarks/stream_export.py --work-dir /some/disk/with/60/GB

Writes random bfloat16 weights (16 GB) shard by shard, and exports 16 of 32 heads, FFN 10752 of 14336 and 28 of 32
layers. The base is copied file by file before and after, flushed to the disk as the export is. Before each of the
three the base's files are dropped from the page cache, so all of them read from the disk. The speeds that are
compared are bytes of the dense base over seconds; the export writes less than it reads, so its bytes written per
second are given too. Memory is that of a process that only exports: its peak resident set as the kernel keeps it
(VmHWM, mapped files included), and the largest samples of its anonymous and of its file-backed part.

Byte equality with the export in memory is checked on 4 layers of the same widths and a vocabulary of 32000. Processes
are killed at random moments on 2 layers and a vocabulary of 8000. Everything written is deleted.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hawada_peft import HawAdaConfig, Shape, collect_gates, slim_checkpoint
from hawada_peft.files.checkpoint import Checkpoint
from hawada_peft.files.pieces import stored_pieces
from hawada_peft.files.shards import write_shard

BLOCK = 2**25


def write_base(folder: Path, *, layers: int, vocabulary: int) -> int:
    """A checkpoint of Llama-3.1-8B's widths, from one block of random numbers; bytes of its weights."""
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = model.state_dict()
    like = {key: state[piece.name] for key, piece in stored_pieces(model).items()}
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)

    def parts(key: str) -> Iterator[torch.Tensor]:
        left, start = like[key].numel(), random.Random(key).randrange(BLOCK // 2)
        while left:
            part = block[start : start + left]
            yield part
            left, start = left - part.numel(), 0

    model.save_pretrained(folder, state_dict={})
    split = split_torch_state_dict_into_shards(like, max_shard_size="5GB")
    for file, keys in split.filename_to_tensors.items():
        write_shard(folder / file, {key: like[key] for key in keys}, parts)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.nbytes for tensor in like.values())


def write_adapter(base: Path, folder: Path, *, layers: int) -> None:
    """Gates at random values, with a plan."""
    model = get_peft_model(Checkpoint(base).skeleton, HawAdaConfig(group_size=32))
    torch.manual_seed(1)
    for gate in collect_gates(model).values():
        gate.theta = nn.Parameter(torch.randn(gate.theta.shape))
    model.apply_plan(model.plan(Shape(16, 8, 10752, layers)))
    model.save_pretrained(folder)


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of a plain copy flushed to the disk."""
    drop_from_cache(source)
    start, processor = time.perf_counter(), time.process_time()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start, time.process_time() - processor


def memory(pid: int | str, field: str) -> float:
    """MB of a field of /proc/PID/status; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field)), 0.0)


def export_here(base: Path, adapter: Path, target: Path) -> None:
    """In the process whose memory is measured."""
    before = memory("self", "VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    written = slim_checkpoint(base, adapter, target, max_shard_size="5GB")
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(
        json.dumps(
            {
                "seconds": seconds,
                "processor_seconds": processor,
                "bytes_written": written.weight_bytes,
                "rss_before_mb": before,
                "peak_rss_mb": memory("self", "VmHWM"),
            }
        )
    )


def export(base: Path, adapter: Path, target: Path) -> dict[str, float]:
    drop_from_cache(base)
    command = [sys.executable, __file__, "--export", str(base), str(adapter), str(target)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"RssAnon": 0.0, "RssFile": 0.0}
    while child.poll() is None:
        peaks = {field: max(peak, memory(child.pid, field)) for field, peak in peaks.items()}
        time.sleep(0.02)
    if child.returncode:
        raise RuntimeError("the export failed")
    said: dict[str, float] = json.loads(child.communicate()[0].splitlines()[-1])
    return said | {"peak_anonymous_mb": peaks["RssAnon"], "peak_file_backed_mb": peaks["RssFile"]}


def measure_speed(work: Path) -> dict[str, object]:
    base, adapter = work / "base", work / "adapter"
    start = time.perf_counter()
    dense = write_base(base, layers=32, vocabulary=128256)
    print(f"wrote {dense / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    write_adapter(base, adapter, layers=28)
    copies = [copy(base, work / "copy")]
    shutil.rmtree(work / "copy")
    exported = export(base, adapter, work / "slim")
    shutil.rmtree(work / "slim")
    copies.append(copy(base, work / "copy"))
    speeds = [dense / 1e6 / seconds for seconds, _ in copies]
    mine = dense / 1e6 / exported["seconds"]
    return {
        "dense_gb": dense / 1e9,
        "slim_gb": exported["bytes_written"] / 1e9,
        **{name: value for name, value in exported.items() if name != "bytes_written"},
        "copy_seconds": [seconds for seconds, _ in copies],
        "copy_processor_seconds": [processor for _, processor in copies],
        "copy_mb_per_s": speeds,
        "export_mb_per_s_of_dense_bytes": mine,
        "export_over_copy": mine / (sum(speeds) / len(speeds)),
        "export_mb_written_per_s": exported["bytes_written"] / 1e6 / exported["seconds"],
    }


def measure_equality(work: Path) -> dict[str, object]:
    base, adapter = work / "base", work / "adapter"
    dense = write_base(base, layers=4, vocabulary=32000)
    write_adapter(base, adapter, layers=3)
    slim_checkpoint(base, adapter, work / "slim", max_shard_size="1GB", card=None)  # the model's files alone
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(work / "expected", max_shard_size="1GB")
    names = sorted(path.name for path in (work / "expected").iterdir())
    if names != sorted(path.name for path in (work / "slim").iterdir()):
        raise RuntimeError("other files")
    _, different, unread = filecmp.cmpfiles(work / "slim", work / "expected", names, shallow=False)
    return {"dense_gb": dense / 1e9, "files": len(names), "different": different + unread}


def in_child(task: partial[object]) -> int:
    child = os.fork()
    if child == 0:
        task()
        os._exit(0)
    return child


def measure_kills(work: Path, count: int) -> dict[str, object]:
    base, adapter, target = work / "base", work / "adapter", work / "out" / "slim"
    dense = write_base(base, layers=2, vocabulary=8000)
    write_adapter(base, adapter, layers=1)
    task = partial(slim_checkpoint, base, adapter, target)
    start = time.perf_counter()
    os.waitpid(in_child(task), 0)
    whole = time.perf_counter() - start
    target.rename(work / "whole")
    names = sorted(path.name for path in (work / "whole").iterdir())
    states, draw = [], random.Random(0)
    for _ in range(count):
        began = time.time_ns()
        child = in_child(task)
        time.sleep(draw.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not target.exists():
            parts = [path for path in (work / "out").rglob("*.safetensors") if path.stat().st_mtime_ns > began]
            states.append("nothing, killed with weights half-written" if parts else "nothing")
            continue
        same = filecmp.cmpfiles(target, work / "whole", names, shallow=False)[0] == names
        states.append("complete" if same else "half-written")
        shutil.rmtree(target)
    os.waitpid(in_child(task), 0)
    left = sorted(path.name for path in (work / "out").iterdir())
    return {
        "dense_gb": dense / 1e9,
        "seconds_of_a_whole_run": whole,
        "after_kill": {state: states.count(state) for state in sorted(set(states))},
        "in_the_parent_folder_after_one_more_run": left,
    }


def main() -> None:
    if sys.argv[1:2] == ["--export"]:
        export_here(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--parts", nargs="+", default=["kills", "equality", "speed"])
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    parts = {
        "speed": measure_speed,
        "equality": measure_equality,
        "kills": partial(measure_kills, count=arguments.kills),
    }
    torch.set_num_threads(1)
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
            print(json.dumps({name: parts[name](Path(folder))}, indent=1), flush=True)


if __name__ == "__main__":
    main()
