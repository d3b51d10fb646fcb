"""Hardware-aware slimming of Hugging Face models, as a PEFT tuner. Importing it registers the tuner, nothing else."""

from importlib.metadata import version

from ._register import register
from .config import HawAdaConfig
from .distil.divergence import get_teacher_logits
from .distil.recovery import recover
from .distil.trainer import DistillTrainer
from .files.verify import Verification, verify_slim
from .gates.adapter import GateAdapter
from .gates.attach import attach_adapters, collect_gates, detach_adapters, is_attention_layer, is_ffn_layer
from .gates.concrete import AttentionHeadAdapter, BlockAdapter, ChannelAdapter
from .gates.kinds import BlockGate, ChannelGate, HeadGate, SigmoidGate
from .latency.budget import LatencyBudget
from .latency.effort import Effort
from .latency.measuring import measure_many
from .latency.regime import Regime
from .latency.table import LatencyTable
from .latency.timing import Timing
from .model import HawAdaModel
from .page.write import WrittenReport, write_report
from .planning.plan import Plan
from .recipes.recipe import Recipe
from .recipes.result import RecipeResult
from .recipes.run import train_recipe
from .refit.reconstruction import Reconstruction, reconstruct
from .search.budgeted import find_plan
from .search.result import SearchResult
from .search.timed import measure_table
from .shipping.calibrated import slim_calibrated
from .shipping.checkpoint import SlimCheckpoint, slim_checkpoint
from .shipping.facts import ExportFacts, QualityChange, calibration_facts
from .shipping.hub import push_to_hub
from .shipping.passport import PassportLine
from .shipping.runtimes import check_compile, check_onnx
from .shipping.save import save_slim
from .shipping.write import write_card
from .surgery.slicing import slice_conv, slice_embedding, slice_linear
from .surgery.slimming import slim
from .training.arguments import GateTrainingArguments
from .training.start import init_gates
from .training.trainer import HawAdaTrainer
from .vanilla.family import Family, register_family
from .vanilla.outputs import get_student_logits
from .vanilla.rehoming import rehome
from .vanilla.shape import Shape

__version__ = version("hawada_peft")

register(HawAdaConfig, HawAdaModel)

__all__ = [
    "AttentionHeadAdapter",
    "BlockAdapter",
    "BlockGate",
    "ChannelAdapter",
    "ChannelGate",
    "DistillTrainer",
    "Effort",
    "ExportFacts",
    "Family",
    "GateAdapter",
    "GateTrainingArguments",
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
