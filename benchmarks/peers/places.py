"""Where the two kinds of teacher keep what peers cut: one row per kind, as transformers 5.18 and later name it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Places:
    """
    Dotted names; of norms, attention and FFN, relative to a layer; of FFN linears, relative to the FFN. The attention
    has q_proj, k_proj, v_proj and o_proj.

    embedded: what writes the first residual stream. rotary: the function that rotates queries and keys, by its name in
    the module of the attention class; empty if there is none.
    """

    layers: str
    attention: str
    attention_norm: str
    ffn: str
    ffn_norm: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    final_norm: str
    head: str
    embedded: str
    rotary: str = ""


PLACES = {
    "input_ids": Places(
        layers="model.layers",
        attention="self_attn",
        attention_norm="input_layernorm",
        ffn="mlp",
        ffn_norm="post_attention_layernorm",
        ffn_in=("gate_proj", "up_proj"),
        ffn_out="down_proj",
        final_norm="model.norm",
        head="lm_head",
        embedded="model.embed_tokens",
        rotary="apply_rotary_pos_emb",
    ),
    "pixel_values": Places(
        layers="vit.layers",
        attention="attention",
        attention_norm="layernorm_before",
        ffn="mlp",
        ffn_norm="layernorm_after",
        ffn_in=("fc1",),
        ffn_out="fc2",
        final_norm="vit.layernorm",
        head="classifier",
        embedded="vit.embeddings",
    ),
}
"""By the teacher's main input."""


def places_of(model: PreTrainedModel) -> Places:
    """The row of a teacher's kind."""
    return PLACES[model.main_input_name]


def within(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Sub-modules by name."""
    return [module.get_submodule(name) for name in names]
