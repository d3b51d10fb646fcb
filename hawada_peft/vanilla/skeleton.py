"""A model without weights, and the Auto class that loads it: what a config alone tells."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import UnsupportedModelError


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """
    The model of a config on the meta device.

    Args:
        config: as read from a folder; left as it is.

    Raises:
        UnsupportedModelError: if the config does not name one class of transformers.
    """
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise UnsupportedModelError(
            f"the config of model_type={config.model_type!r} names the architectures {names}; needed is one class of "
            "transformers"
        )
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, names[0])(config)
    return model


def auto_class_of(model: PreTrainedModel) -> Any:
    """The `AutoModel*` class that loads this model's folder as this class; the class itself if none does."""
    for name in sorted(vars(modeling_auto)):
        if not name.startswith("AutoModel"):
            continue
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or type(model.config) not in mapping:
            continue
        classes = mapping[type(model.config)]
        if type(model) is classes or (isinstance(classes, tuple) and classes[0] is type(model)):
            return auto
    return type(model)
