"""What an export costs: merged in memory, refitted, saved, and streamed from files to files."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_cost import merged, planned
from latency_cases import PRESETS as MODELS
from latency_cases import parameter_mib, random_model
from peak import MIB, Peak
from reconstruction import cost as reconstruction_cost
from stream_export import copy, drop_from_cache

from hawada_peft import save_slim, slim_checkpoint

from .presets import Preset
from .rows import Row, Rows


def merge_row(config: Any, dtype: str, device: str, where: str, repeats: int) -> Row:
    """
    `merge_and_unload`: the median of some, after one that does not count.

    Args:
        config: the model.
        dtype: of its weights.
        device: where random weights are drawn.
        where: where the model is when it is merged.
        repeats: how many count.
    """
    sizes, peaks = {}, []
    for _ in range(repeats + 1):
        model = planned(random_model(config, getattr(torch, dtype), device).to(where))
        dense_mib = parameter_mib(model.get_base_model())
        slim, peak = merged(model)
        sizes = {"dense_mib": dense_mib, "slim_mib": parameter_mib(slim)}
        peaks.append(peak)
        del model, slim
    return sizes | {
        "where": where,
        "s": statistics.median(peak.seconds for peak in peaks[1:]),
        "peak_mib": statistics.median(peak.mib for peak in peaks[1:]),
        "repeats": repeats,
    }


def save_row(config: Any, dtype: str, device: str, work: Path) -> Row:
    """`save_slim`: written, reloaded, compared."""
    model = planned(random_model(config, getattr(torch, dtype), device))
    dense_mib = parameter_mib(model.get_base_model())
    slim, _ = merged(model)
    del model
    peak = Peak("cpu")
    with tempfile.TemporaryDirectory(dir=work) as folder, peak:
        save_slim(slim, Path(folder) / "slim")
    return {
        "dense_mib": dense_mib,
        "slim_mib": parameter_mib(slim),
        "where": "disk",
        "s": peak.seconds,
        "peak_mib": peak.mib,
        "repeats": 1,
    }


def stream_row(config: Any, dtype: str, device: str, work: Path) -> Row:
    """`slim_checkpoint`, and a plain copy of the dense files; both read from the disk and flush to it."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        model = planned(random_model(config, getattr(torch, dtype), device))
        model.save_pretrained(folder / "adapter")
        base = model.unload()
        base.save_pretrained(folder / "base")
        dense_mib = parameter_mib(base)
        del model, base
        copied, _ = copy(folder / "base", folder / "copy")
        shutil.rmtree(folder / "copy")
        drop_from_cache(folder / "base")
        peak = Peak("cpu")
        with peak:
            written = slim_checkpoint(folder / "base", folder / "adapter", folder / "slim")
    return {
        "dense_mib": dense_mib,
        "slim_mib": written.weight_bytes / MIB,
        "where": "disk to disk",
        "s": peak.seconds,
        "peak_mib": peak.mib,
        "copy_s": copied,
        "repeats": 1,
    }


def refit_row(config: Any, dtype: str, device: str, preset: Preset) -> Row:
    """`reconstruct` on random calibration data."""
    found = reconstruction_cost(
        random_model(config, getattr(torch, dtype), device), windows=preset.windows, seq_len=preset.seq_len
    )
    return found | {
        "where": device,
        "s": found["seconds"],
        "peak_mib": found["peak_above_both_mib"],
        "repeats": 1,
    }


def measure_exports(rows: Rows, preset: Preset, device: str, work: Path) -> None:
    """The rows of each model."""
    for name, dtype in preset.exports:
        config = MODELS[name]
        tasks = {
            f"`merge_and_unload`, {where}": partial(
                merge_row, config, dtype, device, where, preset.repeats if where == device else 1
            )
            for where in dict.fromkeys((device, "cpu"))
        }
        tasks["`reconstruct`"] = partial(refit_row, config, dtype, device, preset)
        tasks["`save_slim`"] = partial(save_row, config, dtype, device, work)
        tasks["`slim_checkpoint`"] = partial(stream_row, config, dtype, device, work)
        for what, task in tasks.items():
            rows.make(
                "export",
                f"{name}, {dtype}: {what}",
                lambda name=name, dtype=dtype, what=what, task=task: (
                    {"model": f"{name}, {dtype}", "what": what} | task()
                ),
            )
