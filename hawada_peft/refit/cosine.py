"""What dropped layers did to the direction of the residual stream, given to the FFN before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.batches import Batch, position_mask
from ..vanilla.family import locate
from .layerwise import Stream, residual_gains
from .projections import as_projection

ROWS = 1024
"""Positions per step."""


def refine_cosine(
    dense: PreTrainedModel,
    slim: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    learning_rate: float = 1e-4,
    epochs: int = 10,
) -> tuple[float, ...]:
    """
    Turn the FFN before each gap of a slim model so that the stream points where the dropped layers took it.

    With M what the dense FFN before the gap adds, Y the stream that it is added to and L the dense stream behind the
    gap, a square map T of hidden features, the identity at first, is trained to minimise `1 - cos(T M + Y, L)` and
    merged into the FFN's output projection. Layers that went before the first one that stays have no FFN before them
    and are left as they are.

    Args:
        dense: the teacher; left as it is.
        slim: what `slim(dense, plan)` gave, on the same device; those projections change in place.
        plan: the one it was made with.
        batches: keyword arguments of the forward pass; positions where `attention_mask` is 0 do not count.
        learning_rate, epochs: of Adam.

    Returns:
        Per gap how far the mean cosine rose.

    Raises:
        UnsupportedModelError: if a layer does not add its blocks to the stream as they are, or a projection is not
            linear.

    References:
        Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization"
        (2025), arXiv:2505.02819.
    """
    layout, training = locate(dense), dense.training
    ends = [*plan.layers[1:], plan.dense.sizes()["num_hidden_layers"]]
    gaps = {layer: (index, end) for index, (layer, end) in enumerate(zip(plan.layers, ends, strict=True))}
    rises = []
    dense.eval()
    try:
        with torch.no_grad():
            stream = Stream.start(dense, layout, batches)
            layer = 0
            while layer < len(stream.layers):
                index, end = gaps.get(layer, (0, layer + 1))
                if end == layer + 1:
                    stream.advance(layer)
                    layer += 1
                    continue
                gains = residual_gains(stream, layer)
                if gains is None:
                    raise UnsupportedModelError(
                        f"layer {layer} of {type(dense).__name__} does not add the outputs of its projections to the "
                        "residual stream as they are, so nothing can be merged into them"
                    )
                added, onto = _parts(stream, layer, batches, gains[1])
                for each in range(layer, end):
                    stream.advance(each)
                wanted = _counted(stream.hidden, batches)
                turn, rise = _turned(added, onto, wanted, learning_rate, epochs)
                name = locate(slim).ffn_out(index)
                _merge(as_projection(slim.get_submodule(name), name), turn, gains[1].float())
                rises.append(rise)
                layer = end
    finally:
        dense.train(training)
    return tuple(rises)


def _parts(
    stream: Stream, layer: int, batches: Sequence[Batch], gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the FFN of a layer adds, and what it is added to: (positions, hidden_size) each, float32."""
    added, onto = [], []
    for batch in range(len(batches)):
        output, _, ffn = stream.outputs(layer, batch)
        added.append(gain.float() * ffn.float())
        onto.append(output.float() - added[-1])
    return _counted(added, batches), _counted(onto, batches)


def _counted(hidden: Sequence[torch.Tensor], batches: Sequence[Batch]) -> torch.Tensor:
    """The positions that are no padding: (positions, hidden_size), float32."""
    rows = []
    for values, batch in zip(hidden, batches, strict=True):
        mask = position_mask(batch, values.shape[:-1])
        rows.append(values.flatten(0, -2).float() if mask is None else values[mask].float())
    return torch.cat(rows)


def _turned(
    added: torch.Tensor, onto: torch.Tensor, wanted: torch.Tensor, learning_rate: float, epochs: int
) -> tuple[torch.Tensor, float]:
    """The map T, (hidden_size, hidden_size), and how far the mean cosine rose."""

    def cosine(turn: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        return functional.cosine_similarity(added[rows] @ turn.T + onto[rows], wanted[rows], dim=-1).mean()

    turn = torch.eye(added.shape[-1], device=added.device).requires_grad_()
    everything = slice(None)
    before = float(cosine(turn, everything))
    optimizer = torch.optim.Adam([turn], lr=learning_rate)
    order = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(added), generator=order).split(ROWS):
                optimizer.zero_grad()
                (1 - cosine(turn, rows.to(added.device))).backward()
                optimizer.step()
    return turn.detach(), float(cosine(turn, everything)) - before


def _merge(module: torch.nn.Linear | Conv1D, turn: torch.Tensor, gain: torch.Tensor) -> None:
    """Put a map of what is added to the stream into the projection whose output, times `gain`, is added."""
    inverse = torch.where(gain == 0, 0.0, 1 / gain)
    turn = inverse[:, None] * turn * gain
    weight = module.weight.data.float()
    new = weight @ turn.T if isinstance(module, Conv1D) else turn @ weight
    module.weight.data = new.to(module.weight.dtype)
    if module.bias is not None:
        module.bias.data = (turn @ module.bias.data.float()).to(module.bias.dtype)
