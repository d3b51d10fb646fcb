"""The slim model: an edited config, a sliced state dict, a strict load into the same class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError, UnsupportedModelError
from ..planning.plan import Plan
from ..vanilla.family import Layout, locate
from ..vanilla.legality import check_legal
from ..vanilla.modules import check_unquantized
from ..vanilla.resize import add_v4_rope_keys, edit_config
from .axes import SliceRule, find_axes
from .slicing import slice_tensor
from .source import StreamChange, materialise, rows_of, source_of

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def slim(model: Model, plan: Plan, *, turn: StreamChange | None = None) -> Model:
    """
    Build the slim vanilla model of a plan. The dense model is left as it is and shares no memory with the result.

    Needs the memory of the slim model and of one tensor.

    Args:
        model: a dense vanilla transformers model.
        plan: what to keep of it.
        turn: new coordinates of the residual stream, as many as the plan keeps of its units (`basis.turn.Turn`); the
            kept channels themselves if left out.

    Returns:
        A model of the same class in the same mode, all parameters trainable, as `from_pretrained` would give it.

    Raises:
        IncompatibleBaseError: if the plan is for a model of other sizes.
        IllegalShapeError: if no vanilla model of the plan's shape exists.
        InvalidPlanError: if the plan keeps directions of a basis, and there is none, or the reverse.
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
    if plan.hidden is not None and plan.rotated != (turn is not None):
        raise InvalidPlanError(
            "the plan keeps directions of a basis of the residual stream, which is saved with the adapter: use "
            "`merge_and_unload(plan=...)` on the PEFT model"
            if plan.rotated
            else "the plan keeps channels of the residual stream, and directions of a basis are to be cut"
        )
    plan.check_base(layout.full)
    check_legal(layout, plan.shape)
    rules = find_axes(layout, hidden=plan.hidden is not None and turn is None)
    config = edit_config(layout, plan.shape, layers=plan.layers)
    add_v4_rope_keys(config)
    if turn is not None and not turn.tied:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        result = type(model)(config)
    result.load_state_dict(dict(_sliced(model, result, layout, plan, rules, turn)), strict=True, assign=True)
    materialise(model, result, layout, plan)
    result.tie_weights()
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    logger.info("%s: %d of %d parameters stay", plan, result.num_parameters(), model.num_parameters())
    return result.train(model.training)


def _sliced(
    model: nn.Module,
    result: nn.Module,
    layout: Layout,
    plan: Plan,
    rules: Mapping[str, tuple[SliceRule, ...]],
    turn: StreamChange | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    dense = model.state_dict()
    done: dict[tuple[int, str], torch.Tensor] = {}  # tied tensors stay one tensor
    for name in result.state_dict():
        source, layer, short = source_of(name, layout, plan)
        tensor = dense[source]
        key = tensor.data_ptr(), "" if turn is None or turn.tied else source
        if key not in done or tensor.is_meta:
            sliced = tensor if turn is None else turn.tensor(source, dense.__getitem__)
            for rule in rules.get(short, ()):
                sliced = slice_tensor(sliced, rule.dim, rows_of(rule, layout, plan, layer))
            done[key] = tensor.clone() if sliced is tensor else sliced
        yield name, done[key]
