"""For whoever ships: slim folders with card and report, their checks, what runs them, the Hub."""

from .calibrated import slim_calibrated
from .checkpoint import SlimCheckpoint, slim_checkpoint
from .checks import Check, Checks, check_slim
from .facts import ExportFacts, QualityChange, calibration_facts
from .hub import push_to_hub
from .passport import PassportLine
from .runtimes import check_compile, check_onnx
from .save import save_slim
from .write import write_card

__all__ = [
    "Check",
    "Checks",
    "ExportFacts",
    "PassportLine",
    "QualityChange",
    "SlimCheckpoint",
    "calibration_facts",
    "check_compile",
    "check_onnx",
    "check_slim",
    "push_to_hub",
    "save_slim",
    "slim_calibrated",
    "slim_checkpoint",
    "write_card",
]
