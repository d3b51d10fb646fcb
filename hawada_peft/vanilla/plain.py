"""What a loaded model carries that is not its own: where it came from, how it was stored, code that is not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

LEFT_OVER = ("auto_map", "quantization_config")
"""Config fields that say something of other files: of custom code, and of weights as they were stored."""

ORIGIN = "_hawada_origin"
"""Attribute of a model: what it was cut from."""


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields without those that are left over, at any depth."""
    return {
        name: plain_fields(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in LEFT_OVER
    }


def make_plain(model: PreTrainedModel) -> None:
    """
    Take off a model what is left over of how it was loaded: its weights are plain, as `check_unquantized` says.

    A checkpoint out of a GGUF file has such weights, and a quantizer that refuses to save them.
    """
    for config in _configs(model.config):
        for name in LEFT_OVER:
            vars(config).pop(name, None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)


def origin_of(model: PreTrainedModel) -> str:
    """What a model was cut from, else where it was loaded from; empty if neither is known."""
    return str(vars(model).get(ORIGIN) or model.name_or_path or "")


def rename(model: PreTrainedModel, name: str, origin: str) -> None:
    """
    Say where a model is, and what it was cut from.

    Args:
        model: the slim model.
        name: its folder; empty until it is saved: adapters trained on it record this name as that of their base.
        origin: name of the dense model.
    """
    model.name_or_path = model.config._name_or_path = name
    vars(model)[ORIGIN] = origin


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)
