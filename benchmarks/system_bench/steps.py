"""What a training step of gates costs beside LoRA and IA3."""

from __future__ import annotations

from typing import Any

import torch
from latency_cases import PRESETS as MODELS
from latency_cases import random_inputs, random_model
from step_cost import compare, without_cache

from .presets import Preset
from .rows import Row, Rows


def step_row(config: Any, dtype: str, device: str, size: str, preset: Preset, only: tuple[str, ...] = ()) -> Row:
    """The adapters of a model, with time and peak memory of a step of each."""
    base = without_cache(random_model(config, getattr(torch, dtype), device))
    batch = random_inputs(base, *(int(number) for number in size.split("x")))
    found = compare(base, batch, only=only, rounds=preset.rounds, warm_up=preset.warm_up)
    return {"adapters": found, "rounds": preset.rounds}


def measure_steps(rows: Rows, preset: Preset, device: str) -> None:
    """A row per model."""
    for model, dtype, size in preset.steps:
        shown = f"{size} tokens" if hasattr(MODELS[model], "vocab_size") else f"{size.split('x')[0]} images"
        title = f"{model}, {dtype}, {shown}"
        rows.make(
            "steps",
            title,
            lambda model=model, dtype=dtype, size=size, title=title: (
                {"title": title} | step_row(MODELS[model], dtype, device, size, preset)
            ),
        )
