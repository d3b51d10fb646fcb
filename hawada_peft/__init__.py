"""
Hardware-aware slimming of Hugging Face models, as a PEFT tuner. Importing it registers the tuner, nothing else.

Here is what the main way needs. The folders hold more, each for an audience of its own: `gates`, `latency`,
`discovery`, `planning`, `search`, `distil`, `surgery`, `refit`, `shipping`, `page`, `recipes`, `vanilla`.
"""

from importlib.metadata import version

from ._register import register
from .basis.find import init_basis
from .basis.rotation import rotate
from .config import HawAdaConfig
from .discovery.inspected import inspect
from .distil.recovery import recover
from .distil.trainer import DistillTrainer
from .gates.attach import attach_adapters, collect_gates
from .latency.budget import LatencyBudget
from .latency.effort import Effort
from .model import HawAdaModel
from .page.write import write_report
from .planning.plan import Plan
from .race.race import Race
from .recipes.run import train_recipe
from .search.budgeted import find_plan
from .search.result import SearchResult
from .shipping.checkpoint import slim_checkpoint
from .shipping.facts import ExportFacts, QualityChange
from .shipping.save import Slimmed, save_slim
from .shipping.verify import verify_slim
from .surgery.slimming import slim
from .training.arguments import GateTrainingArguments
from .training.start import init_gates
from .training.trainer import HawAdaTrainer
from .vanilla.family import Family, register_family
from .vanilla.shape import Shape

__version__ = version("hawada_peft")

register(HawAdaConfig, HawAdaModel)

__all__ = [
    "DistillTrainer",
    "Effort",
    "ExportFacts",
    "Family",
    "GateTrainingArguments",
    "HawAdaConfig",
    "HawAdaModel",
    "HawAdaTrainer",
    "LatencyBudget",
    "Plan",
    "QualityChange",
    "Race",
    "SearchResult",
    "Shape",
    "Slimmed",
    "attach_adapters",
    "collect_gates",
    "find_plan",
    "init_basis",
    "init_gates",
    "inspect",
    "recover",
    "register_family",
    "rotate",
    "save_slim",
    "slim",
    "slim_checkpoint",
    "train_recipe",
    "verify_slim",
    "write_report",
]
