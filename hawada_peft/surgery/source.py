"""Where each tensor of a slim model comes from: the dense tensor, and the rows of it that stay."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.family import Layout
from ..vanilla.shape import FFN, HEADS, HIDDEN, KV_GROUPS
from .axes import SliceRule


def source_of(name: str, layout: Layout, plan: Plan) -> tuple[str, int, str]:
    """The dense name of a slim parameter, its layer's position in the plan (-1: outside), its name in `find_axes`."""
    prefix = f"{layout.stack}."
    if not name.startswith(prefix):
        return name, -1, f".{name}"
    index, _, short = name.removeprefix(prefix).partition(".")
    return f"{prefix}{plan.layers[int(index)]}.{short}", int(index), short


def rows_of(rule: SliceRule, layout: Layout, plan: Plan, layer: int) -> torch.Tensor:
    """The indices that stay along a rule's dimension, in the layer at a position of the plan."""
    dense = layout.dense.sizes()
    units = {
        HEADS: (plan.heads[layer], dense["num_attention_heads"]),
        KV_GROUPS: (plan.kv_groups[layer], dense["num_key_value_heads"]),
        FFN: (plan.channels[layer], dense["intermediate_size"]),
        HIDDEN: (plan.hidden or tuple(range(layout.hidden_size)), layout.hidden_size),
    }
    offset, rows = 0, []
    for axis in rule.segments:
        kept, total = units[axis]
        starts = offset + torch.tensor(kept) * rule.width
        rows.append((starts[:, None] + torch.arange(rule.width)).flatten())
        offset += total * rule.width
    return torch.cat(rows)


def materialise(model: nn.Module, result: nn.Module, layout: Layout, plan: Plan) -> None:
    """Give a slim model the tensors that a state dict does not hold (rotary frequencies): those of the dense one."""
    for module_name, module in result.named_modules():
        for name, tensor in [*module._buffers.items(), *vars(module).items()]:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                continue
            source = source_of(f"{module_name}.{name}" if module_name else name, layout, plan)[0]
            owner, _, attribute = source.rpartition(".")
            dense = getattr(model.get_submodule(owner), attribute)
            if dense.shape != tensor.shape:
                raise UnsupportedModelError(
                    f"{source!r} is not saved with the model, and its shape {tuple(dense.shape)} would have to become "
                    f"{tuple(tensor.shape)}: this class cannot be slimmed to {plan.shape.to_dict()}"
                )
            setattr(module, name, dense.detach().clone())
