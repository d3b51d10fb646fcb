"""What the demo slims: two models and their data, as rows of one table. The rest of the demo has one way for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.toy import ToyClock
from .data import VOCABULARY, WINDOW, Data, load_digits, load_topics
from .measure import accuracy, perplexity

SEARCH_FILE = "search.json"
"""What the search for a task's shape looked at."""


@dataclass(frozen=True)
class Schedule:
    """Steps, examples per step and peak learning rate (after a tenth of the steps; cosine to 0) of one training."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Work:
    """
    How long one run of the demo works.

    Args:
        teacher, gates: the two trainings.
        calibration: batches for the importance of the gates.
        evaluation: how many of them the search closes gates on.
        search: how hard the search for the shape looks and measures.
        final: timed forward passes of each model for the table that is printed.
    """

    teacher: Schedule
    gates: Schedule
    calibration: int
    evaluation: int
    search: Effort
    final: Effort


@dataclass(frozen=True)
class Task:
    """
    One model, its data, and how its quality is told.

    Args:
        name, title: of its folder; in the table.
        auto_class: loads its folders.
        processor_class: loads its tokenizer, if it has one.
        build: the untrained model.
        load: its data.
        quality: of logits and labels of the held-out examples; `quality_name` and `held_out` say what that is.
        budget: what the slim model may cost, on this machine and one thread.
        full, quick: how long to work.
    """

    name: str
    title: str
    auto_class: Any
    processor_class: Any
    build: Callable[[], PreTrainedModel]
    load: Callable[[], Data]
    quality: Callable[[torch.Tensor, torch.Tensor], float]
    quality_name: str
    held_out: str
    budget: LatencyBudget
    full: Work
    quick: Work


def build_vit() -> PreTrainedModel:
    """A ViT that sees a scan as 16 patches of 2x2."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,  # type: ignore[call-arg]  # a field of every config, which the stub leaves out
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=256,
        initializer_range=0.1,  # the usual 0.02 takes several times the steps at this width
    )
    return ViTForImageClassification(config)


def build_llama() -> PreTrainedModel:
    """A Llama with 8 query heads in 4 KV groups."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=384,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


FULL: dict[str, Any] = {
    "calibration": 32,
    "evaluation": 4,
    "search": Effort(
        min_rounds=6,
        max_rounds=20,
        max_seconds=2.0,
        attention_sizes=4,
        ffn_sizes=4,
        whole_shapes=4,
        depth=4,
        candidates=3,
        search_rounds=6,
        instances=2,
        cache=False,
    ),
    "final": Effort(min_rounds=21, max_rounds=21),
}
REHEARSAL = Effort.quick(clock=ToyClock(), cache=False)
"""The quick demo shows the way, not a speed: it is the same on every machine, however busy."""

QUICK: dict[str, Any] = {"calibration": 8, "evaluation": 1, "search": REHEARSAL, "final": REHEARSAL}

DIGITS = Task(
    name="digits",
    title="ViT on digits",
    auto_class=AutoModelForImageClassification,
    processor_class=None,
    build=build_vit,
    load=load_digits,
    quality=accuracy,
    quality_name="accuracy in %",
    held_out="held-out scans",
    budget=LatencyBudget(speedup=1.5, batch_size=64, mode="forward"),
    full=Work(Schedule(200, 64, 2e-3), Schedule(200, 32, 0.2), **FULL),
    quick=Work(Schedule(80, 32, 2e-3), Schedule(40, 32, 0.2), **QUICK),
)

TOPICS = Task(
    name="topics",
    title="Llama on topics",
    auto_class=AutoModelForCausalLM,
    processor_class=AutoTokenizer,
    build=build_llama,
    load=load_topics,
    quality=perplexity,
    quality_name="perplexity",
    held_out=f"held-out windows of {WINDOW} tokens",
    budget=LatencyBudget(speedup=1.5, batch_size=8, seq_len=WINDOW, mode="forward"),
    full=Work(Schedule(400, 8, 3e-3), Schedule(100, 8, 0.1), **FULL),
    quick=Work(Schedule(150, 3, 1e-2), Schedule(30, 4, 0.1), **QUICK),
)

TASKS = {task.name: task for task in (DIGITS, TOPICS)}
