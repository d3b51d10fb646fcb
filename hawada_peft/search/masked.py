"""The quality of a shape, judged by masking the dense model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..errors import HawAdaError, InvalidPlanError
from ..gates.adapter import BLOCK, HIDDEN_UNITS, LAYER, UNITS, GateAdapter
from ..gates.attach import collect_gates
from ..gates.kinds import SigmoidGate
from ..gates.reading import UnitScores, gate_scores, hidden_gate
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..progress import Progress, progress_bar
from ..vanilla.family import HIDDEN, Layout
from ..vanilla.outputs import Batch
from ..vanilla.shape import Shape
from .space import SearchSpace

logger = logging.getLogger(__name__)

RESCORED = 8
"""Layers whose loss is measured anew after each drop: those that were cheapest to drop before it."""


WIDTHS = (0.75, 0.5, 0.25)
"""Parts of an axis of width at which the predicted loss is held against a measured one."""


@dataclass(frozen=True)
class Reference:
    """A calibration batch without labels, one outcome per prediction drawn from the dense model, and its log-odds."""

    batch: Batch
    outcomes: torch.Tensor
    log_dense: torch.Tensor
    mask: torch.Tensor


class MaskedQuality:
    """
    The quality of a gated model's shapes, by closing gates.

    The loss is the divergence KL(dense, slim) on calibration batches, without labels: outcomes y are drawn once from
    the dense model, and KL is the mean of `q/p - 1 - log(q/p)` at y, with p the dense and q the masked model's
    probability.

    Depth: after each drop the layers that remain are scored anew, and the cheapest goes. Width: what is cut in each
    layer is the sum of its units' scores, and how much loss that means is measured at a few widths of each axis.

    Args:
        model (`PeftModel`): with gates placed by a family row.
        batches (`Sequence`): calibration batches, keyword arguments of the forward pass.
        importance (`Mapping[str, Tensor]`, *optional*): how much the loss depends on each gate, by the names of
            `collect_gates(model)`; the gates' own values if left out.
        progress (*optional*): makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        HawAdaError: if there are no batches.
        InvalidPlanError: if the model's gates were not placed by a family row.

    References:
        Schulman, "Approximating KL Divergence" (2020), the third estimator. Kwon et al., "A Fast Post-Training Pruning
        Framework for Transformers" (2022), for sums of scores as a loss.
    """

    meaning = "nats per prediction over the dense model's, gates closed, before any recovery"

    def __init__(
        self,
        model: PeftModel,
        batches: Sequence[Batch],
        importance: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not batches:
            raise HawAdaError("no calibration batches were given; pass at least one")
        self.model, self._progress = model, progress
        self.tuner = cast(Any, model.base_model)
        self.names = list(self.tuner.active_adapters)
        self.layout: Layout = self.tuner._layout(self.names)
        self.scores = unit_scores(model, self.layout, self.names, importance)
        self.references = [self._reference(batch, index) for index, batch in enumerate(batches)]
        self.measured: dict[Plan, float] = {}
        self._order: list[int] = []
        self._depth_loss: list[float] = []

    @property
    def free(self) -> tuple[str, ...]:
        """What the gates allow to cut."""
        scores = {"heads": self.scores.heads, "ffn": self.scores.channels, "layers": self.scores.layers}
        free = tuple(axis for axis, values in scores.items() if all(value is not None for value in values))
        return free if self.scores.hidden is None else (*free, HIDDEN)

    def plan(self, shape: Shape) -> Plan:
        """What stays at a shape: layers by the order of dropping, units by their scores."""
        scores = self.scores
        if self._order:
            total = len(scores.layers)
            kept = [
                float(self._order.index(layer)) if layer in self._order else float(total) for layer in range(total)
            ]
            scores = replace(scores, layers=tuple(torch.tensor(value, dtype=torch.float64) for value in kept))
        return rank(self.layout, scores, shape.complete(self.layout.dense))

    def evaluate(self, shape: Shape) -> float:
        """The measured loss of a shape before any recovery, in nats per prediction."""
        return self.loss(self.plan(shape))

    def loss(self, plan: Plan) -> float:
        """KL(dense, masked) of a plan on the calibration batches, in nats per prediction."""
        if plan not in self.measured:
            with self._masked(plan), torch.inference_mode():
                sums = np.sum([self._divergence(reference) for reference in self.references], axis=0)
            self.measured[plan] = float(sums[0] / sums[1])
        return self.measured[plan]

    def predict(self, space: SearchSpace) -> np.ndarray:
        """
        The predicted loss over the space: (layers, heads, FFN sizes). That of its hidden size is measured, and added.
        """
        self._drop_layers(min(space.layers))
        total = self.layout.dense.sizes()["num_hidden_layers"]
        depth_loss = self.depth_losses(min(space.layers))
        heads = np.stack([self._heads_cut(layer, space.heads) for layer in range(total)])
        ffn = np.stack([self._channels_cut(layer, space.ffn) for layer in range(total)])
        heads_loss = self._measured_curve(heads.sum(0), [replace(pair) for pair in space.heads], "num_attention_heads")
        sizes = [Shape(intermediate_size=size) for size in space.ffn]
        ffn_loss = self._measured_curve(ffn.sum(0), sizes, "intermediate_size")
        hidden = 0.0 if space.hidden_size is None else max(0.0, self.evaluate(Shape(hidden_size=space.hidden_size)))
        result = np.empty((len(space.layers), len(space.heads), len(space.ffn)))
        for row, count in enumerate(space.layers):
            dropped = self._order[: total - count]
            kept = [layer for layer in range(total) if layer not in dropped]
            width = heads_loss(heads[kept].sum(0))[:, None] + ffn_loss(ffn[kept].sum(0))[None, :]
            result[row] = hidden + depth_loss[count] + width
        return result

    def depth_losses(self, least: int) -> dict[int, float]:
        """The measured loss of dropping layers and nothing else, by how many remain."""
        self._drop_layers(least)
        total = self.layout.dense.sizes()["num_hidden_layers"]
        return {total: 0.0} | {total - 1 - index: loss for index, loss in enumerate(self._depth_loss)}

    def drop_order(self, layers: int) -> list[int]:
        """The layers to drop so that `layers` remain, the cheapest first."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        self._drop_layers(layers)
        return self._order[: total - layers]

    def without_layers(self, layers: int) -> Plan:
        """The plan that drops those and nothing else."""
        return self._without(self.drop_order(layers))

    def depth_gates(self, layer: int) -> list[SigmoidGate]:
        """The gates on the blocks and on the whole of a layer."""
        ends = self.layout.attention_out(layer), self.layout.ffn_out(layer)
        adapters = [cast(nn.Module, self.model.base_model.model).get_submodule(end) for end in ends]
        return [
            gate
            for adapter in adapters
            if isinstance(adapter, GateAdapter)
            for name in self.names
            for slot, gate in adapter.gates(name).items()
            if slot in (BLOCK, LAYER)
        ]

    def _drop_layers(self, least: int) -> None:
        """Drop one layer after the other, the cheapest first, scoring those that remain anew each time."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        last: dict[int, float] = {}
        steps = range(len(self._order), total - least)
        for _ in progress_bar(self._progress, iterable=steps, desc="dropping layers", leave=False):
            remaining = [layer for layer in range(total) if layer not in self._order]
            asked = sorted(remaining, key=lambda layer: last.get(layer, 0.0))
            asked = asked[:RESCORED] if last else asked
            scores = {layer: self.loss(self._without([*self._order, layer])) for layer in asked}
            last |= scores
            cheapest = min(scores, key=scores.__getitem__)
            self._order.append(cheapest)
            self._depth_loss.append(max([scores[cheapest], *self._depth_loss[-1:]]))
        logger.info("layers in the order of dropping: %s", self._order)

    def _without(self, dropped: Sequence[int]) -> Plan:
        full = Plan.keep_all(self.layout.dense)
        keep = [index for index in full.layers if index not in dropped]
        return replace(full, layers=tuple(keep), heads=full.heads[: len(keep)], channels=full.channels[: len(keep)])

    def _heads_cut(self, layer: int, pairs: Sequence[Shape]) -> np.ndarray:
        """The sum of the scores that a layer loses at each (query heads, KV groups): (pairs,)."""
        scores = self.scores.heads[layer]
        if scores is None:
            return np.zeros(len(pairs))
        table = scores.reshape(-1, self.layout.dense.heads_per_group).sort(dim=1, descending=True).values
        best_groups = scores.reshape(table.shape).sum(1).argsort(descending=True, stable=True)
        kept = table[best_groups].cumsum(0).cumsum(1)  # (KV groups, heads per group)
        cut = [float(kept[-1, -1] - kept[(p.num_key_value_heads or 1) - 1, p.heads_per_group - 1]) for p in pairs]
        return np.maximum(cut, 0.0)

    def _channels_cut(self, layer: int, sizes: Sequence[int]) -> np.ndarray:
        """The sum of the scores that a layer loses at each FFN size: (sizes,)."""
        scores = self.scores.channels[layer]
        if scores is None:
            return np.zeros(len(sizes))
        kept = scores.sort(descending=True).values.cumsum(0)
        return np.maximum([float(kept[-1] - kept[size - 1]) for size in sizes], 0.0)

    def _measured_curve(self, cut: np.ndarray, shapes: Sequence[Shape], field: str) -> Any:
        """From sums of scores to nats: straight lines between measured points, both axes logarithmic."""
        dense = self.layout.dense.sizes()[field]
        values = np.array([getattr(shape, field) for shape in shapes])
        points: dict[float, float] = {}
        for part in WIDTHS:
            at = int(np.argmin(np.abs(values - part * dense) + 1e-6 * cut / (cut.max() + 1e-30)))
            if values[at] < dense and cut[at] > 0:
                points[float(cut[at])] = max(self.evaluate(shapes[at]), 1e-9)
        if not points:
            return lambda sums: np.asarray(sums, dtype=float)
        knots = np.log(sorted(points))
        heights = np.maximum.accumulate([np.log(points[key]) for key in sorted(points)])

        def curve(sums: np.ndarray) -> np.ndarray:
            logs = np.log(np.maximum(sums, 1e-30))
            # Beyond the measured points loss is proportional to the sum.
            outside = np.minimum(logs - knots[0], 0) + np.maximum(logs - knots[-1], 0)
            return np.where(sums > 0, np.exp(np.interp(logs, knots, heights) + outside), 0.0)

        return curve

    @contextmanager
    def _masked(self, plan: Plan) -> Iterator[None]:
        """Close what a plan removes, whatever its legality, and put everything back."""
        name = self.tuner._one_name(None)
        gates = list(collect_gates(self.model, name).values())
        before = [(gate.kept, gate.hard_in_training) for gate in gates]
        training = self.model.training
        self.model.eval()
        try:
            self.tuner.set_masks(plan, name)
            yield
        finally:
            for gate, (kept, hard) in zip(gates, before, strict=True):
                gate.set_plan(kept, in_training=hard)
            self.model.train(training)

    def _reference(self, batch: Batch, seed: int) -> Reference:
        device = next(self.model.parameters()).device
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.model.disable_adapter():
                logits = _logits(self.model(**inputs))
        finally:
            self.model.train(training)
        log_dense = logits.float().log_softmax(-1)
        flat = log_dense.reshape(-1, log_dense.shape[-1])
        # Drawn on the CPU by a generator of our own: the same on every device, and the caller's random state stays.
        drawn = torch.multinomial(flat.exp().cpu(), 1, generator=torch.Generator().manual_seed(seed)).to(device)
        given = inputs.get("attention_mask")
        positions = log_dense.shape[:-1]
        mask = given if given is not None and given.shape == positions else torch.ones(positions, device=device)
        return Reference(inputs, drawn.reshape(*positions, 1), flat.gather(-1, drawn).reshape(positions), mask.float())

    def _divergence(self, reference: Reference) -> tuple[float, float]:
        logits = _logits(self.model(**reference.batch)).float()
        log_slim = logits.gather(-1, reference.outcomes).squeeze(-1) - logits.logsumexp(-1)
        ratio = log_slim - reference.log_dense
        divergence = (ratio.exp() - 1 - ratio) * reference.mask
        return float(divergence.double().sum()), float(reference.mask.double().sum())


def unit_scores(
    model: PeftModel, layout: Layout, adapter_names: Sequence[str], importance: Mapping[str, torch.Tensor] | None
) -> UnitScores:
    """
    What cutting each unit is expected to cost, up to a factor: the importance of its gate times the square of the
    gate's value over its start; the gate's value if there is no importance.

    Raises:
        InvalidPlanError: if importance is given under other names than the model's gates have.
        BrokenGatesError: if a gate is NaN.
    """
    base = cast(nn.Module, model.base_model.model)
    plain = gate_scores(base, layout, adapter_names)
    if importance is None:
        return plain
    gates = collect_gates(model)
    unknown = sorted(set(importance) - set(gates))
    if unknown:
        raise InvalidPlanError(
            f"importance is given for gates that the model lacks: {unknown[:4]}; compute it from the same model"
        )
    by_gate = {id(gates[name]): value for name, value in importance.items()}

    def scores(end: str, slot: str = UNITS) -> torch.Tensor | None:
        adapter = base.get_submodule(end)
        found = [adapter.gates(name).get(slot) for name in adapter_names] if isinstance(adapter, GateAdapter) else []
        total: torch.Tensor | None = None
        for gate in found:
            if gate is not None and id(gate) in by_gate:
                value = by_gate[id(gate)].double().cpu() * gate.factor(hard=False).detach().double().cpu().square()
                total = value if total is None else total + value
        return total

    hidden = None if plain.hidden is None else _spread(scores(layout.norms[0], HIDDEN_UNITS), layout.hidden_size)
    stream = hidden_gate(base, layout, adapter_names[0])
    layers = range(layout.dense.sizes()["num_hidden_layers"])
    size = layout.dense.sizes()["intermediate_size"]
    return replace(
        plain,
        heads=tuple(scores(layout.attention_out(layer)) for layer in layers),
        channels=tuple(_spread(scores(layout.ffn_out(layer)), size) for layer in layers),
        hidden=None if hidden is None or stream is None else stream.ranked(hidden, trained=False),
    )


def _logits(output: Mapping[str, Any]) -> torch.Tensor:
    """What is predicted; by a model without a head its last hidden states, taken for logits."""
    return output["logits" if "logits" in output else "last_hidden_state"]


def _spread(scores: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """Scores of groups as scores of their channels: (size,)."""
    return None if scores is None else (scores * len(scores) / size).repeat_interleave(size // len(scores))
