"""The slim model: an edited config, a sliced state dict, a strict load into the same class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapters.huggingface.family import FFN, HEADS, HIDDEN, KV_GROUPS, Layout, locate
from ..adapters.layers import check_unquantized
from ..errors import UnsupportedModelError
from .axes import SliceRule, find_axes
from .legality import check_legal, edit_config
from .plan import Plan
from .slicing import slice_tensor

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def slim(model: Model, plan: Plan) -> Model:
    """
    Build the slim vanilla model of a plan. The dense model is left as it is and shares no memory with the result.

    Needs the memory of the slim model and of one tensor.

    Args:
        model: a dense vanilla transformers model.
        plan: what to keep of it.

    Returns:
        A model of the same class in the same mode, all parameters trainable, as `from_pretrained` would give it.

    Raises:
        IncompatibleBaseError: if the plan is for a model of other sizes.
        IllegalShapeError: if no vanilla model of the plan's shape exists.
        UnsupportedModelError: if the model has no family row, adapters in it, quantized weights, or state that the row
            does not explain.
    """
    layout = locate(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "slim() takes a vanilla model, and this one has adapters in it: use `merge_and_unload(plan=...)` on the "
            "PEFT model, or `unload()` first"
        )
    check_unquantized(model)
    plan.check_base(layout.full)
    check_legal(model, layout, plan.shape)
    rules = find_axes(model, layout, hidden=plan.hidden is not None)
    config = edit_config(model.config, layout, plan.shape, layers=plan.layers)
    add_v4_rope_keys(config)
    with torch.device("meta"):
        result = type(model)(config)
    result.load_state_dict(dict(_sliced(model, result, layout, plan, rules)), strict=True, assign=True)
    materialise(model, result, layout, plan)
    result.tie_weights()
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    logger.info("%s: %d of %d parameters stay", plan, result.num_parameters(), model.num_parameters())
    return result.train(model.training)


def _sliced(
    model: nn.Module, result: nn.Module, layout: Layout, plan: Plan, rules: Mapping[str, tuple[SliceRule, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    dense = model.state_dict()
    done: dict[int, torch.Tensor] = {}  # tied tensors stay one tensor
    for name in result.state_dict():
        source, layer, short = source_of(name, layout, plan)
        tensor = dense[source]
        if tensor.data_ptr() not in done or tensor.is_meta:
            sliced = tensor
            for rule in rules.get(short, ()):
                sliced = slice_tensor(sliced, rule.dim, rows_of(rule, layout, plan, layer))
            done[tensor.data_ptr()] = tensor.clone() if sliced is tensor else sliced
        yield name, done[tensor.data_ptr()]


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


def add_v4_rope_keys(config: PreTrainedConfig) -> None:
    """
    Write the rotary parameters by their names of transformers 4 as well.

    transformers 4.57 ignores `rope_parameters`, silently, and would compute with the class's default. Later versions
    read both.
    """
    rope = config.to_dict().get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    fields = vars(config)  # `rope_scaling` is a deprecated property there; the file needs the key itself
    fields["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
