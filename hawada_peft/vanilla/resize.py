"""The config of a vanilla model of other sizes, and what a loaded model carries that is not its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from .family import Family, Layout
from .shape import Shape

LEFT_OVER = ("auto_map", "quantization_config")
"""Config fields that say something of other files: of custom code, and of weights as they were stored."""

HEAD_SIZE = "head_dim"
"""Config field that most attention classes read the size of a head from, where it is there."""

ORIGIN = "_hawada_origin"
"""Attribute of a model: what it was cut from."""


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


def untie(model: PreTrainedModel) -> None:
    """
    Say in a model's config that its embeddings are not tied, if they were and are no longer the same tensors.

    Training one of them makes them differ; saved as tied ones, one would be lost.
    """
    if any(model.get_parameter(one) is not model.get_parameter(other) for one, other in _tied(model)):
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            if config.tie_word_embeddings:
                config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _tied(model: PreTrainedModel) -> list[tuple[str, str]]:
    names = dict(model.named_parameters(remove_duplicate=False))
    return [pair for pair in model.all_tied_weights_keys.items() if set(pair) <= names.keys()]


def edit_config(layout: Layout, shape: Shape, *, layers: tuple[int, ...] | None = None) -> PreTrainedConfig:
    """
    A new config of the same class with the sizes of `shape`.

    Args:
        layout: the dense model's; its config is left as it is.
        shape: the sizes wanted, complete. Another `head_dim` than the dense one is written by the name that most
            classes read it by if the row knows none.
        layers: the kept layers, by which per-layer lists are cut; the first ones if left out.

    Raises:
        StrictDataclassError, ValueError, TypeError: whatever the config class raises on sizes that it refuses.
    """
    config, family = layout.tower_config, layout.family
    sizes, dense = shape.sizes(), layout.dense.sizes()
    layers = layers or tuple(range(sizes["num_hidden_layers"]))
    whole: dict[str, Any] = plain_fields(copy.deepcopy(layout.config.to_dict()))
    fields = whole
    for name in layout.scope.split(".") if layout.scope else []:
        fields = fields[name]

    def put(name: str, value: Any) -> None:
        if not name:  # the row knows no such field: the size stays
            return
        name, _, place = name.partition(".")
        name = config.attribute_map.get(name, name)
        if place:
            fields[name] = [*fields[name][: int(place)], value, *fields[name][int(place) + 1 :]]
        else:
            fields[name] = value

    hidden = shape.hidden_size or layout.hidden_size
    put(family.hidden_field, hidden)
    put(family.heads_field, sizes["num_attention_heads"])
    for name in (family.layers_field, *family.layer_counts):
        put(name, sizes["num_hidden_layers"])
    put(family.kv_heads_field, sizes["num_key_value_heads"])
    if shape.head_dim not in (None, layout.head_dim):
        put(family.head_dim_field or HEAD_SIZE, shape.head_dim)
    elif family.head_dim_field and (
        sizes["num_attention_heads"] != dense["num_attention_heads"] or hidden != layout.hidden_size
    ):
        # Many configs derive it from these sizes. Not written when nothing changes: older versions of some families
        # do not know the field.
        put(family.head_dim_field, layout.head_dim)
    size = sizes["intermediate_size"]
    if size == dense["intermediate_size"] and hidden == layout.hidden_size and layout.known is not None:
        pass  # of no layer that is left, perhaps
    elif family.ffn_unit:
        unit = hidden if family.ffn_unit == "hidden_size" else getattr(config, family.ffn_unit)
        put(family.ffn_field, _whole(size / unit))
    else:
        put(family.ffn_field, _whole(size / family.ffn_channels) if family.ffn_channels else size)
    if shape.num_experts is not None:
        put(family.experts_field, shape.num_experts)
    _cut_lists(fields, family, layers)
    if isinstance(config, BackboneConfigMixin):
        # Stage i is what comes out of layer i - 1; the names of stages and of outputs follow from the indices.
        fields.pop("stage_names", None)
        fields.pop("out_features", None)
        fields["out_indices"] = sorted({sum(layer < i for layer in layers) for i in config.out_indices})
    edited = type(layout.config)(**whole)
    for new, old in zip(_configs(edited), _configs(layout.config), strict=True):
        new._attn_implementation = old._attn_implementation
        new._experts_implementation = old._experts_implementation
    return edited


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _cut_lists(fields: dict[str, Any], family: Family, layers: Sequence[int]) -> None:
    """What a config says of single layers, with some of them left."""

    def before(layer: int) -> int:
        """How many of the kept layers come before one."""
        return sum(each < layer for each in layers)

    for name in family.layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][layer] for layer in layers]
    for name in family.layer_indices:
        fields[name] = [before(layer) for layer in fields[name] if layer in layers]
    for name in family.layer_stages:
        fields[name] = sorted({before(stage) for stage in fields[name]})
    for name in family.leading:
        fields[name] = before(fields[name])
    for name in family.removed:
        fields.pop(name, None)


def parameters_at(layout: Layout, shape: Shape, *beside: tuple[Layout, Shape]) -> int:
    """Parameters of a model of a complete shape, and of those of further towers, by building it on the meta device."""
    config = layout.config
    for tower, sizes in ((layout, shape), *beside):
        layers = (0,) * sizes.sizes()["num_hidden_layers"]  # per-layer lists say nothing of sizes
        config = edit_config(replace(tower, config=config), sizes, layers=layers)
    with torch.device("meta"):
        return int(layout.model_class(config).num_parameters())


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
