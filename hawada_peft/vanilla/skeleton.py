"""A model without weights, and the Auto class that loads it: what a config alone tells."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import UnsupportedModelError

DRAWS = ("uniform_", "normal_", "kaiming_uniform_")
"""Names of functions that fill a tensor with random numbers, torch's and transformers' around them."""


class Undrawn(TorchFunctionMode):
    """Leaves out what fills tensors with random numbers, where a model's weights are loaded or not looked at."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Methods draw: what draws again until all is within bounds would never end.
        if isinstance(func, FunctionType) and func.__name__ in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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
    with torch.device("meta"), Undrawn():
        model: PreTrainedModel = getattr(transformers, names[0])(config)
    return model


def check_constructor(model_class: type[PreTrainedModel]) -> None:
    """
    Check that a class is built from a config and nothing else, as every class of transformers is.

    Raises:
        UnsupportedModelError: if its constructor takes more.
    """
    try:
        inspect.signature(model_class).bind("config")
    except TypeError as error:
        raise UnsupportedModelError(
            f"{model_class.__name__} cannot be built from a config alone ({error}), and so neither can a slim model "
            "of it: give the further parameters of its constructor defaults, or load the weights into the class of "
            "transformers that it derives from"
        ) from None


def build_empty(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """
    A model of a class on the meta device.

    Args:
        model_class: of `check_constructor`.
        config: what the model keeps as its own.

    Raises:
        UnsupportedModelError: as `check_constructor`.
        StrictDataclassError, ValueError, TypeError: whatever the class raises on sizes that it refuses.
    """
    check_constructor(model_class)
    with torch.device("meta"), Undrawn():
        return model_class(config)


def build_undrawn(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """
    A model of a class on the CPU, for weights that are loaded: no random numbers are drawn for those that it has.

    Raises:
        Exception: whatever the class raises on sizes that it refuses.
    """
    here = torch.get_default_device().type == "cpu"  # every call of torch costs more where a device is named
    with torch.random.fork_rng(devices=()), nullcontext() if here else torch.device("cpu"), Undrawn():
        torch.manual_seed(0)
        return model_class(config)


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
        classes = classes if isinstance(classes, tuple) else (classes,)
        # Of several classes `from_pretrained` takes the one that the config names as its architecture.
        if type(model) in classes:
            return auto
    return type(model)
