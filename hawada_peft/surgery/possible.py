"""What gates on a model could be exported: what no slim model could lose is said before anything is gated."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import UnsupportedModelError
from ..vanilla.family import Layout
from ..vanilla.legality import depth_of
from ..vanilla.shape import FFN, HEADS, HIDDEN, LAYERS

DEFAULT = (HEADS, FFN, LAYERS)
"""What is gated unless something else is asked for: those of them that the model can lose."""


def exportable(layout: Layout, asked: Sequence[str]) -> list[str]:
    """
    The kinds of gates that are placed: those asked for, or, of the `DEFAULT`, those that the model can lose.

    Args:
        layout: the dense model's.
        asked: the config's `gates`.

    Raises:
        UnsupportedModelError: if something is asked for that no slim model of the class could lose, with the reason;
            or there is none of the `DEFAULT` that it could.
    """
    reasons = {kind: reason for kind in asked if (reason := why_not(layout, kind, asked))}
    if not reasons:
        return list(asked)
    if tuple(asked) == DEFAULT and len(reasons) < len(asked):
        return [kind for kind in asked if kind not in reasons]
    raise UnsupportedModelError(
        "; ".join(f"gates on {kind!r}: {reason}" for kind, reason in reasons.items())
        + ". `hawada inspect` tells what can be removed of this model"
    )


def why_not(layout: Layout, kind: str, asked: Collection[str]) -> str:
    """Why gates of a kind could not be exported; empty if they could."""
    family, name = layout.family, layout.model_class.__name__
    if kind == HEADS and not family.attention_out:
        return f"no heads of {name} were found that could go{_known(layout, HEADS)}"
    if kind == HEADS and family.heads_follow and HIDDEN not in asked:
        return (
            f"the size of a head is derived in {name}, so that heads go with channels of the residual stream alone: "
            "add 'hidden' to the config's `gates`, or leave 'heads' out"
        )
    if kind == HEADS and not family.heads_follow and not _heads_go(layout):
        more = "" if HIDDEN in asked else "add 'hidden', if channels of its residual stream can go with heads, or "
        return f"the size of a head is derived in {name}, so that no head goes alone: {more}leave 'heads' out"
    if kind == HIDDEN and family.heads_follow and HEADS not in asked:
        return (
            f"the size of a head is derived in {name}, so that channels of the residual stream go with heads alone: "
            "add 'heads' to the config's `gates`, or leave 'hidden' out"
        )
    layers = range(layout.dense.sizes()["num_hidden_layers"])
    if kind == FFN and not any(layout.ffn_out(layer) for layer in layers):
        return f"no FFN channels of {name} were found that could go{_known(layout, FFN)}"
    if kind == LAYERS:
        total, pinned = layout.dense.sizes()["num_hidden_layers"], depth_of(layout).pinned
        if len(pinned) == total:
            return f"every layer of {name} has to stay: {pinned[min(pinned)]}"
    return ""


def _known(layout: Layout, kind: str) -> str:
    """What was found of a kind and has no gates, with the reasons."""
    told = "" if layout.known is None else layout.known.ungated.get(kind, "")
    return f" by gates ({told})" if told else ""


def _heads_go(layout: Layout) -> bool:
    """Whether fewer heads are built as they are."""
    if layout.facts is None:
        return bool(layout.family.head_dim_field)
    counts = layout.facts.sizes.get(HEADS, ())
    total = layout.dense.sizes()["num_attention_heads"]
    return any(count in counts for count in range(1, total))
