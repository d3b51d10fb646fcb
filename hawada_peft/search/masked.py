"""
The quality of a shape, judged by masking the dense model.

Long because every axis is measured in a way of its own, from the same masked passes.
"""

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
from ..gates.attach import collect_gates
from ..gates.kinds import SigmoidGate
from ..gates.reading import UnitScores, gate_scores, hidden_gate, layers_of
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..progress import Progress, progress_bar
from ..vanilla.batches import Batch, check_batch, position_mask, without_labels
from ..vanilla.family import HIDDEN, Layout
from ..vanilla.heads import Classes, Head, head_of
from ..vanilla.mode import adapters_off, evaluating
from ..vanilla.outputs import get_student_logits
from ..vanilla.shape import BY_NAME, FFN, HEADS, LAYERS, Shape
from .space import SearchSpace

logger = logging.getLogger(__name__)

RESCORED = 8
"""Layers whose loss is measured anew after each drop: those that were cheapest to drop before it."""


DEPTH, WIDTHS_OF = "dropping layers", "judging widths"
"""What these are shown as."""

WIDTHS = (0.75, 0.5, 0.25)
"""Parts of an axis of width at which the predicted loss is held against a measured one."""


@dataclass(frozen=True)
class Reference:
    """
    A calibration batch, and what the dense model predicts on it.

    Args:
        batch: without labels, on the device.
        head: what the outputs stand for.
        dense: of classes one per prediction, drawn from the dense model: (rows, ...); otherwise its outputs.
        surprise: the dense model's, of what was drawn: (rows, ...); None where nothing was.
        mask: (rows, ...), 1 where a prediction counts.
    """

    batch: Batch
    head: Head
    dense: torch.Tensor
    surprise: torch.Tensor | None
    mask: torch.Tensor


