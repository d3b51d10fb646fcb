"""The parts of a model that have a config of their own: its text, its vision, its backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Tower:
    """
    A model, or a model inside it that is built from one of its sub-configs.

    Args:
        path (`str`): of its config in that of the whole model, as `"text_config"`; empty for the whole.
        root (`str`): dotted name of its `base_model` in the whole model; empty if that is the model.
        config (`PreTrainedConfig`): its config.
    """

    path: str
    root: str
    config: PreTrainedConfig


def towers_of(model: PreTrainedModel) -> list[Tower]:
    """The whole model first, then every model inside it that one of the sub-configs, at any depth, is for."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
    inner = [module for module in names if isinstance(module, PreTrainedModel) and module is not model]
    found = [Tower("", names[model.base_model], model.config)]
    for path, config in _below(model.config, ""):
        mine = [each for each in inner if each.config is config] or [
            each
            for each in inner
            if type(each.config) is type(config)  # built from a copy of it
        ]
        if mine:
            found.append(Tower(path, names[mine[0].base_model], config))
    return found


def config_at(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The sub-config at a path; the config itself at an empty one."""
    for name in path.split(".") if path else []:
        config = getattr(config, name)
    return config


def value_at(config: PreTrainedConfig, field: str) -> Any:
    """
    A field of a config, of a list there one entry: `"depths.1"`; None if it has none.

    Raises:
        UnsupportedModelError: if it has a value for each layer (`per_layer_config`).
    """
    name, _, place = field.partition(".")
    try:
        value = getattr(config, name, None)
    except RuntimeError as error:  # what transformers from 5.23 on raises
        raise UnsupportedModelError(
            f"the config of model_type={config.model_type!r} gives single layers another {name} than the rest "
            "(`per_layer_config`); what can be removed is only known where layers share it"
        ) from error
    return value[int(place)] if place and value is not None else value


def _below(config: PreTrainedConfig, path: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            here = f"{path}.{name}" if path else name
            yield here, inner
            yield from _below(inner, here)
