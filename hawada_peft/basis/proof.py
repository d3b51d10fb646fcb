"""The proof that a model's residual stream can be rotated: done on a tiny copy, and compared."""

from __future__ import annotations

import torch

from ..discovery.inputs import example_inputs
from ..errors import UnsupportedModelError
from ..gates.bases import WIDTHS, helmert
from ..planning.plan import Plan
from ..surgery.slimming import slim
from ..vanilla.family import Layout, locate
from ..vanilla.outputs import output_of
from .basis import Basis, turn_of
from .marks import is_centred
from .tiny import tiny_copy

ROUNDING = 1e-5
"""The largest difference, of the largest output, that is rounding: many norms compute in float32 whatever they get."""


def check_exact(layout: Layout) -> None:
    """
    Check that rotating the residual stream leaves the model as it is, by rotating a tiny copy at random.

    Args:
        layout: the dense model's, with its class and config.

    Raises:
        UnsupportedModelError: if it does not, or a parameter's part in the stream is not known; with the reason.
    """
    if layout.family.heads_follow:
        raise UnsupportedModelError(
            f"the size of a head is derived in {layout.model_class.__name__}: channels of its residual stream go with "
            "heads, as they are. Leave out `rotate`."
        )
    difference = rotation_error(layout)
    if difference > ROUNDING:
        raise UnsupportedModelError(
            f"the residual stream of model_type={layout.model_type!r} cannot be rotated exactly: a rotated tiny copy "
            f"differs by {difference:.2g} of its largest output. A norm between a block and the stream, or something "
            "that reads the stream past the row's norms, does that. Cut channels as they are: leave out `rotate`."
        )


def rotation_error(layout: Layout, seed: int = 0) -> float:
    """What a random rotation of a tiny copy changes in its outputs at most, relative to the largest output."""
    tiny = tiny_copy(layout, torch.float64)
    small = locate(tiny)
    centred, size = is_centred(tiny, small), small.hidden_size
    draw = torch.randn(
        size - centred, size - centred, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    vectors = torch.linalg.qr(draw).Q
    if centred:
        vectors = torch.cat([vectors.new_full((size, 1), size**-0.5), helmert(size) @ vectors], 1)
    sites = len(small.norms)
    basis = Basis(vectors, torch.ones(len(WIDTHS), sites), torch.zeros(sites), centred)
    turn = turn_of(tiny, small, basis)
    inputs = example_inputs(tiny)
    expected = output_of(tiny, inputs)
    found = output_of(slim(tiny, Plan.keep_all(small.dense), turn=turn), inputs)
    if tiny is tiny.base_model:  # its outputs are in the new coordinates
        found = turn.restored(tiny, found)
    return float((found - expected).abs().max() / expected.abs().max())
