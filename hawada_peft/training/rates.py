"""A learning rate of their own for some parameters of an optimizer."""

from __future__ import annotations

from collections.abc import Collection

import torch


def regroup(optimizer: torch.optim.Optimizer, parameters: Collection[torch.Tensor], rate: float) -> None:
    """Take parameters out of an optimizer's groups into one with that learning rate, and without weight decay."""
    known = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": list(parameters), "lr": rate, "weight_decay": 0.0})
