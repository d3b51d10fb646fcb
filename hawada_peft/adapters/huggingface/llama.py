"""Llama and the families that share its module names."""

from .family import Family, register_family

LLAMA = Family(
    layers="layers",
    attention_out="self_attn.o_proj",
    ffn_out="mlp.down_proj",
    kv_heads_field="num_key_value_heads",
    layer_lists=("layer_types", "no_rope_layers"),
)

for _model_type in ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"):
    register_family(_model_type, LLAMA)
