"""Several plans of a model larger than memory judged in one walk: models with parts closed go along with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..basis.basis import Basis
from ..basis.moments import watching
from ..gates.bases import scale_at
from ..gates.hidden import narrow_norm, widened
from ..planning.plan import Plan
from ..progress import Progress, progress_bar
from ..refit.fidelity import batch_divergence
from ..refit.layerwise import Stream
from ..vanilla.family import Layout
from .walk import Walk

CLOSED = "walking through the layers with parts closed"
"""What it is shown as."""


@dataclass(frozen=True)
class Closed:
    """
    What a plan closes, and what the dense model's modules do then. It computes what the slim model does.

    Args:
        layers: that stay.
        masks: of the units that stay, (features,), by the name of the projection that reads them.
        directions: of the stream that stay, (features, units); None if all do.
        factors: of the narrow norms, (sites,).
        first: the first layer that computes something else than the dense model's.
    """

    layers: frozenset[int]
    masks: dict[str, torch.Tensor]
    directions: torch.Tensor | None
    factors: torch.Tensor
    first: int

    @classmethod
    def of(cls, layout: Layout, plan: Plan, basis: Basis | None, device: torch.device) -> Closed:
        """
        Args:
            layout: of the dense model.
            plan: of layers, heads, FFN channels, and directions of the basis.
            basis: of the stream, if the plan is about it.
            device: where layers are computed.
        """
        dense, masks, changed = layout.dense.sizes(), dict[str, torch.Tensor](), set[int]()
        for place, layer in enumerate(plan.layers):
            heads, channels = plan.heads[place], plan.channels[place]
            for name, kept, total, size in (
                (layout.attention_out(layer), heads, dense["num_attention_heads"], layout.head_dim),
                (layout.ffn_out(layer), channels, dense["intermediate_size"], 1),
            ):
                if name and len(kept) < total:
                    mask = torch.zeros(total)
                    mask[list(kept)] = 1
                    masks[name] = mask.repeat_interleave(size).to(device)
                    changed.add(layer)
        directions, factors = None, torch.ones(len(layout.norms))
        if basis is not None and plan.hidden is not None:
            directions = basis.vectors[:, list(plan.hidden)]
            directions = (directions - directions.mean(0) if basis.centred else directions).to(device)
            factors = scale_at(basis.scales, len(plan.hidden) / len(basis.vectors)).to(device)
            changed.add(0)
        gone = set(range(dense["num_hidden_layers"])) - set(plan.layers)
        first = min(changed | gone, default=dense["num_hidden_layers"])
        return cls(frozenset(plan.layers), masks, directions, factors, first)

    def norm(self, site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of a norm that reads the stream, given the dense one's; as `norm_in_basis`."""
        if self.directions is None:
            return output
        units = self.directions.to(x.dtype)
        return widened(norm, narrow_norm(norm, x, units) * self.factors[site].to(x.dtype), units)


def closed_losses(
    walk: Walk, stream: Stream, plans: Sequence[Plan], basis: Basis | None, progress: Progress | None = None
) -> tuple[str, list[float]]:
    """
    The divergence from the dense model of models in which what plans remove is closed, all in one walk.

    In memory are one layer, or what lies outside of the layers, and as `walk.keep` keeps them the hidden states of the
    dense model and of every plan. A plan costs the layers from the first one that it changes.

    Args:
        walk: with the batches that the stream is of.
        stream: the dense model's before the first layer; left as it is.
        plans: of layers, heads, FFN channels, and directions of the basis.
        basis: of the stream, if a plan is about it.
        progress: makes a progress bar.

    Returns:
        The head's metric, as `refit.fidelity.divergence` says it, and the mean over positions for each plan.
    """
    model, layout = walk.weights.model, walk.layout
    stream = replace(stream, hidden=list(stream.hidden))
    closed = [Closed.of(layout, plan, basis, walk.weights.device) for plan in plans]
    streams = [replace(stream, hidden=list(stream.hidden)) for _ in plans]
    name, sums = "", torch.zeros(len(plans), 2, dtype=torch.float64)
    now: Closed | None = None

    def at(site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output if now is None else now.norm(site, norm, x, output)

    def close(owner: str, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        mask = None if now is None else now.masks.get(owner)
        return None if mask is None else (args[0] * mask.to(args[0].dtype), *args[1:])

    with ExitStack() as hooks:
        for owner in sorted({owner for each in closed for owner in each.masks}):
            module = model.get_submodule(owner)
            hook = module.register_forward_pre_hook(lambda _module, args, owner=owner: close(owner, args))
            hooks.callback(hook.remove)
        if any(each.directions is not None for each in closed):
            hooks.enter_context(watching(model, layout, at))
        for layer in progress_bar(progress, iterable=range(len(stream.layers)), desc=CLOSED, leave=False):
            for number in range(len(walk.batches)):
                now, before = None, stream.hidden[number]
                stream.hidden[number] = stream.keep(stream.call(layer, number))
                for now, mine in zip(closed, streams, strict=True):
                    if layer < now.first:
                        continue
                    if layer == now.first:
                        mine.hidden[number] = before
                    if layer in now.layers:
                        mine.hidden[number] = mine.keep(mine.call(layer, number))
        walk.weights.release()
        with walk.weights.outside():
            for number, batch in enumerate(walk.batches):
                now = None
                expected = stream.prediction(number, batch)
                for place, (now, mine) in enumerate(zip(closed, streams, strict=True)):
                    if now.first < len(stream.layers):
                        name, more = batch_divergence(model, batch, expected, mine.prediction(number, batch))
                        sums[place] += more.cpu()
    return name, [float(total / count) if count else 0.0 for total, count in sums]
