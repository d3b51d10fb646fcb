"""From calibration batches to bases inside of heads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ...progress import Progress
from ...surgery.source import below_at
from ...vanilla.batches import Batch
from ...vanilla.family import locate
from .maps import attention_maps
from .moments import collect_head_moments
from .projections import find_projections
from .turn import HeadBasis


def find_in_heads(
    model: PreTrainedModel, calibration: Iterable[Batch], *, progress: Progress | None = None
) -> HeadBasis:
    """
    Find bases of each head's features in descending order of importance (`attention_maps`). The model is left as it
    is. One pass, without gradients.

    Args:
        model: a dense model, on any device; adapters in it are to be off.
        calibration: batches, keyword arguments of the forward pass; as many positions as a layer's heads have features
            together or more. Labels are not used.
        progress: makes a progress bar, as `tqdm.tqdm`; none is shown if left out.

    Raises:
        UnsupportedModelError: as `find_projections`.
        HawAdaError: if the batches hold too few positions, or something on them is not finite.
    """
    layout = locate(model)
    projections = find_projections(layout)
    moments = collect_head_moments(model, layout, projections, calibration, progress=progress)
    found = []
    for place, layer in enumerate(projections.layers):
        out = below_at(model, f"{layout.stack}.{layer}.{projections.out}")
        found.append(attention_maps(moments, place, (out.get_parameter("weight"), out._parameters.get("bias"))))
    return HeadBasis(*(torch.stack(each).float() for each in zip(*found, strict=True)))
