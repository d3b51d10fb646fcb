"""How much the loss depends on each gate, and gates that start from it.

References:
    Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), equation 8, for squared gradients of
    gates at 1; Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (2022), for the empirical Fisher
    of masks of heads and FFN channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from ..errors import HawAdaError
from ..gates.adapter import EXPERT_UNITS, UNITS
from ..gates.attach import collect_gates
from ..gates.bases import BasisGate
from ..gates.kinds import SigmoidGate
from ..gates.reading import layers_of
from ..planning.importance import gate_importance
from ..planning.plan import Plan
from ..planning.router_weighted import expert_outputs
from ..planning.towers import Sizes, each_of, shapes_of
from ..processes import Reduce, of_this_rank
from ..progress import Progress, progress_bar
from ..search.budgeted import IMPORTANCE
from ..search.masked import MaskedQuality, without_layers
from ..search.timed import dense_model
from ..vanilla.batches import Batch
from ..vanilla.family import locate_all
from ..vanilla.legality import check_layers, check_legal
from ..vanilla.shape import Shape

SPREAD = 0.5
"""Half the range over which a start by importance spreads theta / T around the common start."""


def init_gates(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: str = "fisher",
    *,
    shape: Sizes | None = None,
    plan: Plan | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
    spread: float = SPREAD,
    reduce: Reduce = of_this_rank,
    progress: Progress | None = None,
) -> None:
    """
    Start the gates in the order of their importance, close to where they start anyway.

    Heads and channels are ordered within their module, channels of the residual stream among each other, gates on
    blocks and layers over the whole model, of several towers over each; experts by what they add (`expert_outputs`),
    not by gradients. The least important gate of n gets `theta = start - spread * T`, the most important
    `start + spread * T`, evenly in between.

    Args:
        model: a gated model.
        batches: calibration batches, as in `gate_importance`.
        criterion: `"fisher"`.
        shape: the shape that is aimed at, of several towers as in `HawAdaModel.plan`. If it has fewer layers, those to
            go are found by dropping one after the other and measuring the loss (`MaskedQuality`), in each tower by
            itself, and everything else is ordered by its importance without them. A squared gradient says little
            about something as large as a layer.
        plan: instead of a shape, where a search has found already which layers go (`SearchResult.plan`).
        importance: of `gate_importance(model, batches)`, where it is known already; used if no layers go.
        spread: see above.
        reduce: sums over ranks; each has batches of its own then, and all get the same gates (`all_reduced`).
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        HawAdaError: on another criterion or spread, on both a shape and a plan, or as `gate_importance`.
        IllegalShapeError, IncompatibleBaseError: if the model cannot have the shape, or the plan is another model's.
    """
    if criterion != "fisher":
        raise HawAdaError(f"criterion must be 'fisher', got {criterion!r}")
    if not 0 <= spread < math.inf:
        raise HawAdaError(f"spread must be a number of at least 0, got {spread!r}")
    if not isinstance(model, nn.Module):
        raise HawAdaError(f"model must be a gated model, got a {type(model).__name__}")
    _check_aim(model, shape, plan)
    batches = list(batches)
    gates = collect_gates(model)
    if plan is None:
        dropped = _dropped(cast(PeftModel, model), batches, shape, reduce, progress)
    else:
        dropped = {
            part.tower: gone
            for part in plan.parts
            if (gone := [each for each in range(part.dense.sizes()["num_hidden_layers"]) if each not in part.layers])
        }
    without, places = _without(cast(PeftModel, model), dropped) if dropped else (None, {})
    tower_of = _towers(model)
    if importance is None or dropped:
        watched = progress_bar(progress, iterable=batches, desc=IMPORTANCE, unit="batch", leave=False)
        importance = gate_importance(model, watched, without, reduce=reduce)
        if isinstance(model, PeftModel) and any(name.split(".")[-2] == EXPERT_UNITS for name in gates):
            importance = {**importance, **expert_outputs(model, batches, reduce=reduce)}
    _check_reached(cast(PeftModel, model), importance, shape, plan)
    pooled: dict[str, list[tuple[SigmoidGate, torch.Tensor]]] = {}
    for name, value in importance.items():
        slot, adapter = name.split(".")[-2:]
        stream = gates[name]
        if isinstance(stream, BasisGate):  # the basis says in which order
            value = stream.ranked(value, trained=False)
        if id(gates[name]) in places:
            value = torch.full_like(value, places[id(gates[name])])
        whole = f"{tower_of(name)}.{slot}.{adapter}"
        pooled.setdefault(name if slot == UNITS else whole, []).append((gates[name], value))
    with torch.no_grad():
        for members in pooled.values():
            flat = torch.cat([importance.flatten() for _, importance in members])
            order = torch.empty(len(flat), dtype=torch.float64)
            order[flat.argsort(stable=True)] = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
            if len(flat) == 1:
                order.zero_()
            for (gate, _), part in zip(members, order.split([gate.units for gate, _ in members]), strict=True):
                offset = spread * gate.start.temperature * part.reshape(gate.theta.shape)
                gate.theta.copy_(gate.start.theta + offset)


def _towers(model: nn.Module) -> Callable[[str], str]:
    """In which of several gated towers a gate is, by its name; empty where they are in one, or placed by names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = model.active_adapters if isinstance(model, PeftModel) else ()
    several = any(cast(Any, model).peft_config[name].towers for name in names)
    stacks = {layout.tower: f".{layout.stack}." for layout in (locate_all(base) if several else ())}
    return lambda name: next((tower for tower, stack in stacks.items() if stack in f".{name}"), "")


