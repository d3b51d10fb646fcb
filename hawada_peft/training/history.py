"""How the gates of every layer moved, in a small file beside the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..files.atomic import write_text
from ..gates.kinds import SigmoidGate
from ..gates.reading import expected_sizes, layers_of, open_probabilities
from ..planning.cut import BESIDE
from ..planning.plan import Plan
from ..planning.towers import each_of
from ..search.timed import dense_model
from ..vanilla.family import Layout, locate_all
from ..vanilla.shape import BY_FIELD, BY_NAME, FFN, HEADS, LAYERS

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
        write_text(folder / HISTORY_FILE, json.dumps({"format": FORMAT, **facts, "entries": self.entries}))


@torch.no_grad()
def layer_means(model: PeftModel, plan: Plan | None) -> dict[str, Any]:
    """
    What is known of each layer by its gates.

    Args:
        model: with one active adapter, placed by a family row.
        plan: what stays; what the gates expect if there is none.

    Returns:
        For `"heads"`, `"ffn"` and `"layers"`, where they have gates: `gate`, the mean gate value of every dense layer,
        and `keep`, what of the layer stays; both (layers,), to four digits. Of further towers the same under
        `"beside"`, by their names.
    """
    first, *beside = each_of(locate_all(dense_model(model)), plan)
    means = {layout.tower: _means(model, layout, part, plan) for layout, part in beside}
    return _means(model, *first, plan) | ({BESIDE: means} if means else {})


def _means(model: PeftModel, layout: Layout, part: Plan | None, whole: Plan | None) -> dict[str, Any]:
    """Of a tower; what a plan does not speak of stays."""
    base, name = dense_model(model), model.active_adapters[0]
    layers = layers_of(base, layout, [name])
    plan = part or (None if whole is None else Plan.keep_all(layout.dense, layout.tower))
    if plan is None:
        sizes, dense = expected_sizes(base, layout, name), layout.dense.sizes()
        keep = {
            HEADS: (sizes.heads / dense["num_attention_heads"]).tolist(),
            FFN: (sizes.ffn / dense["intermediate_size"]).tolist(),
            LAYERS: sizes.layers.tolist(),
        }
    else:
        dense, count = plan.dense.sizes(), range(len(layers))
        totals = {axis: dense[BY_NAME[axis].field] for axis in (HEADS, FFN)}
        keep = {axis: [len(plan.kept(axis, i) or ()) / total for i in count] for axis, total in totals.items()}
        keep[LAYERS] = [float(layer in plan.layers) for layer in count]
    gates = {axis: [layer.by_axis[axis] for layer in layers] for axis in keep}
    return {
        axis: {"gate": _short(map(_mean_product, found)), "keep": _short(keep[axis])}
        for axis, found in gates.items()
        if all(found)
    }


@torch.no_grad()
def keep_ratios(model: PeftModel, plan: Plan | None) -> dict[str, float]:
    """
    Per axis what stays of it, as `keep_heads` and so on; of several towers as `keep_text_config.heads`.

    Args:
        model: with one active adapter, placed by a family row.
        plan: what stays; what the gates expect if there is none.
    """
    ratios = {}
    towers = each_of(locate_all(dense_model(model)), plan)
    for layout, part in towers:
        before = f"{layout.tower}." if len(towers) > 1 else ""
        for field, probabilities in open_probabilities(model, layout).items():
            if plan is None:
                ratio = torch.cat([each.flatten().cpu() for each in probabilities]).mean().item()
            else:
                kept, dense = ({}, {}) if part is None else (part.shape.to_dict(), part.dense.to_dict())
                ratio = kept[field] / dense[field] if field in kept else 1.0
            ratios[f"keep_{before}{BY_FIELD[field].name}"] = ratio
    return ratios


def _mean_product(gates: Sequence[SigmoidGate]) -> float:
    """The mean over the units of the product of gates."""
    return float(torch.stack([gate.value().cpu() for gate in gates]).prod(0).mean())


def _short(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
