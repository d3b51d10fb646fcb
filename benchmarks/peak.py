"""Seconds and peak memory of a piece of work, on a GPU or in this process."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from types import TracebackType

import torch

MIB = 2**20


def memory_mib(field: str) -> float:
    """A field of /proc/self/status, e.g. VmRSS, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Peak:
    """
    Times a `with` block and finds the most memory it held above what was held before it.

    On CUDA that is what torch's allocator gave out; elsewhere resident memory, as the kernel keeps its peak (VmHWM,
    mapped files included); not a number where the kernel does not let a process start that anew.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.seconds, self.mib = 0.0, math.nan

    def __enter__(self) -> Peak:
        gc.collect()  # models that hold themselves would count as held before
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                self.before = memory_mib("VmRSS")
            except OSError:
                self.before = math.nan
        self.start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        if not math.isnan(self.before):
            peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else memory_mib("VmHWM")
            self.mib = peak - self.before
