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
from ..vanilla.family import Layout
from ..vanilla.modules import check_loaded, check_unquantized
from ..vanilla.resize import add_v4_rope_keys, origin_of, rename
from ..vanilla.skeleton import build_empty
from .conformity import check_conforms, vanilla_tensors
from .cutting import Cutting, towers_for
from .slicing import slice_tensor
from .source import StreamChange, build_tied, materialise

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def slim(model: Model, plan: Plan, *, turn: StreamChange | None = None, layout: Layout | None = None) -> Model:
    """
    Build the slim vanilla model of a plan. The dense model is left as it is and shares no memory with the result.

    Needs the memory of the slim model and of one tensor.

    Args:
        model: a dense vanilla transformers model.
        plan: what to keep of it.
        turn: new coordinates (`basis.basis.plan_turn`): of the residual stream, as many as the plan keeps of its
            units; inside of heads. The kept channels themselves if left out.
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
    cutting = Cutting(towers_for(model, plan, layout))
    check_loaded(model)
    check_unquantized(model)
    turned = turn is not None and turn.write is not None
    if plan.hidden is not None and plan.rotated != turned:
        raise InvalidPlanError(
            "the plan keeps directions of a basis of the residual stream, which is saved with the adapter: use "
            "`merge_and_unload(plan=...)` on the PEFT model"
            if plan.rotated
            else "the plan keeps channels of the residual stream, and directions of a basis are to be cut"
        )
    if plan.head_dim is not None and not (turn is not None and turn.in_heads):
        raise InvalidPlanError(
            "the plan keeps features of a basis inside of each head, which is saved with the adapter: use "
            "`merge_and_unload(plan=...)` on the PEFT model"
        )
    for tower, part in cutting.towers:
        check_plan(tower, part)
    dense = vanilla_tensors(model)
    check_conforms(cutting.towers[0][0], dense)
    check_exists(cutting, dense)
    config = cutting.config()
    add_v4_rope_keys(config)
    if turn is not None and not turn.tied:
        config.tie_word_embeddings = False
    result = build_tied(type(model), config, dense)
    result.load_state_dict(dict(_sliced(dense, result, cutting, turn)), strict=True, assign=True)
    slimmed = finish(model, result, cutting, plan.sizes)
    logger.debug("%s: %d of %d parameters stay", plan, slimmed.num_parameters(), model.num_parameters())
    return slimmed


def finish(model: Model, result: PreTrainedModel, cutting: Cutting, sizes: Mapping[str, int]) -> Model:
    """
    Give a new model, in place, what its state dict does not hold: as `from_pretrained` would.

    Args:
        model: the dense model.
        result: of the same class, with its state dict loaded, and the rest on the meta device.
        cutting: of the dense model, with the plans that the new one was made by.
        sizes: of the new model, for messages.

    Returns:
        The new model, in the dense one's mode.

    Raises:
        UnsupportedModelError: as `materialise`.
    """
    materialise(model, result, cutting.source, sizes)
    result.tie_weights()
    rename(result, "", origin_of(model))
    cutting.mark(result)
    if model.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    return result.train(model.training)


def check_exists(cutting: Cutting, dense: Mapping[str, torch.Tensor]) -> None:
    """
    Check that what plans leave of a model is, tensor by tensor, what its class builds: on the meta device.

    Args:
        cutting: of the dense model; its plans are checked.
        dense: its tensors, of `vanilla_tensors`.

    Raises:
        UnsupportedModelError: naming the first tensor that has another shape; as `find_axes`.
    """
    _ = cutting.rules  # refuses what is not known of the axes that are cut
    if any(plan.rotated for _, plan in cutting.towers):
        return  # every tensor of the stream changes; the new coordinates are checked by themselves
    built = build_empty(cutting.model_class, cutting.config())
    for name, tensor in built.state_dict().items():
        source = cutting.source(name)
        left = list(dense[source].shape) if source in dense else []
        for dim, rows in cutting.rows(name).items() if left else ():
            left[dim] = len(rows)
        if left != list(tensor.shape):
            plans = ", ".join(str(plan) for _, plan in cutting.towers)
            raise UnsupportedModelError(
                f"{plans} leaves {source} of shape {tuple(left) or 'missing'}, and {cutting.model_class.__name__} "
                f"builds {name} of shape {tuple(tensor.shape)} for it: this class cannot be cut to these sizes"
            )


def _sliced(
    dense: Mapping[str, torch.Tensor], result: nn.Module, cutting: Cutting, turn: StreamChange | None
) -> Iterator[tuple[str, torch.Tensor]]:
    done: dict[int, torch.Tensor] = {}  # what the class ties stays one tensor, and nothing else does
    for name, place in result.state_dict(keep_vars=True).items():
        if id(place) not in done:
            source = cutting.source(name)
            whole = dense[source].data if turn is None else turn.tensor(source, dense.__getitem__)
            sliced = whole
            for dim, rows in cutting.rows(name).items():
                if not torch.equal(rows, torch.arange(sliced.shape[dim])):  # a copy is many times quicker
                    sliced = slice_tensor(sliced, dim, rows)
            done[id(place)] = whole.detach().clone() if sliced is whole else sliced
        yield name, done[id(place)]
