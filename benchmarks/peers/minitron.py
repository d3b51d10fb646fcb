"""Minitron: width by activations, depth by the loss without a run of layers."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import locate

from .criteria import heads_and_channels, left, observe
from .peer import Batch, Peer, Prepared, Work
from .surgery import blocks_of, keep_layers, keep_units


class _Activations:
    """The mean over the sequence of |x|, and its L2 norm over all examples: (features,)."""

    def __init__(self) -> None:
        self.squares = torch.zeros((), dtype=torch.float64)

    def see(self, x: torch.Tensor, _: torch.Tensor) -> None:
        self.squares = self.squares.to(x.device) + x.double().abs().mean(1).square().sum(0)


def prepare_width(work: Work) -> Prepared:
    """Activations at the inputs of the output projections of the dense model."""
    model = work.load()
    width = locate(model).head_dim
    pairs = [(block, _Activations()) for layer in blocks_of(model) for block in layer]
    observe(model, work.batches, [(block.output, seen.see) for block, seen in pairs])
    heads = [seen.squares.reshape(-1, width).sum(1).sqrt() for _, seen in pairs[::2]]
    channels = [seen.squares.sqrt() for _, seen in pairs[1::2]]

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        found = locate(dense)
        layers = enumerate(zip(heads, channels, strict=True))
        keep_units(dense, {layer: heads_and_channels(found, amount, *scores) for layer, scores in layers})
        return dense

    return Prepared(cut)


def prepare_depth(work: Work) -> Prepared:
    """The calibration loss without each run of adjacent layers, for every length."""
    model = work.load()
    total = locate(model).dense.sizes()["num_hidden_layers"]

    @cache  # only the lengths that are asked for are worth the time
    def run_of(length: int) -> range:
        losses = [_loss(model, work.batches, range(start, start + length)) for start in range(total - length + 1)]
        start = losses.index(min(losses))
        return range(start, start + length)

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        length = total - left(total, amount)
        _drop(dense, run_of(length) if length else range(0))
        return dense

    return Prepared(cut)


@torch.no_grad()
def _loss(dense: PreTrainedModel, batches: list[Batch], gone: range) -> float:
    model = copy.deepcopy(dense)
    _drop(model, gone)
    return sum(float(model(**batch).loss) for batch in batches)


def _drop(model: PreTrainedModel, gone: range) -> None:
    keep_layers(model, [layer for layer in range(model.config.num_hidden_layers) if layer not in gone])


SOURCE = "Muralidharan et al., NeurIPS 2024, arXiv:2407.14679, and Sreenivas et al. 2024, arXiv:2408.11796"

MINITRON_WIDTH = Peer(
    name="Minitron width",
    source=f"{SOURCE}; NVIDIA ModelOpt (mcore_minitron)",
    kinds=frozenset({"text", "image"}),
    prepare=prepare_width,
    adapted="Heads and FFN channels, by the same share; the hidden size stays, and there is no search over shapes. "
    "With KV groups, equally many query heads go from each, as in ModelOpt. FFN sizes are rounded to multiples of 8 "
    "(ModelOpt: 256 or 512, for models that large). On a ViT as on a language model: the papers have no ViT.",
)

MINITRON_DEPTH = Peer(
    name="Minitron depth",
    source=f"{SOURCE}: the run of adjacent layers without which the loss is least",
    kinds=frozenset({"text", "image"}),
    prepare=prepare_depth,
    adapted="The papers also rank by accuracy on a downstream task; here by the loss on the calibration batches "
    "alone. On a ViT by the classification loss.",
)
