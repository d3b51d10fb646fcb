"""Wanda-sp: weights times input norms, layer after layer, without compensation."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import locate

from .criteria import Moments, heads_and_channels, observe
from .peer import Peer, Prepared, Work
from .surgery import Block, Keep, blocks_of, keep_units, zero_units


def _scores(block: Block, moments: Moments) -> torch.Tensor:
    """The mean of |W| times the norm of the input, of each feature."""
    return block.output.weight.detach().double().abs().mean(0) * moments.squares.sqrt()


def prepare(work: Work) -> Prepared:
    """Nothing: a layer is scored on what the layers before it are after their cut, so all is done in the cut."""

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        layout = locate(dense)
        keeps: dict[int, Keep] = {}
        for layer, blocks in enumerate(blocks_of(dense)):
            moments = Moments(), Moments()
            observe(dense, work.batches, [(b.output, m.see) for b, m in zip(blocks, moments, strict=True)])
            heads = _scores(blocks[0], moments[0]).reshape(-1, layout.head_dim).sum(1)
            keeps[layer] = heads_and_channels(layout, amount, heads, _scores(blocks[1], moments[1]))
            zero_units(dense, {layer: keeps[layer]})
        keep_units(dense, keeps)
        return dense

    return Prepared(cut)


WANDA_SP = Peer(
    name="Wanda-sp",
    source="An et al., AAAI 2024, arXiv:2312.11983 (Wanda, arXiv:2306.11695, on structures); CASIA-LMC-Lab/FLAP",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="With KV groups, equally many query heads go from each, and keys and values stay (the code knows no "
    "groups). FFN sizes are rounded to multiples of 8. On a ViT as on a language model: the paper has no ViT.",
)
