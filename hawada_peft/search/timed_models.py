"""Real models of any shape with random weights: what is timed before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import IllegalShapeError
from ..latency.regime import Regime
from ..vanilla.family import Layout, mark
from ..vanilla.resize import edit_config
from ..vanilla.shape import Shape

SPREAD = 0.02
"""Random weights are uniform in (-SPREAD, SPREAD)."""

DRAWN = 2**20
"""Of a tensor as many are drawn."""


def realiser(layout: Layout, regime: Regime) -> Callable[[Shape], PreTrainedModel]:
    """
    A function that builds a model of a shape with random weights, in the regime's dtype on its device.

    Args:
        layout: the dense model's, with its class and config.
        regime: where to.

    Returns:
        A function of a complete `Shape`; it raises `IllegalShapeError` on sizes that the config class refuses. Random
        number generators are left as they were.
    """
    build = realiser_of([layout], regime)
    return lambda shape: build([shape])


def realiser_of(layouts: Sequence[Layout], regime: Regime) -> Callable[[Sequence[Shape]], PreTrainedModel]:
    """
    As `realiser`, for several towers of one model.

    Args:
        layouts: of the towers.
        regime: where to.

    Returns:
        A function of a complete `Shape` for each of them.
    """
    device, model_class = torch.device(regime.device), layouts[0].model_class

    def build(shapes: Sequence[Shape]) -> PreTrainedModel:
        config = layouts[0].config
        try:
            for layout, shape in zip(layouts, shapes, strict=True):
                config = edit_config(replace(layout, config=config), shape)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                with device, no_init_weights():
                    built = model_class._from_config(config, dtype=regime.torch_dtype)
                for tensor in (*built.parameters(), *_saved_buffers(built)):
                    _fill(tensor.data)
        except (StrictDataclassError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            sizes = "; ".join(str(shape.to_dict()) for shape in shapes)
            raise IllegalShapeError(f"{type(config).__name__} refuses {sizes}: {reason}") from None
        for number, (layout, shape) in enumerate(zip(layouts, shapes, strict=True)):
            mark(built, layout, range(shape.sizes()["num_hidden_layers"]), beside=number > 0)
        return built.eval()

    return build


def _fill(values: torch.Tensor) -> None:
    """Random numbers, the same again after every `DRAWN`: copies are several times quicker than draws."""
    flat = values.view(-1)
    flat[:DRAWN].uniform_(-SPREAD, SPREAD)
    whole = len(flat) // DRAWN * DRAWN
    if whole > DRAWN:
        flat[DRAWN:whole].view(-1, DRAWN).copy_(flat[:DRAWN].expand(whole // DRAWN - 1, DRAWN))
    if len(flat) > whole >= DRAWN:
        flat[whole:].copy_(flat[: len(flat) - whole])


def _saved_buffers(model: PreTrainedModel) -> list[torch.Tensor]:
    state = model.state_dict(keep_vars=True).values()
    return [tensor for tensor in state if not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()]
