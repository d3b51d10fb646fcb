"""Llama and the families that share its module names."""

from dataclasses import replace

from .family import Family, register_family

LLAMA = Family(
    layers="layers",
    attention_out="self_attn.o_proj",
    ffn_out="mlp.down_proj",
    kv_heads_field="num_key_value_heads",
    layer_lists=("layer_types", "no_rope_layers"),
    hidden_norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="norm",
)

# Llama's config refuses head counts that do not divide hidden_size; a Mistral without a window is the same function.
register_family("llama", replace(LLAMA, twin="mistral", twin_fields=(("sliding_window", None),)))

for _model_type in ("mistral", "qwen2", "qwen3", "granite", "smollm3"):
    register_family(_model_type, LLAMA)
