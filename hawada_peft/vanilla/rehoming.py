"""The same tensors under another model class that computes the same and takes more sizes: offered, never silent."""

from __future__ import annotations

import copy
import logging
from typing import cast

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import UnsupportedModelError
from .family import FAMILIES, Family, Layout, locate
from .mode import evaluating
from .resize import add_v4_rope_keys

logger = logging.getLogger(__name__)

MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    modeling_auto.MODEL_MAPPING,
)
"""Where the twin of a class is looked up: the same head on the twin's body."""

PROBE_TOKENS = 16


def has_twin(layout: Layout) -> bool:
    """Whether a model's family row names a twin, and the twin's class has the same parameters."""
    if not layout.family.twin:
        return False
    try:
        twin_skeleton(layout)
    except UnsupportedModelError:
        return False
    return True


def twin_skeleton(layout: Layout) -> PreTrainedModel:
    """
    The twin on the meta device: its class and config, no weights.

    Raises:
        UnsupportedModelError: if the family has no twin, or the twin's class has other parameters.
    """
    if not layout.family.twin:
        raise UnsupportedModelError(
            f"model_type={layout.model_type!r} has no twin to re-home to; rows with one: "
            f"{sorted(name for name, row in FAMILIES.items() if row.twin)}"
        )
    config = _twin_config(layout.config, layout.family)
    with torch.device("meta"):
        model, twin = layout.model_class(layout.config), _twin_class(layout, type(config))(config)
    mine, its = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, twin))
    differing = sorted(name for name in {*mine, *its} if mine.get(name) != its.get(name))
    if differing:
        raise UnsupportedModelError(
            f"{layout.model_class.__name__} cannot be re-homed to {type(twin).__name__}: their parameters differ in "
            f"{differing[:8]} (biases have no place there)"
        )
    return twin


def rehome(model: PreTrainedModel) -> PreTrainedModel:
    """
    The same tensors as a model of the family's twin class, e.g. a Llama as a Mistral without a window.

    The result shares memory with the model that is passed in, which is left as it is. Its logits are compared with the
    model's before it is returned.

    Args:
        model: a vanilla transformers model with its weights.

    Returns:
        A model of the twin's class in the same mode.

    Raises:
        UnsupportedModelError: if there is no twin, or it does not compute the same.

    Example:

        >>> type(rehome(base)).__name__  # base: a LlamaForCausalLM
        'MistralForCausalLM'
    """
    twin = twin_skeleton(locate(model))
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, module in twin.named_modules():
        source = model.get_submodule(name)
        for key, tensor in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                setattr(module, key, getattr(source, key))
    twin.tie_weights()
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    twin.train(model.training)
    _compare(model, twin)
    logger.info("%s re-homed as %s", type(model).__name__, type(twin).__name__)
    return twin


def _twin_config(config: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    fields = copy.deepcopy(config.to_dict())
    empty = AutoConfig.for_model(family.twin)
    known = set(empty.to_dict()) - {"model_type", "architectures", "transformers_version"}
    kept = {name: value for name, value in fields.items() if name in known} | dict(family.twin_fields)
    twin = type(empty)(**kept)
    twin._attn_implementation = config._attn_implementation
    add_v4_rope_keys(twin)
    return twin


def _twin_class(layout: Layout, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    mine = type(layout.config)
    for mapping in MAPPINGS:
        if mine in mapping and config_class in mapping and mapping[mine] == layout.model_class:
            return cast(type[PreTrainedModel], mapping[config_class])
    raise UnsupportedModelError(f"{config_class.__name__} has no counterpart of {layout.model_class.__name__}")


def _compare(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Both on the same random tokens, in evaluation mode: every output must be the same bit for bit."""
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with evaluating(model, twin), torch.inference_mode():
        outputs = [each(tokens.to(device), use_cache=False)[0] for each in (model, twin)]
    if not torch.equal(*outputs):
        gap = float((outputs[0] - outputs[1]).abs().max())
        raise UnsupportedModelError(
            f"{type(twin).__name__} does not compute what {type(model).__name__} does: outputs differ by {gap:.3g}; "
            f"the config {type(model.config).__name__} says something that {type(twin.config).__name__} cannot"
        )
