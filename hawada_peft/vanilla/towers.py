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


def check_uniform(config: PreTrainedConfig) -> None:
    """
    Check that one config counts for all layers of each tower, as it does but where some have one of their own.

    Raises:
        UnsupportedModelError: if a field has values by layer.
    """
    for path, inner in (("", config), *_below(config, "")):
        if getattr(inner, "is_heterogeneous", False):  # transformers before 5.23 has no such configs
            raise UnsupportedModelError(
                f"the config{f' {path!r}' if path else ''} of model_type={inner.model_type!r} gives single layers "
                "other sizes than the rest (`per_layer_config`); what can be removed is only known of models whose "
                "layers share one config"
            )


def config_at(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    """The sub-config at a path; the config itself at an empty one."""
    for name in path.split(".") if path else []:
        config = getattr(config, name)
    return config


def value_at(config: PreTrainedConfig, field: str) -> Any:
    """A field of a config, of a list there one entry: `"depths.1"`; None if it has none."""
    name, _, place = field.partition(".")
    value = getattr(config, name, None)
    return value[int(place)] if place and value is not None else value


def _below(config: PreTrainedConfig, path: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            here = f"{path}.{name}" if path else name
            yield here, inner
            yield from _below(inner, here)
