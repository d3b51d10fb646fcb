"""How step, export, table and search grow with the layers and the width of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from latency_cases import auto_class, parse_case
from step_cost import GATES, QV

from hawada_peft.latency.budget import LatencyBudget

from .budgets import Curves, Searched, timed_search
from .exports import merge_row
from .presets import Preset
from .rows import Row, Rows
from .steps import step_row


def search_row(preset: Preset, layers: int, hidden: int, device: str, curves: Curves) -> Row:
    """Time of the table and of the search for one budget."""
    with torch.device("meta"):
        config = preset.grid.config(layers, hidden)
        base = auto_class(config).from_config(config)
    regime = parse_case(f"grid:{preset.grid.regime}", device).regime
    searched = Searched(base, regime, preset.grid_table, preset.timing)
    return timed_search(searched, LatencyBudget(speedup=preset.grid.speedup), curves)


def measure_scaling(rows: Rows, preset: Preset, device: str, curves: Curves) -> None:
    """Three rows per point of the grid."""
    grid = preset.grid
    for layers, hidden in grid.points():
        config = grid.config(layers, hidden)
        tasks: dict[str, Callable[[], Row]] = {
            "step": partial(step_row, config, grid.dtype, device, grid.step, preset, (GATES, QV)),
            "export": partial(merge_row, config, grid.dtype, device, device, 1),
            "search": partial(search_row, preset, layers, hidden, device, curves),
        }
        for what, task in tasks.items():
            rows.make(
                "scaling",
                f"{what}, {layers} layers, hidden size {hidden}",
                lambda what=what, layers=layers, hidden=hidden, task=task: (
                    {
                        "what": what,
                        "layers": layers,
                        "hidden": hidden,
                        "base": grid.base,
                        "step_size": grid.step,
                        "regime": grid.regime,
                        "vocabulary": grid.vocabulary,
                        "grid_dtype": grid.dtype,
                    }
                    | task()
                ),
            )
