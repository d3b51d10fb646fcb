"""ViT and the families that share its module names, or most of them."""

from dataclasses import replace

from ..family import Family, register_family
from ..shape import HIDDEN

VIT = Family(
    layers="layers",
    attention_out="attention.o_proj",
    ffn_out="mlp.fc2",
    hidden_norms=("layernorm_before", "layernorm_after"),
    final_norm="layernorm",
)

for _model_type in ("vit", "deit"):
    register_family(_model_type, VIT)

# The mean of the patches is normed, a decoder reads the stream, or nothing is known of who does.
FIXED_STREAM = replace(VIT, hidden_norms=(), final_norm="")
for _model_type in ("audio-spectrogram-transformer", "beit", "ijepa", "vit_mae", "vit_msn"):
    register_family(_model_type, FIXED_STREAM)

# DINOv2 states its FFN size as a multiple of the hidden size; its classifier reads the class token and the mean patch.
DINOV2 = replace(
    VIT,
    layers="encoder.layer",
    ffn_field="mlp_ratio",
    ffn_unit="hidden_size",
    fused=((".classifier", (HIDDEN, HIDDEN)),),
    hidden_norms=("norm1", "norm2"),
    stream_scales=(("layer_scale1.lambda1", "attention.o_proj"), ("layer_scale2.lambda1", "mlp.fc2")),
)
for _model_type in ("dinov2", "dinov2_with_registers"):
    register_family(_model_type, DINOV2)

# The head size is derived from the hidden size: heads stay.
BOUND = replace(FIXED_STREAM, head_dim_field="")
register_family("dinov3_vit", replace(BOUND, layers="layer", ffn_out="mlp.down_proj"))
register_family(
    "videomae", replace(BOUND, layers="encoder.layer", attention_out="attention.output.dense", ffn_out="output.dense")
)
for _model_type in ("clip_text_model", "clip_vision_model"):
    register_family(_model_type, replace(BOUND, layers="encoder.layers", attention_out="self_attn.out_proj"))
