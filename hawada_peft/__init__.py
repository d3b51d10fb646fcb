"""
Hardware-aware slimming of Hugging Face models, as a PEFT tuner. Importing it registers the tuner, nothing else.

Here is what the main way needs. The folders hold more, each for an audience of its own: `basis`, `gates`,
`latency`, `discovery`, `planning`, `search`, `distil`, `surgery`, `refit`, `shipping`, `page`, `recipes`, `vanilla`.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from .lazy import names_of

if TYPE_CHECKING:
    from .basis.find import init_basis as init_basis
    from .basis.rotation import rotate as rotate
    from .config import HawAdaConfig as HawAdaConfig
    from .discovery.inspected import inspect as inspect
    from .distil.recovery import recover as recover
    from .distil.trainer import DistillTrainer as DistillTrainer
    from .gates.attach import attach_adapters as attach_adapters
    from .gates.attach import collect_gates as collect_gates
    from .latency.budget import LatencyBudget as LatencyBudget
    from .latency.effort import Effort as Effort
    from .model import HawAdaModel as HawAdaModel
    from .page.write import write_report as write_report
    from .planning.plan import Plan as Plan
    from .race.race import Race as Race
    from .recipes.run import train_recipe as train_recipe
    from .search.budgeted import find_plan as find_plan
    from .search.result import SearchResult as SearchResult
    from .shipping.checkpoint import slim_checkpoint as slim_checkpoint
    from .shipping.facts import ExportFacts as ExportFacts
    from .shipping.facts import QualityChange as QualityChange
    from .shipping.save import Slimmed as Slimmed
    from .shipping.save import save_slim as save_slim
    from .shipping.verify import verify_slim as verify_slim
    from .surgery.slimming import slim as slim
    from .training.arguments import GateTrainingArguments as GateTrainingArguments
    from .training.start import init_gates as init_gates
    from .training.trainer import HawAdaTrainer as HawAdaTrainer
    from .vanilla.family import Family as Family
    from .vanilla.family import register_family as register_family
    from .vanilla.shape import Shape as Shape
else:
    __getattr__, __dir__ = names_of(__name__, __file__)

__version__ = version("hawada_peft")

if not getattr(sys.modules.get("hawada_command"), "starting", False):
    import_module(".registered", __name__)

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