class MaskedQuality:
    """
    The quality of a gated model's shapes, by closing gates.

    The loss is the divergence of the masked model from the dense one on calibration batches, without labels, as the
    model's head says (`head_of`). Of several classes, whose logits are too many to keep, outcomes y are drawn once
    from the dense model, and KL(dense, masked) is the mean of `q/p - 1 - log(q/p)` at y, with p the dense and q the
    masked model's probability. Of independent labels it is the exact KL; of one output, regression and hidden states
    the mean squared difference.

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
        BadDataError: if a batch holds what the model cannot take.
        InvalidPlanError: if not one adapter is active, or its gates were not placed by a family row.

    References:
        Schulman, "Approximating KL Divergence" (2020), the third estimator. Kwon et al., "A Fast Post-Training Pruning
        Framework for Transformers" (2022), for sums of scores as a loss.
    """

    before_recovery = "gates closed, before any recovery"

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
        if len(self.names) != 1:
            raise InvalidPlanError(f"one adapter must be active, got {self.names}; see `model.set_adapter`")
        self.layout: Layout = self.tuner.layout_of(self.names)
        self.scores = unit_scores(model, self.layout, self.names, importance)
        self.references = [self._reference(batch, index) for index, batch in enumerate(batches)]
        self.measured: dict[Plan, float] = {}
        self._order: list[int] = []
        self._depth_loss: list[float] = []

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        return f"{self.references[0].head.unit}, {self.before_recovery}"

    @property
    def free(self) -> tuple[str, ...]:
        """What the gates allow to cut."""
        scores = {HEADS: self.scores.heads, FFN: self.scores.channels, LAYERS: self.scores.layers}
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
        """The measured loss of a shape before any recovery, in what `meaning` says."""
        return self.loss(self.plan(shape))

    def loss(self, plan: Plan) -> float:
        """The divergence of the masked model from the dense one on the calibration batches, for a plan."""
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
        heads_loss = self._measured_curve(heads.sum(0), space.heads, BY_NAME[HEADS].field)
        sizes = [Shape(intermediate_size=size) for size in space.ffn]
        ffn_loss = self._measured_curve(ffn.sum(0), sizes, BY_NAME[FFN].field)
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

    def _drop_layers(self, least: int) -> None:
        """Drop one layer after the other, the cheapest first, scoring those that remain anew each time."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        last: dict[int, float] = {}
        kept = range(total - len(self._order), least, -1)  # before each drop
        if not kept:
            return
        count = sum(min(RESCORED, each) if index else each for index, each in enumerate(kept))
        logger.info("dropping %d of %d layers takes %d evaluations of the calibration data", len(kept), total, count)
        with progress_bar(self._progress, total=count, desc=DEPTH, unit="evaluation", leave=False) as bar:
            for _ in kept:
                remaining = self._droppable([layer for layer in range(total) if layer not in self._order])
                asked = sorted(remaining, key=lambda layer: last.get(layer, 0.0))
                scores: dict[int, float] = {}
                for layer in asked[:RESCORED] if last else asked:
                    scores[layer] = self.loss(self._without([*self._order, layer]))
                    bar.update(1)
                last |= scores
                cheapest = min(scores, key=scores.__getitem__)
                self._order.append(cheapest)
                self._depth_loss.append(max([scores[cheapest], *self._depth_loss[-1:]]))
        logger.info("layers in the order of dropping: %s", self._order)

    def _droppable(self, remaining: Sequence[int]) -> list[int]:
        """Those that may go next: what must stay does, and the last layer before a backbone's stage."""
        needed = set(depth_of(self.layout).pinned)
        for stage in self.layout.stages:
            inside = [layer for layer in remaining if layer in range(*stage)]
            needed |= set(inside) if len(inside) == 1 else set()
        return [layer for layer in remaining if layer not in needed]

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
        for part in progress_bar(self._progress, iterable=WIDTHS, desc=WIDTHS_OF, leave=False):
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
        (name,) = self.names
        gates = list(collect_gates(self.model, name).values())
        before = [(gate.kept, gate.hard_in_training) for gate in gates]
        with evaluating(self.model):
            try:
                self.tuner.set_masks(plan, name)
                yield
            finally:
                for gate, (kept, hard) in zip(gates, before, strict=True):
                    gate.set_plan(kept, in_training=hard)

    def _reference(self, batch: Batch, seed: int) -> Reference:
        check_batch(self.model, batch)
        inputs = without_labels(batch, next(self.model.parameters()).device)
        with evaluating(self.model), torch.inference_mode(), adapters_off(self.model):
            logits = get_student_logits(self.model, inputs)
        head, given = head_of(self.model, logits), position_mask(inputs, logits.shape[:-1])
        mask = torch.ones(logits.shape[:-1], device=logits.device) if given is None else given.float()
        if not isinstance(head, Classes):
            return Reference(inputs, head, logits, None, mask)
        # By a generator of our own: the same on every device, and the caller's random state stays. Row by row, as
        # wider copies of a whole batch's logits could be larger than the model.
        generator = torch.Generator().manual_seed(seed)
        rows = [row.reshape(-1, row.shape[-1]) for row in logits]
        drawn = torch.stack([head.draw(row, generator) for row in rows]).reshape(mask.shape)
        return Reference(inputs, head, drawn, _surprise(head, logits, drawn), mask)

    def _divergence(self, reference: Reference) -> tuple[float, float]:
        logits, head = get_student_logits(self.model, reference.batch), reference.head
        if reference.surprise is None:
            dtype, loss = torch.promote_types(logits.dtype, torch.float32), head.loss()
            divergence = loss.value(logits, reference.dense, dtype) * reference.mask
        else:
            ratio = reference.surprise - _surprise(head, logits, reference.dense)
            divergence = (ratio.exp() - 1 - ratio) * reference.mask
        return float(divergence.double().sum()), float(reference.mask.double().sum())


def _surprise(head: Head, logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each outcome, in float32, formed row by row: like `drawn`."""
    pairs = zip(logits, drawn, strict=True)
    found = [head.surprise(row.reshape(-1, row.shape[-1]).float(), targets.reshape(-1)) for row, targets in pairs]
    return torch.stack(found).reshape(drawn.shape)


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

    def scores(gates: Sequence[SigmoidGate]) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for gate in gates:
            if id(gate) in by_gate:
                value = by_gate[id(gate)].double().cpu() * gate.factor(hard=False).detach().double().cpu().square()
                total = value if total is None else total + value
        return total

    layers = layers_of(base, layout, adapter_names)
    size = layout.dense.sizes()["intermediate_size"]
    stream = [gate for name in adapter_names if (gate := hidden_gate(base, layout, name)) is not None]
    hidden = None if plain.hidden is None else _spread(scores(stream), layout.hidden_size)
    return replace(
        plain,
        heads=tuple(scores(layer.heads) for layer in layers),
        channels=tuple(_spread(scores(layer.ffn), size) for layer in layers),
        hidden=None if hidden is None else stream[0].ranked(hidden, trained=False),
    )


def _spread(scores: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """Scores of groups as scores of their channels: (size,)."""
    return None if scores is None else (scores * len(scores) / size).repeat_interleave(size // len(scores))
