"""For whoever builds on gates: gates and the adapters that carry them, for any `nn.Module`."""

from .adapter import GateAdapter
from .attach import attach_adapters, collect_gates, detach_adapters, is_attention_layer, is_ffn_layer
from .concrete import AttentionHeadAdapter, BlockAdapter, ChannelAdapter
from .kinds import BlockGate, ChannelGate, GateStart, HeadGate, SigmoidGate

__all__ = [
    "AttentionHeadAdapter",
    "BlockAdapter",
    "BlockGate",
    "ChannelAdapter",
    "ChannelGate",
    "GateAdapter",
    "GateStart",
    "HeadGate",
    "SigmoidGate",
    "attach_adapters",
    "collect_gates",
    "detach_adapters",
    "is_attention_layer",
    "is_ffn_layer",
]
