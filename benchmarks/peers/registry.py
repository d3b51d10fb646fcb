"""The peers of the frontier bench, by the names that its command line takes."""

from __future__ import annotations

from .ancestor import ANCESTOR
from .flap import FLAP
from .llm_pruner import LLM_PRUNER
from .minitron import MINITRON_DEPTH, MINITRON_WIDTH
from .peer import Peer
from .replaceme import REPLACEME
from .shortgpt import SHORTGPT
from .slicegpt import SLICEGPT
from .wanda_sp import WANDA_SP
from .with_torch_pruning import TORCH_PRUNING_PEERS

PEERS: dict[str, Peer] = {
    "flap": FLAP,
    "wanda_sp": WANDA_SP,
    "llm_pruner": LLM_PRUNER,
    "minitron_width": MINITRON_WIDTH,
    "minitron_depth": MINITRON_DEPTH,
    "shortgpt": SHORTGPT,
    "replaceme": REPLACEME,
    "slicegpt": SLICEGPT,
    "ancestor": ANCESTOR,
    **TORCH_PRUNING_PEERS,
}
