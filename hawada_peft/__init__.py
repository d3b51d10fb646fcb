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
from .calibrated import slim_calibrated
from .config import HawAdaConfig
from .export import (
    ExportFacts,
    PassportLine,
    Plan,
    QualityChange,
    SearchEffort,
    SearchResult,
    SlimCheckpoint,
    Verification,
    calibration_facts,
    check_compile,
    check_onnx,
    push_to_hub,
    save_slim,
    slice_conv,
    slice_embedding,
    slice_linear,
    slim,
    slim_checkpoint,
    verify_slim,
    write_card,
)
from .export.find_plan import find_plan, measure_table
from .export.reconstruct import Reconstruction, reconstruct
from .export.rehome import rehome
from .latency import LatencyBudget, LatencyTable, Regime, Timing, measure_many
from .model import HawAdaModel
from .recipes import Recipe, RecipeResult, train_recipe
from .report import WrittenReport, write_report
from .training import DistillTrainer, HawAdaTrainer, get_student_logits, get_teacher_logits, init_gates, recover

__version__ = version("hawada_peft")

register(HawAdaConfig, HawAdaModel)

__all__ = [
    "AttentionHeadAdapter",
    "BlockAdapter",
    "BlockGate",
    "ChannelAdapter",
    "ChannelGate",
    "DistillTrainer",
    "ExportFacts",
    "Family",
    "GateAdapter",
    "HawAdaConfig",
    "HawAdaModel",
    "HawAdaTrainer",
    "HeadGate",
    "LatencyBudget",
    "LatencyTable",
    "PassportLine",
    "Plan",
    "QualityChange",
    "Recipe",
    "RecipeResult",
    "Reconstruction",
    "Regime",
    "SearchEffort",
    "SearchResult",
    "Shape",
    "SigmoidGate",
    "SlimCheckpoint",
    "Timing",
    "Verification",
    "WrittenReport",
    "attach_adapters",
    "calibration_facts",
    "check_compile",
    "check_onnx",
    "collect_gates",
    "detach_adapters",
    "find_plan",
    "get_student_logits",
    "get_teacher_logits",
    "init_gates",
    "is_attention_layer",
    "is_ffn_layer",
    "measure_many",
    "measure_table",
    "push_to_hub",
    "reconstruct",
    "recover",
    "register_family",
    "rehome",
    "save_slim",
    "slice_conv",
    "slice_embedding",
    "slice_linear",
    "slim",
    "slim_calibrated",
    "slim_checkpoint",
    "train_recipe",
    "verify_slim",
    "write_card",
    "write_report",
]
