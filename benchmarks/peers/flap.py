"""FLAP: what fluctuates least goes, wherever it is, and its mean becomes a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hawada_peft.vanilla.family import locate

from .criteria import Moments, best, left, observe
from .peer import Peer, Prepared, Work
from .surgery import ROUNDING, Block, Keep, add_bias, all_heads, blocks_of, features_of, keep_units


def prepare(work: Work) -> Prepared:
    """Mean and variance of what the output projections read, in the dense model."""
    model = work.load()
    groups = locate(model).dense.sizes()["num_key_value_heads"]
    blocks = blocks_of(model)
    moments = [(Moments(), Moments()) for _ in blocks]
    pairs = [pair for layer in zip(blocks, moments, strict=True) for pair in zip(*layer, strict=True)]
    observe(model, work.batches, [(block.output, seen.see) for block, seen in pairs])
    scores = [_wifv(block, seen) for block, seen in pairs]
    heads = torch.stack([_standard(each.square()).reshape(groups, -1).mean(1) for each in scores[::2]])
    channels = torch.stack([_standard(each) for each in scores[1::2]])
    price = blocks[0][0].parameters() / groups / (blocks[0][1].parameters() / channels.shape[1])
    prices = torch.cat([torch.full((heads.numel(),), price), torch.ones(channels.numel())]).double()
    order = torch.argsort(torch.cat([heads.flatten(), channels.flatten()]), descending=True, stable=True).cpu()
    spent = torch.cumsum(prices[order], 0)
    means = [(of_attention.mean, of_ffn.mean) for of_attention, of_ffn in moments]

    def cut(dense: PreTrainedModel, amount: float) -> PreTrainedModel:
        left(1, amount)  # checks the amount
        stays = torch.zeros(len(order), dtype=torch.bool)
        stays[order[: 1 + int((spent - spent[-1] * (1 - amount)).abs().argmin())]] = True
        groups_left = stays[: heads.numel()].reshape(heads.shape).sum(1).tolist()
        channels_left = stays[heads.numel() :].reshape(channels.shape).sum(1).tolist()
        found, keeps = locate(dense), {}
        for layer, (of_attention, of_ffn) in enumerate(blocks_of(dense)):
            kept = all_heads(found, best(heads[layer], max(1, groups_left[layer])))
            width = left(channels.shape[1], 1 - channels_left[layer] / channels.shape[1], ROUNDING)
            wide = best(channels[layer], width)
            keeps[layer] = Keep(kept, wide)
            _compensate(of_attention, means[layer][0], features_of(kept, found.head_dim))
            _compensate(of_ffn, means[layer][1], wide)
        keep_units(dense, keeps)
        return dense

    return Prepared(cut)


def _wifv(block: Block, seen: Moments) -> torch.Tensor:
    """The variance of each feature times the squared norm of the weights that read it."""
    return seen.variance * block.output.weight.detach().double().square().sum(0)


def _standard(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(scores.dtype).tiny)


def _compensate(block: Block, mean: torch.Tensor, kept: Sequence[int]) -> None:
    """Add to the bias what the features that go add to the output on average."""
    gone = mean.clone()
    gone[torch.as_tensor(kept, device=gone.device)] = 0
    add_bias(block.output, block.output.weight.detach().double() @ gone)


FLAP = Peer(
    name="FLAP",
    source="An et al., AAAI 2024, arXiv:2312.11983; CASIA-LMC-Lab/FLAP with its defaults WIFV and AL-AM",
    kinds=frozenset({"text", "image"}),
    prepare=prepare,
    adapted="Heads are cut as whole KV groups, as layers may not keep unlike groups; a group weighs by its parameters "
    "against an FFN channel's (the code's constant 512/3 is that for heads of 128 without groups). The amount is the "
    "share of these parameters, as in the code. Variances are exact, the code's skip the first example. At least "
    "one group and 8 channels stay in a layer, FFN sizes are rounded to multiples of 8. On a ViT each head is a "
    "group, and the bias is added to the one there is: the paper has language models only.",
)
