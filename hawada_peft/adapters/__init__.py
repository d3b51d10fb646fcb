"""Gates and the adapters that carry them, for any `nn.Module`."""

from .attach import attach_adapters, collect_gates, detach_adapters, is_attention_layer, is_ffn_layer
from .base import GateAdapter
from .concrete import AttentionHeadAdapter, BlockAdapter, ChannelAdapter
from .gates import BlockGate, ChannelGate, GateStart, HeadGate, SigmoidGate

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
