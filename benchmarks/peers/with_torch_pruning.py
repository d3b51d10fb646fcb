"""Torch-Pruning (Fang et al., CVPR 2023), the package itself: heads and FFN channels by three of its criteria."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedModel

from .peer import Batch, Peer, Prepared, Work
from .places import places_of

VERSION = "1.6.1"
MULTIPLE = 8
"""FFN sizes are multiples of it, by the package's `round_to`."""

TRACED_TOKENS = 16
"""Tokens of the example on which the package traces a language model."""


def package() -> Any:
    """
    The package.

    Raises:
        ImportError: if it is not installed, with the way to install it.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"this peer runs Torch-Pruning itself: pip install torch-pruning=={VERSION}") from error
    return torch_pruning


def magnitude(work: Work) -> Prepared:
    """Group L2 norms of weights, sizes uniform over layers; nothing to prepare."""
    importance = package().importance.GroupMagnitudeImportance(p=2)
    return Prepared(lambda model, amount: prune(model, work.batches[0], amount, importance))


def taylor(work: Work) -> Prepared:
    """Group Taylor scores from the gradients of the loss over all calibration batches, sizes uniform over layers."""
    return _by_gradients(work)


def taylor_with_hidden(work: Work) -> Prepared:
    """The same, and the residual stream cut by the same ratio."""
    return _by_gradients(work, hidden=True)


def isomorphic(work: Work) -> Prepared:
    """The same scores, ranked over all layers among groups of the same structure, so that sizes differ by layer."""
    return _by_gradients(work, isomorphic=True)


def _by_gradients(work: Work, isomorphic: bool = False, hidden: bool = False) -> Prepared:
    importance = package().importance.GroupTaylorImportance()
    gradients = _gradients(work.load(), work.batches)

    def cut(model: PreTrainedModel, amount: float) -> PreTrainedModel:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        return prune(model, work.batches[0], amount, importance, isomorphic, hidden)

    return Prepared(cut)


def _gradients(model: PreTrainedModel, batches: list[Batch]) -> dict[str, torch.Tensor]:
    model.requires_grad_(True).zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def prune(
    model: PreTrainedModel,
    batch: Batch,
    amount: float,
    importance: Callable[[Any], torch.Tensor | None],
    isomorphic: bool = False,
    hidden: bool = False,
) -> PreTrainedModel:
    """
    Prune a teacher in place, as the package's examples do.

    Args:
        model: float32, in eval mode; with gradients, if the importance reads them.
        batch: an example to trace with.
        amount: the pruning ratio, of heads and FFN channels.
        isomorphic: rank over layers; otherwise all layers get the same sizes.
        hidden: cut the residual stream by the same ratio as well.

    Returns:
        The same object, with smaller linears.
    """
    places = places_of(model)
    layers = model.get_submodule(places.layers)
    attentions = [layer.get_submodule(places.attention) for layer in layers]
    heads = attentions[0].q_proj.out_features // attentions[0].head_dim
    groups = attentions[0].k_proj.out_features // attentions[0].head_dim
    num_heads = {attention.q_proj: heads for attention in attentions}
    keys_and_values = {linear for attention in attentions for linear in (attention.k_proj, attention.v_proj)}
    num_heads |= dict.fromkeys(keys_and_values, groups)
    ffn_outs = [layer.get_submodule(places.ffn).get_submodule(places.ffn_out) for layer in layers]
    channel_ratio, head_ratio = _ratios(amount, ffn_outs[0].in_features, heads, groups, isomorphic)
    ignored = [model.get_submodule(places.head)]
    if hidden:
        channel_ratio = min(channel_ratio, 1 - (MULTIPLE + 0.5) / model.config.hidden_size)
    else:
        ignored += [*ffn_outs, *(attention.o_proj for attention in attentions)]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = package().pruner.BasePruner(
            model,
            _example(model, batch),
            _keep_some(importance, num_heads) if isomorphic else importance,
            global_pruning=isomorphic,
            isomorphic=isomorphic,
            pruning_ratio=channel_ratio,
            head_pruning_ratio=head_ratio,
            ignored_layers=ignored,
            round_to=MULTIPLE,
            # The package updates these two: its defaults would be shared by all pruners of a process.
            in_channel_groups={},
            out_channel_groups={},
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            forward_fn=_traced,
            output_transform=lambda output: output.logits.sum(),
        )
        if heads != groups:
            pruner.DG.check_pruning_group = lambda _: True  # sizes are checked in `_ratios`; see `_leave`
        for group in pruner.step(interactive=True):
            if heads != groups:
                _leave(group, keys_and_values)
            group.prune()
    model.set_attn_implementation(implementation)
    for attention in attentions:
        attention.num_attention_heads = attention.q_proj.out_features // attention.head_dim
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    model.zero_grad()
    return model.requires_grad_(True).eval()


def _leave(group: Any, keys_and_values: set[nn.Module]) -> None:
    """
    Keep keys and values whole under grouped queries, in the package's own way. It forgets to, and then skips the
    layer, when one query head per KV group is left.
    """
    for index, (dep, _) in enumerate(group):
        if dep.target.module in keys_and_values and dep.handler.__name__ == "prune_out_channels":
            group[index] = (dep, [])


def _ratios(amount: float, ffn: int, heads: int, groups: int, isomorphic: bool) -> tuple[float, float]:
    """
    Ratios of channels and heads for an amount.

    Uniform sizes go to the nearest. With KV groups the package removes as many query heads from each. It rounds up
    what is removed, so half a unit is taken off. Ranked over layers, the ratios stop where `_keep_some` does.
    """
    if isomorphic:
        return min(amount, 1 - (MULTIPLE + 0.01) / ffn), min(amount, 1 - 1.01 / heads)
    kept = max(MULTIPLE, MULTIPLE * round(ffn * (1 - amount) / MULTIPLE))
    each = heads if heads == groups else heads // groups
    removed = min(each - 1, round(amount * each))
    return max(0.0, 1 - (kept + 0.5) / ffn), max(0.0, (removed - 0.5) / each)


def _keep_some(
    importance: Callable[[Any], torch.Tensor | None], num_heads: dict[nn.Module, int]
) -> Callable[[Any], torch.Tensor | None]:
    """
    An importance under which every layer keeps its best head and its best channels, as in the paper's own code: the
    package leaves a group that would be emptied as it was.
    """

    def protected(group: Any) -> torch.Tensor | None:
        scores = importance(group)
        if scores is None:
            return None
        heads = max(num_heads.get(dep.target.module, 1) for dep, _ in group)
        if heads > 1:
            rows = scores.view(heads, -1)
            rows[rows.mean(1).argmax()] = torch.inf
        else:
            scores[scores.topk(MULTIPLE).indices] = torch.inf
        return scores

    return protected


def _example(model: PreTrainedModel, batch: Batch) -> Batch:
    """One row of what the model takes, short if it is text."""
    rows = batch[model.main_input_name][:1]
    return {model.main_input_name: rows[:, :TRACED_TOKENS] if model.main_input_name == "input_ids" else rows}


def _traced(model: PreTrainedModel, inputs: Batch) -> Any:
    """
    The forward that is traced. The rotary embedding is left out of it: the package's walk through its halves does not
    end (transformers 5.23). It acts within a head, and only whole heads are removed.
    """
    places = places_of(model)
    if not places.rotary:
        return model(**inputs)
    attention = model.get_submodule(places.layers)[0].get_submodule(places.attention)
    module = sys.modules[type(attention).__module__]
    with mock.patch.object(module, places.rotary, lambda query, key, *_, **__: (query, key)):
        return model(**inputs, use_cache=False)


_SOURCE = "Fang et al., CVPR 2023, arXiv:2301.12900; github.com/VainF/Torch-Pruning"
_PACKAGE = (
    f"The package itself, version {VERSION}, set up as in its examples for language models and ViT. It is traced with "
    "eager attention and without the rotary embedding. "
)
_ADAPTED = _PACKAGE + (
    "Heads and FFN channels by the same ratio. The residual stream is left alone, as in the ViT example with "
    "`--bottleneck`, but not in the one for language models."
)
_EVEN = " Head counts go to the nearest size; under grouped queries every KV group loses as many heads."

TORCH_PRUNING_PEERS = {
    "tp_magnitude": Peer(
        name="Torch-Pruning, group magnitude",
        source=_SOURCE,
        kinds=frozenset({"text", "image"}),
        prepare=magnitude,
        adapted=_ADAPTED + _EVEN,
    ),
    "tp_taylor": Peer(
        name="Torch-Pruning, group Taylor",
        source=_SOURCE,
        kinds=frozenset({"text", "image"}),
        prepare=taylor,
        adapted=_ADAPTED + _EVEN,
    ),
    "tp_hidden": Peer(
        name="Torch-Pruning, group Taylor, hidden width too",
        source=_SOURCE,
        kinds=frozenset({"text", "image"}),
        prepare=taylor_with_hidden,
        adapted=_PACKAGE + "Heads, FFN channels and the residual stream by the same ratio, as in the example for "
        "language models; that one ranks by magnitude." + _EVEN,
    ),
    "tp_isomorphic": Peer(
        name="Torch-Pruning, isomorphic",
        source="Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, arXiv:2407.04616; in Torch-Pruning",
        kinds=frozenset({"image"}),
        prepare=isomorphic,
        adapted=_ADAPTED
        + " Taylor scores. At least one head and 8 channels stay in every layer (in the paper's own code, "
        "one of each). Images only, as the paper: under grouped queries the package's ranking over layers takes wrong "
        "heads.",
    ),
}
"""By their keys in the registry."""
