"""The gates of several adapters added up into those of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from .adapter import GateAdapter
from .bases import BasisGate, HeadMap


def add_gates(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """
    Set an adapter's raw gates to the weighted sum of those of others.

    Args:
        model: with all of the adapters in it.
        adapters: whose gates are added.
        weights: one each.
        adapter_name: whose gates are set.

    Raises:
        ValueError: if they gate different things.
    """
    for module in model.modules():
        if not isinstance(module, GateAdapter):
            continue
        if adapter_name in module.head_maps:
            maps = [cast(HeadMap, module.head_maps[name]) for name in adapters if name in module.head_maps]
            if len(maps) < len(adapters) or any(not torch.equal(each.into, maps[0].into) for each in maps):
                raise ValueError(f"the adapters {list(adapters)} have different bases inside of heads")
            cast(HeadMap, module.head_maps[adapter_name]).set(maps[0].into, maps[0].back, maps[0].mean)
        sources = [module.gates(name) for name in adapters]
        for slot, gate in module.gates(adapter_name).items():
            bases = [each for source in sources if isinstance(each := source.get(slot), BasisGate)]
            if isinstance(gate, BasisGate) and bases:
                gate.set_basis(bases[0].vectors, bases[0].scales, bases[0].marks)
            if any(slot not in source or source[slot].units != gate.units for source in sources) or any(
                not torch.equal(each.vectors, bases[0].vectors) for each in bases
            ):
                raise ValueError(f"the adapters {list(adapters)} gate different things; their gates cannot be added")
            with torch.no_grad():
                gate.theta.zero_()
                for weight, source in zip(weights, sources, strict=True):
                    gate.theta.add_(source[slot].theta, alpha=weight)
