"""The slim model: an edited config, a sliced state dict, a strict load into the same class."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError, UnsupportedModelError
from ..planning.legal import check_plan
from ..planning.plan import Plan
from ..vanilla.family import Layout, locate, locate_stream, mark
from ..vanilla.modules import check_loaded, check_unquantized
from ..vanilla.resize import add_v4_rope_keys, edit_config, origin_of, rename
from ..vanilla.skeleton import build_empty
from .axes import SliceRule, cut_by, find_axes
from .conformity import check_conforms, vanilla_tensors
from .slicing import slice_tensor
from .source import StreamChange, build_tied, materialise, rows_of, source_of

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def slim(model: Model, plan: Plan, *, turn: StreamChange | None = None, layout: Layout | None = None) -> Model:
    """
    Build the slim vanilla model of a plan. The dense model is left as it is and shares no memory with the result.

    Needs the memory of the slim model and of one tensor.

    Args:
        model: a dense vanilla transformers model.
        plan: what to keep of it.
        turn: new coordinates of the residual stream, as many as the plan keeps of its units (`basis.turn.Turn`); the
            kept channels themselves if left out.
        layout (`Layout`, *optional*): the model's, where it is cut several times: what one cut finds out of the
            model's class the next ones need not.

    Returns:
        A model of the same class in the same mode, all parameters trainable, as `from_pretrained` would give it.

    Raises:
        InvalidPlanError: if it is none.
        IncompatibleBaseError: if the plan is for a model of other sizes.
        IllegalShapeError: if no vanilla model of the plan's shape exists.
        InvalidPlanError: if the plan keeps directions of a basis, and there is none, or the reverse.
        UnsupportedModelError: if the model has no family row, adapters in it, quantized or offloaded weights, weights
            that are not those of its class, or state that the row does not explain.
    """
    if not isinstance(model, PeftModel | PreTrainedModel):
        raise UnsupportedModelError(f"slim() takes a vanilla transformers model, got a {type(model).__name__}")
    if not isinstance(plan, Plan):
        raise InvalidPlanError(f"plan must be a Plan, got a {type(plan).__name__}; see `Plan.from_dict`")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "slim() takes a vanilla model, and this one has adapters in it: use `model.slim(plan=...)` or "
            "`merge_and_unload(plan=...)` of the PEFT model, or `unload()` first"
        )
    layout = _layout_of(model, plan, layout)
    check_loaded(model)
    check_unquantized(model)
    if plan.hidden is not None and plan.rotated != (turn is not None):
        raise InvalidPlanError(
            "the plan keeps directions of a basis of the residual stream, which is saved with the adapter: use "
            "`merge_and_unload(plan=...)` on the PEFT model"
            if plan.rotated
            else "the plan keeps channels of the residual stream, and directions of a basis are to be cut"
        )
    check_plan(layout, plan)
    dense = vanilla_tensors(model)
    check_conforms(layout, dense)
    rules = check_exists(layout, plan, dense)
    config = edit_config(layout, plan.shape, layers=plan.layers)
    add_v4_rope_keys(config)
    if turn is not None and not turn.tied:
        config.tie_word_embeddings = False
    result = build_tied(type(model), config, dense)
    result.load_state_dict(dict(_sliced(dense, result, layout, plan, rules, turn)), strict=True, assign=True)
    materialise(model, result, layout, plan)
    result.tie_weights()
    rename(result, "", origin_of(model))
    mark(result, layout, plan.layers)
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    logger.debug("%s: %d of %d parameters stay", plan, result.num_parameters(), model.num_parameters())
    return result.train(model.training)


def _layout_of(model: PreTrainedModel, plan: Plan, known: Layout | None) -> Layout:
    """What a plan cuts of a model: the layout that is known, where it is that."""
    if plan.hidden is not None and not plan.rotated:
        return locate_stream(model, plan.tower or None)
    return known if known is not None and plan.tower in ("", known.tower) else locate(model, plan.tower or None)


def check_exists(layout: Layout, plan: Plan, dense: Mapping[str, torch.Tensor]) -> dict[str, tuple[SliceRule, ...]]:
    """
    Check that what a plan leaves of a model is, tensor by tensor, what its class builds: on the meta device.

    Args:
        layout, plan: of the dense model; the plan is checked.
        dense: its tensors, of `vanilla_tensors`.

    Returns:
        The rules by which the tensors are sliced, of `find_axes`.

    Raises:
        UnsupportedModelError: naming the first tensor that has another shape; as `find_axes`.
    """
    hidden = plan.hidden is not None and not plan.rotated
    rules = find_axes(layout, hidden=hidden, cut=cut_by(plan))
    if plan.rotated:
        return rules  # every tensor of the stream changes; the new coordinates are checked by themselves
    built = build_empty(layout.model_class, edit_config(layout, plan.shape, layers=plan.layers))
    for name, tensor in built.state_dict().items():
        source, layer, short = source_of(name, layout, plan)
        left = list(dense[source].shape) if source in dense else []
        for rule in rules.get(short, ()) if left else ():
            left[rule.dim] = len(rows_of(rule, layout, plan, layer))
        if left != list(tensor.shape):
            raise UnsupportedModelError(
                f"{plan} leaves {source} of shape {tuple(left) or 'missing'}, and {layout.model_class.__name__} "
                f"builds {name} of shape {tuple(tensor.shape)} for it: this class cannot be cut to these sizes"
            )
    return rules


def _sliced(
    dense: Mapping[str, torch.Tensor],
    result: nn.Module,
    layout: Layout,
    plan: Plan,
    rules: Mapping[str, tuple[SliceRule, ...]],
    turn: StreamChange | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    done: dict[int, torch.Tensor] = {}  # what the class ties stays one tensor, and nothing else does
    for name, place in result.state_dict(keep_vars=True).items():
        if id(place) not in done:
            source, layer, short = source_of(name, layout, plan)
            tensor = dense[source].data
            sliced = tensor if turn is None else turn.tensor(source, dense.__getitem__)
            for rule in rules.get(short, ()):
                sliced = slice_tensor(sliced, rule.dim, rows_of(rule, layout, plan, layer))
            done[id(place)] = tensor.clone() if sliced is tensor else sliced
        yield name, done[id(place)]
