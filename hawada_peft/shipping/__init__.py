"""For whoever ships: slim folders with card and report, their checks, what runs them, the Hub."""

from .checkpoint import slim_checkpoint
from .checks import Check, Verification
from .facts import ExportFacts, QualityChange, calibration_facts
from .hub import push_to_hub
from .passport import PassportLine
from .runtimes import check_compile, check_onnx
from .save import Slimmed, save_slim
from .verify import verify_slim
from .write import write_card

__all__ = [
    "Check",
    "ExportFacts",
    "PassportLine",
    "QualityChange",
    "Slimmed",
    "Verification",
    "calibration_facts",
    "check_compile",
    "check_onnx",
    "push_to_hub",
    "save_slim",
    "slim_checkpoint",
    "verify_slim",
    "write_card",
]
