"""The proof that channels of the residual stream can go, with the heads that follow it: done on a tiny copy."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import torch
from torch import nn

from ..discovery.inputs import example_inputs
from ..errors import UnsupportedModelError
from ..gates.adapter import HIDDEN_UNITS, UNITS, GateAdapter
from ..gates.concrete import AttentionHeadAdapter
from ..gates.hidden import HiddenAdapter
from ..gates.kinds import GateStart, HeadGate
from ..gates.placement import set_masks, share_hidden, stream_gate
from ..planning.plan import Plan
from ..surgery.slimming import slim
from ..surgery.stream_masks import mask_readers
from ..vanilla.family import Layout, hidden_home, locate_stream
from ..vanilla.legality import build_sizes
from ..vanilla.outputs import outputs_of
from .proof import ROUNDING
from .tiny import tiny_copy

ADAPTER = "default"


def check_channels(layout: Layout) -> None:
    """
    Check that a model whose gates close channels of the residual stream computes what the slim model does.

    Args:
        layout: the dense model's, with its class and config.

    Raises:
        UnsupportedModelError: if it does not, or no tiny copy has a smaller stream; with the reason.
    """
    difference = layout.once("channels", lambda: channels_error(layout))
    if difference > ROUNDING:
        raise UnsupportedModelError(
            f"channels of the residual stream of {layout.model_class.__name__} cannot go: a tiny copy that keeps half "
            f"of them differs by {difference:.2g} of its largest output from the slim model of the same plan. "
            "Something reads the stream past the norms that were found. Leave 'hidden' out of the config's `gates`."
        )


def channels_error(layout: Layout, seed: int = 0) -> float:
    """
    What a tiny copy computes under a plan and what the slim model of that does, relative to the largest output.

    Raises:
        UnsupportedModelError: if no tiny copy has a smaller stream.
    """
    dense = tiny_copy(layout, torch.float64)
    small = locate_stream(dense)
    plan = _plan(small, random.Random(seed))
    gated = copy.deepcopy(dense)
    _attach(gated, small)
    set_masks(gated, [(small, plan)], ADAPTER)
    inputs = example_inputs(dense)
    expected, found = outputs_of(gated, inputs), outputs_of(slim(dense, plan), inputs)
    return max(_difference(found[name], expected[name], plan.hidden or ()) for name in found)


def _plan(layout: Layout, draw: random.Random) -> Plan:
    """Half of the channels, and where heads follow them half of these in every layer, at random."""
    total, sizes = layout.hidden_size, layout.dense.sizes()
    for size in (total // 2, total // 4 * 3, *range(total - 1, 0, -1)):
        shape = layout.narrowed(size)
        if 0 < size < total and layout.norms and build_sizes(layout, shape) is None:
            break
    else:
        raise UnsupportedModelError(
            f"no tiny {layout.model_class.__name__} has fewer channels in its residual stream, on which it could be "
            "proved that they can go. Leave 'hidden' out of the config's `gates`."
        )
    count, layers = shape.sizes()["num_attention_heads"], sizes["num_hidden_layers"]
    every = range(sizes["num_attention_heads"])
    return Plan(
        dense=replace(layout.full, num_experts=None, head_dim=None),
        layers=tuple(range(layers)),
        heads=tuple(tuple(sorted(draw.sample(every, count))) for _ in range(layers)),
        channels=(tuple(range(sizes["intermediate_size"])),) * layers,
        hidden=tuple(sorted(draw.sample(range(total), size))),
        tower=layout.tower,
    )


def _attach(model: nn.Module, layout: Layout) -> None:
    """The adapters on the stream, and on heads where these follow it."""
    gate = stream_gate(layout, centred=None, group_size=1, start=GateStart())
    for name in layout.norms:
        gates = {HIDDEN_UNITS: gate} if name == hidden_home(layout) else {}
        model.set_submodule(name, HiddenAdapter(model.get_submodule(name), ADAPTER, gates=gates))
    share_hidden(model, layout)
    mask_readers(model, layout)
    if layout.family.heads_follow:
        heads = layout.dense.sizes()["num_attention_heads"]
        for layer in range(layout.dense.sizes()["num_hidden_layers"]):
            name = layout.attention_out(layer)
            adapter: GateAdapter = AttentionHeadAdapter(
                model.get_submodule(name), ADAPTER, gates={UNITS: HeadGate(heads, layout.head_dim, relative=True)}
            )
            model.set_submodule(name, adapter)
    model.eval()


def _difference(found: torch.Tensor, expected: torch.Tensor, hidden: tuple[int, ...]) -> float:
    if found.shape != expected.shape:
        if found.shape[-1] != len(hidden) or expected.shape[-1] <= max(hidden):
            return float("inf")
        expected = expected[..., list(hidden)]
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
