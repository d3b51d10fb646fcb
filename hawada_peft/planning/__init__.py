"""From gates to a plan: how much the loss depends on each, and which units of a legal shape stay."""

from .importance import gate_importance
from .plan import Plan
from .router_weighted import expert_outputs

__all__ = [
    "Plan",
    "expert_outputs",
    "gate_importance",
]
