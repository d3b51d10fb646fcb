"""A row of data per model family: where it keeps its gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """
    One row of data: what cannot be asked of transformers about the models of one `model_type`.

    Which parameters must be sliced, and along which axes, is found by building the config twice (`export.axes`).

    Args:
        layers (`str`): the list of layers, relative to `model.base_model`.
        attention_out (`str`): the attention's output projection, relative to a layer: head gates sit on its input.
        ffn_out (`str`): the FFN's output projection, relative to a layer: channel gates sit on its input.
        kv_heads_field (`str`): the config field with the number of KV groups; empty if every head has its own.
        head_dim_field (`str`): the config field that fixes the size of a head; empty if attention ignores it, and so
            heads cannot be removed.
        ffn_field (`str`): the config field with the FFN size.
        heads_field (`str`): the config field with the number of query heads.
        layers_field (`str`): the config field with the number of layers.
        hidden_field (`str`): the config field with the size of the residual stream.
        ffn_unit (`str`): the config field that `ffn_field` is a multiple of; empty if it counts channels.
        ffn_channels (`float`): channels that 1 of `ffn_field` stands for, where it is a ratio; 0 if it counts them.
        layer_lists (`tuple[str, ...]`): config fields that hold one entry per layer.
        layer_counts (`tuple[str, ...]`): further config fields with the number of layers.
        layer_indices (`tuple[str, ...]`): config fields that list layers, counted from 0.
        layer_stages (`tuple[str, ...]`): config fields that list layers counted from 1; 0 is what goes into the first.
        leading (`tuple[str, ...]`): config fields that tell how many of the first layers are of a kind.
        removed (`tuple[str, ...]`): config fields that follow from others, left out of an edited config.
        pinned (`tuple[tuple[int, str], ...]`): layers that must stay although a model without them can be built, each
            with the reason.
        branches (`tuple[str, ...]`, *optional*): the modules of a layer whose outputs its gate multiplies, relative to
            it: what they give must be added to the residual stream as it is. Empty: there are none, as each layer
            norms its sum. Left out, they are found by running one layer (`gates.branches`).
        blend_home (`str`): the module of a layer that holds a gate which blends the layer, where neither an
            attention's nor an FFN's output projection is in every layer.
        router (`str`): what chooses the experts of a token, relative to a layer; empty if there are none. `ffn_out`
            are the experts then, stacked in raw weights, and FFN channels are those of every expert.
        experts_field (`str`): the config field with the number of experts.
        chosen_field (`str`): the config field with the number of experts per token.
        fused (`tuple[tuple[str, tuple[str, ...]], ...]`): modules, or raw weights (relative to a layer; with a dot
            before it, relative to the model) whose rows, or inputs from the residual stream, hold several things: the
            axes in their order. One axis alone means that everything of a unit is stored together.
        twin (`str`): the `model_type` of a class that computes the same from the same weights and allows more head
            counts; empty if there is none.
        twin_fields (`tuple[tuple[str, Any], ...]`): config fields that make it compute the same.
        hidden_norms (`tuple[str, ...]`): the norms of a layer, relative to it, through which everything there reads
            the residual stream. The gate on the stream sits on them; empty if it has no place, because something else
            reads the stream or depends on its size.
        final_norm (`str`): the norm after the layers, relative to `model.base_model`, for the same gate.
        outer_norms (`tuple[str, ...]`): further norms outside of the layers that make or read the stream, for the same
            gate, by their full dotted names.
        stream_readers (`tuple[str, ...]`): modules outside of the layers that read channels past these norms, as what
            reads a pooled vector, by their full dotted names.
        heads_follow (`bool`): the size of a head is derived from both, so that heads go with channels of the residual
            stream in proportion, and neither goes alone.
        stream_scales (`tuple[tuple[str, str], ...]`): vectors that multiply what a block adds to the residual stream,
            with the projection whose output they multiply (LayerScale); both relative to a layer.
    """

    layers: str
    attention_out: str
    ffn_out: str
    kv_heads_field: str = ""
    head_dim_field: str = "head_dim"
    ffn_field: str = "intermediate_size"
    ffn_unit: str = ""
    heads_field: str = "num_attention_heads"
    layers_field: str = "num_hidden_layers"
    hidden_field: str = "hidden_size"
    ffn_channels: float = 0
    layer_lists: tuple[str, ...] = ()
    layer_counts: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    layer_stages: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pinned: tuple[tuple[int, str], ...] = ()
    branches: tuple[str, ...] | None = None
    blend_home: str = ""
    router: str = ""
    experts_field: str = "num_experts"
    chosen_field: str = "num_experts_per_tok"
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    twin: str = ""
    twin_fields: tuple[tuple[str, Any], ...] = ()
    hidden_norms: tuple[str, ...] = ()
    final_norm: str = ""
    outer_norms: tuple[str, ...] = ()
    stream_readers: tuple[str, ...] = ()
    heads_follow: bool = False
    stream_scales: tuple[tuple[str, str], ...] = ()


FAMILIES: dict[str, Family] = {}
"""The rows, by `config.model_type`. `register_family` adds to it."""

TARGET_MODULES: dict[str, list[str]] = {}
"""PEFT's view of the rows: the names of the modules that are wrapped, by `config.model_type`."""


def register_family(model_type: str, family: Family) -> None:
    """
    Make one more family known, or replace its row.

    Args:
        model_type (`str`): as in `config.model_type`.
        family (`Family`): the row.
    """
    FAMILIES[model_type] = family
    TARGET_MODULES[model_type] = [family.attention_out, family.ffn_out]
