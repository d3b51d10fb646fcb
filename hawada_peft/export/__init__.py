"""From gates to a verified vanilla model: plan, legality, slicing, slim model, verification."""

from .facts import ExportFacts, QualityChange, calibration_facts
from .hub import push_to_hub, write_card
from .passport import PassportLine
from .plan import Plan
from .runtimes import check_compile, check_onnx
from .search_result import SearchResult
from .search_state import SearchEffort
from .slicing import slice_conv, slice_embedding, slice_linear
from .slim import slim
from .stream import SlimCheckpoint, slim_checkpoint
from .verify import Verification, save_slim, verify_slim

__all__ = [
    "ExportFacts",
    "PassportLine",
    "Plan",
    "QualityChange",
    "SearchEffort",
    "SearchResult",
    "SlimCheckpoint",
    "Verification",
    "calibration_facts",
    "check_compile",
    "check_onnx",
    "push_to_hub",
    "save_slim",
    "slice_conv",
    "slice_embedding",
    "slice_linear",
    "slim",
    "slim_checkpoint",
    "verify_slim",
    "write_card",
]
