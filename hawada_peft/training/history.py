"""How the gates of every layer moved, in a small file beside the checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..gates.adapter import BLOCK, LAYER, UNITS, GateAdapter
from ..gates.kinds import SigmoidGate
from ..gates.reading import expected_sizes
from ..planning.plan import Plan
from ..planning.ranking import LAYERS
from ..search.timed import dense_model
from ..vanilla.family import FFN, HEADS, Layout, locate

HISTORY_FILE = "gate_history.json"
FORMAT = 1
MOST_ENTRIES = 200
"""Entries that are kept. When there are more, every second one goes."""


class GateHistory:
    """
    Per logging step and layer, the mean value of the gates and what of the layer stays.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.entries: list[dict[str, Any]] = []

    def record(self, step: int, phase: str, plan: Plan | None, figures: Mapping[str, float]) -> None:
        """
        Note how the gates are. An entry of the same step is replaced.

        Args:
            step: optimizer steps done.
            phase: `"warm-up"`, `"soft"` or `"hard"`.
            plan: that is applied or approached; without one what stays is what the gates expect.
            figures: of the log.
        """
        if self.entries and self.entries[-1]["step"] == step:
            self.entries.pop()
        numbers = {
            name: float(f"{value:.6g}")
            for name, value in figures.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self.entries.append({"step": step, "phase": phase, **layer_means(self.model, plan), "figures": numbers})
        if len(self.entries) > MOST_ENTRIES:
            self.entries = [*self.entries[:-1:2], self.entries[-1]]

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """
        Write `HISTORY_FILE`; it is complete or not there.

        Args:
            folder: made if it does not exist.
            facts: what is written beside the entries.
        """
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{HISTORY_FILE}"
        temporary.write_text(json.dumps({"format": FORMAT, **facts, "entries": self.entries}), encoding="utf-8")
        os.replace(temporary, folder / HISTORY_FILE)


@torch.no_grad()
def layer_means(model: PeftModel, plan: Plan | None) -> dict[str, dict[str, list[float]]]:
    """
    What is known of each layer by its gates.

    Args:
        model: with one active adapter, placed by a family row.
        plan: what stays; what the gates expect if there is none.

    Returns:
        For `"heads"`, `"ffn"` and `"layers"`, where they have gates: `gate`, the mean gate value of every dense layer,
        and `keep`, what of the layer stays; both (layers,), to four digits.
    """
    base, name = dense_model(model), model.active_adapters[0]
    layout = locate(base)
    values = _gate_values(base, layout, name)
    count = len(values)
    if plan is None:
        sizes, dense = expected_sizes(base, layout, name), layout.dense.sizes()
        keep = {
            HEADS: (sizes.heads / dense["num_attention_heads"]).tolist(),
            FFN: (sizes.ffn / dense["intermediate_size"]).tolist(),
            LAYERS: sizes.layers.tolist(),
        }
    else:
        dense = plan.dense.sizes()
        totals = {HEADS: dense["num_attention_heads"], FFN: dense["intermediate_size"]}
        keep = {axis: [len(plan.kept(axis, i) or ()) / total for i in range(count)] for axis, total in totals.items()}
        keep[LAYERS] = [float(layer in plan.layers) for layer in range(count)]
    return {
        axis: {"gate": _short(layer[axis] for layer in values), "keep": _short(keep[axis])}
        for axis in (HEADS, FFN, LAYERS)
        if all(axis in layer for layer in values)
    }


def _gate_values(base: torch.nn.Module, layout: Layout, name: str) -> list[dict[str, float]]:
    """Per layer the mean of its gates on heads and on channels, and the product of those on the whole of it."""
    values = []
    for layer in range(layout.dense.sizes()["num_hidden_layers"]):
        attention, ffn = (
            _gates(base.get_submodule(end), name) for end in (layout.attention_out(layer), layout.ffn_out(layer))
        )
        here = {
            axis: gates[UNITS].value().mean() for axis, gates in ((HEADS, attention), (FFN, ffn)) if UNITS in gates
        }
        whole = attention.get(LAYER, ffn.get(LAYER))
        if whole is not None:
            here[LAYERS] = whole.value().prod()
        if BLOCK in attention and BLOCK in ffn:
            blocks = attention[BLOCK].value().prod() * ffn[BLOCK].value().prod().to(attention[BLOCK].theta.device)
            here[LAYERS] = here.get(LAYERS, torch.ones((), device=blocks.device)) * blocks
        values.append({axis: float(value) for axis, value in here.items()})
    return values


def _gates(module: torch.nn.Module, name: str) -> dict[str, SigmoidGate]:
    return module.gates(name) if isinstance(module, GateAdapter) else {}


def _short(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
