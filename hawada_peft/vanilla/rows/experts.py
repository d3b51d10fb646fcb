"""
Mixtures of experts, stacked in raw weights, whose layers all have a router: where some are dense, what is found of the
class is taken instead.
"""

from dataclasses import replace

from ..family import register_family
from .llama import FIXED_STREAM

MIXTURE = replace(
    FIXED_STREAM,
    ffn_out="mlp.experts",
    router="mlp.gate",
    fused=(("mlp.experts.gate_up_proj", ("ffn", "ffn")),),
)
register_family("mixtral", replace(MIXTURE, experts_field="num_local_experts"))
for _model_type in ("qwen3_moe",):
    register_family(_model_type, replace(MIXTURE, ffn_field="moe_intermediate_size"))

# Gate and up projections alternate, and both have biases.
register_family(
    "gpt_oss",
    replace(
        MIXTURE,
        router="mlp.router",
        experts_field="num_local_experts",
        fused=(("mlp.experts.gate_up_proj", ("ffn",)), ("mlp.experts.gate_up_proj_bias", ("ffn",))),
    ),
)
