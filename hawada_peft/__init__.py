"""Hardware-aware slimming of Hugging Face models, as a PEFT tuner. Importing it registers the tuner, nothing else."""

from importlib.metadata import version

from ._register import register
from .adapters import (
    AttentionHeadAdapter,
    BlockAdapter,
    BlockGate,
    ChannelAdapter,
    ChannelGate,
    GateAdapter,
    HeadGate,
    SigmoidGate,
    attach_adapters,
    collect_gates,
    detach_adapters,
    is_attention_layer,
    is_ffn_layer,
)
from .adapters.huggingface import Family, Shape, register_family
from .config import HawAdaConfig
from .export import (
    Plan,
    Verification,
    save_slim,
    slice_conv,
    slice_embedding,
    slice_linear,
    slim,
    verify_slim,
)
from .model import HawAdaModel

__version__ = version("hawada_peft")

register(HawAdaConfig, HawAdaModel)
