"""Llama and the families that share its module names, or most of them; texts by older designs."""

from dataclasses import replace

from ..family import Family, register_family

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

PLAIN = (
    "mistral", "ministral3", "qwen2", "qwen3", "granite", "smollm3", "ernie4_5", "hunyuan_v1_dense"
)  # fmt: skip
for _model_type in PLAIN:
    register_family(_model_type, LLAMA)

# A scale that depends on the hidden size, norms after the blocks or one norm for both, norms without a plain weight.
FIXED_STREAM = replace(LLAMA, hidden_norms=(), final_norm="")
COHERE, GEMMA = ("cohere", "cohere2"), ("gemma", "gemma2", "gemma3_text")
for _model_type in (*COHERE, "eurobert", "exaone4", *GEMMA, "nemotron", "olmo2", "olmo3"):
    register_family(_model_type, FIXED_STREAM)
register_family("stablelm", replace(FIXED_STREAM, head_dim_field=""))

QKV = ("self_attn.qkv_proj", ("heads", "kv_groups", "kv_groups"))
GATE_UP = ("mlp.gate_up_proj", ("ffn", "ffn"))
register_family("phi3", replace(LLAMA, fused=(QKV, GATE_UP)))
register_family("glm", replace(LLAMA, fused=(GATE_UP,)))
register_family("glm4", replace(FIXED_STREAM, fused=(GATE_UP,)))
register_family("starcoder2", replace(LLAMA, ffn_out="mlp.c_proj"))
register_family("phi", replace(FIXED_STREAM, attention_out="self_attn.dense", ffn_out="mlp.fc2"))

# Older designs, whose head size is derived from the hidden size: heads stay.
DERIVED: dict[str, Family] = {
    "gpt2": Family("h", "attn.c_proj", "mlp.c_proj", ffn_field="n_inner"),
    "gpt_neox": Family("layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": Family("decoder.layers", "self_attn.out_proj", "fc2", ffn_field="ffn_dim"),
    "modernbert": Family(
        "layers", "attn.Wo", "mlp.Wo", layer_lists=("layer_types",), fused=(("mlp.Wi", ("ffn", "ffn")),)
    ),
}
for _model_type, _family in DERIVED.items():
    register_family(_model_type, replace(_family, head_dim_field=""))
