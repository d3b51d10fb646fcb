"""What every routed expert adds to the model: its outputs, weighted by the router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from ..errors import HawAdaError
from ..gates.adapter import EXPERT_UNITS, GateAdapter
from ..gates.attach import collect_gates
from ..processes import Reduce, of_this_rank
from ..vanilla.batches import Batch, check_batch, on_device
from ..vanilla.family import locate_all
from ..vanilla.mode import adapters_off, evaluating


@dataclass
class _Seen:
    """Of one layer: (experts,) each, of `every` token the number in each entry."""

    total: torch.Tensor
    tokens: torch.Tensor
    every: torch.Tensor
    mask: torch.Tensor | None = field(default=None)


def expert_outputs(
    model: PeftModel, batches: Iterable[Batch], *, routed: bool = False, reduce: Reduce = of_this_rank
) -> dict[str, torch.Tensor]:
    """
    The mean over tokens of an expert's weight there (0 where it is not chosen) times the norm of its output.

    One forward pass of the dense model over the batches, and each expert once more on its own tokens; no gradients.

    Args:
        model: with gates on experts; left as it is.
        batches: keyword arguments of its forward pass. What `attention_mask` leaves out does not count.
        routed: take the mean over the tokens that are routed to the expert instead, as REAP does.
        reduce: sums over ranks; each has batches of its own then (`all_reduced`).

    Returns:
        By the names of `collect_gates`, for the gates on experts: (experts,), float64, on the CPU; 0 for experts to
        which no token is routed.

    Raises:
        HawAdaError: if there are no batches, or no gates on experts.
        BadDataError: if a batch holds what the model cannot take.

    References:
        Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (2025), equation 9.
    """
    base = model.get_base_model()
    seen: dict[str, _Seen] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        stack.enter_context(adapters_off(model))
        places = [
            (each, layer) for each in locate_all(base) for layer in range(each.dense.sizes()["num_hidden_layers"])
        ]
        for layout, layer in places:
            name = f"{layout.stack}.{layer}.{layout.family.router}"
            router = base.get_submodule(name) if layout.family.router else None
            gated = isinstance(router, GateAdapter) and any(
                EXPERT_UNITS in router.gates(adapter) for adapter in model.active_adapters
            )
            if gated:
                found = seen[name] = _Seen(*torch.zeros(3, layout.num_experts or 0, dtype=torch.float64))
                experts = base.get_submodule(layout.ffn_out(layer))
                inner = experts.get_base_layer() if isinstance(experts, GateAdapter) else experts
                stack.enter_context(_watched(cast(nn.Module, inner), found))
        if not seen:
            raise HawAdaError("the model has no gates on experts: add 'experts' to the config's `gates`")
        count = 0
        for batch in batches:
            check_batch(model, batch, labels=True)
            batch = on_device(batch, next(model.parameters()).device)
            for found in seen.values():
                found.mask = batch.get("attention_mask")
            model(**batch)
            count += 1
    if not count:
        raise HawAdaError("no calibration batches were given; pass at least one")
    device = next(model.parameters()).device
    sums = {
        name: [reduce(part.to(device)).cpu() for part in (one.total, one.tokens if routed else one.every)]
        for name, one in seen.items()
    }
    scores = {name: total / tokens.clamp_min(1) for name, (total, tokens) in sums.items()}
    ends = {f"{name}.{EXPERT_UNITS}": score for name, score in scores.items()}
    gates = [name for name in collect_gates(model) if name.split(".")[-2] == EXPERT_UNITS]
    return {
        gate: next(score for end, score in ends.items() if gate.rpartition(".")[0].endswith(end)) for gate in gates
    }


@contextmanager
def _watched(experts: nn.Module, seen: _Seen) -> Iterator[None]:
    handle = experts.register_forward_pre_hook(partial(_look, seen=seen), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _look(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, seen: _Seen) -> None:
    """Run every expert on the tokens that are routed to it, with a weight of 1."""
    hidden, index, weights = _arguments(args, kwargs)
    counts = torch.ones(len(index), dtype=torch.bool, device=index.device)
    if seen.mask is not None and seen.mask.numel() == len(index):
        counts = seen.mask.reshape(-1).bool()
    seen.every += int(counts.sum())
    for expert in index[counts].unique().tolist():
        token, slot = ((index == expert) & counts[:, None]).nonzero(as_tuple=True)
        chosen = torch.full((len(token), 1), expert, dtype=index.dtype, device=index.device)
        output = experts.forward(hidden[token], chosen, torch.ones_like(chosen, dtype=weights.dtype))
        norms = cast(torch.Tensor, output).double().norm(dim=-1)
        seen.total[expert] += float((weights[token, slot].double() * norms).sum())
        seen.tokens[expert] += len(token)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (tokens, features), the experts of each and their weights, (tokens, experts per token) both."""
    hidden, index, weights = (*args, *kwargs.values())[:3]
    return hidden.reshape(-1, hidden.shape[-1]), index, weights