def _check_aim(model: nn.Module, shape: Sizes | None, plan: Plan | None) -> None:
    if shape is not None and plan is not None:
        raise HawAdaError("give either `shape` or `plan`, not both")
    if not isinstance(shape, Shape | Mapping | None) or not isinstance(plan, Plan | None):
        raise HawAdaError(
            "shape must be a Shape (of several towers one for each) and plan a Plan, got a "
            f"{type(shape if plan is None else plan).__name__}"
        )
    if shape is None and plan is None:
        return
    layouts = locate_all(dense_model(cast(PeftModel, model)))
    wanted = {} if shape is None else shapes_of(layouts, shape)
    for layout, part in each_of(layouts, plan):
        if layout.tower in wanted:
            check_legal(layout, layout.complete(wanted[layout.tower]))
        if part is not None:
            part.check_base(layout.full)
            check_layers(layout, part.layers)


def _check_reached(
    model: PeftModel, importance: Mapping[str, torch.Tensor], shape: Sizes | None, plan: Plan | None
) -> None:
    """Refuse to cut one of several towers that no batch runs: nothing is known of its units."""
    tower_of = _towers(model)
    reached = {tower_of(name) for name, value in importance.items() if value.any()}
    if "" in reached or (shape is None and plan is None):
        return
    layouts = locate_all(dense_model(model))
    if plan is None:
        wanted = shapes_of(layouts, cast(Sizes, shape))
    else:
        wanted = {part.tower: part.shape for part in plan.parts}
    cut = [each for each in layouts if each.complete(wanted.get(each.tower, each.dense)) != each.dense]
    if unknown := [layout.tower for layout in cut if layout.tower not in reached]:
        raise HawAdaError(
            f"the data runs no layer of {unknown}, of which something is to be cut: give batches with what it sees, "
            f"say that it stays, or gate the others alone, as HawAdaConfig(towers={tuple(sorted(reached))})"
        )


def _dropped(
    model: PeftModel, batches: Sequence[Batch], shape: Sizes | None, reduce: Reduce, progress: Progress | None
) -> dict[str, list[int]]:
    """The layers to go at a shape, the cheapest first, by the tower that loses some."""
    if shape is None:
        return {}
    layouts = locate_all(dense_model(model))
    wanted, found = shapes_of(layouts, shape), {}
    for layout in layouts:
        count = wanted.get(layout.tower, layout.dense).num_hidden_layers
        if count not in (None, layout.dense.num_hidden_layers):
            quality = MaskedQuality(model, batches, reduce=reduce, progress=progress, tower=layout.tower)
            found[layout.tower] = quality.drop_order(cast(int, count))
    return found


def _without(model: PeftModel, dropped: Mapping[str, Sequence[int]]) -> tuple[Plan, dict[int, float]]:
    """The plan that drops layers and nothing else; places of their gates by identity, below any importance."""
    base = dense_model(model)
    parts: list[Plan] = []
    places: dict[int, float] = {}
    for layout in locate_all(base):
        gone = dropped.get(layout.tower, ())
        parts.append(without_layers(layout, gone))
        layers = layers_of(base, layout, model.active_adapters)
        places |= {
            id(gate): float(place - len(gone)) for place, layer in enumerate(gone) for gate in layers[layer].whole
        }
    return Plan.of_towers(parts), places
