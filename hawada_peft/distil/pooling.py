"""Embeddings of whole examples: hidden states pooled over the tokens, and how far two models' are apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..errors import HawAdaError


def pooled_mean(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over tokens: (batch, hidden) of (batch, seq, hidden) and (batch, seq)."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def pooled_first(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The first token that is no padding, `[CLS]` of encoders; shapes as in `pooled_mean`."""
    return states[:, 0] if mask is None else _picked(states, mask.to(torch.int8).argmax(1))


def pooled_last(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The last token that is no padding, on whichever side that is; shapes as in `pooled_mean`."""
    return (
        states[:, -1] if mask is None else _picked(states, mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1))
    )


def _picked(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), places]


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "mean": pooled_mean,
    "cls": pooled_first,
    "last": pooled_last,
}
"""How the states of the tokens become one embedding, by the names that people use."""


def cosine_distance(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, *, pooling: str = "mean"
) -> torch.Tensor:
    """
    `1 - cos` of the pooled embeddings, averaged over examples: half the squared distance of the normalised ones, which
    is what sentence embeddings are distilled by (Reimers and Gurevych, "Making Monolingual Sentence Embeddings
    Multilingual using Knowledge Distillation", 2020, without the normalisation).

    Args:
        student: hidden states, (batch, seq, hidden); gradients flow to them alone.
        teacher: of the same shape.
        mask: (batch, seq), nonzero where there is a token; all if left out. Examples without one count as 1.
        pooling: one of `POOLINGS`.

    Returns:
        (), float32 or wider.

    Raises:
        HawAdaError: if these are no hidden states of tokens.
    """
    if student.ndim != 3 or student.shape != teacher.shape or student.shape[-1] < 2:
        raise HawAdaError(
            "embeddings are pooled of hidden states, (batch, tokens, hidden), of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: give embedding_weight=0 for outputs of another kind"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    pool = POOLINGS[pooling]
    ours, theirs = (pool(states.to(dtype), mask) for states in (student, teacher.detach()))
    return 1 - functional.cosine_similarity(ours, theirs, dim=-1).mean()
