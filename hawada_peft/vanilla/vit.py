"""ViT and the families that share its module names."""

from dataclasses import replace

from .family import HIDDEN, Family, register_family

VIT = Family(
    layers="layers",
    attention_out="attention.o_proj",
    ffn_out="mlp.fc2",
    hidden_norms=("layernorm_before", "layernorm_after"),
    final_norm="layernorm",
)

for _model_type in ("vit", "deit"):
    register_family(_model_type, VIT)

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
register_family("dinov2", DINOV2)
