"""A vanilla model whose attention heads are narrower: fewer features in each, along directions of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from ...discovery.inputs import example_inputs
from ...errors import IllegalShapeError
from ...planning.plan import Plan
from ...progress import Progress
from ...surgery.conformity import check_conforms, vanilla_tensors
from ...surgery.cutting import Cutting
from ...surgery.slimming import finish
from ...surgery.source import build_tied
from ...vanilla.batches import Batch
from ...vanilla.family import Layout, locate, relocate
from ...vanilla.modules import check_loaded, check_no_adapters, check_unquantized
from ...vanilla.outputs import output_of
from ..proof import ROUNDING
from ..tiny import tiny_copy
from .maps import narrow_attention
from .moments import HeadMoments, by_head, collect_head_moments
from .projections import Projections, attentions, build_narrow, find_projections, refused

Model = TypeVar("Model", bound=PreTrainedModel)


def narrow_heads(
    model: Model, calibration: Iterable[Batch], head_dim: int, *, progress: Progress | None = None
) -> Model:
    """
    A new vanilla model of the same class with all of its heads, each of fewer features, and its `config.head_dim`.

    Without rotary positions a head's queries and keys are known up to an invertible map, and so are its values. Each
    head keeps the directions of these that matter most on calibration batches (`narrow_attention`); nothing is
    trained. At the full size the model computes the same.

    Args:
        model: a dense vanilla model, left as it is.
        calibration: batches, keyword arguments of the forward pass; as many positions as a layer's heads have features
            together or more. Labels are not used.
        head_dim: features of each head, at most those that it has.
        progress: makes a progress bar, as `tqdm.tqdm`; none is shown if left out.

    Returns:
        A model of the same class in the same mode, on the same device: a base like any other.

    Raises:
        UnsupportedModelError: if it is not exact for the model, with the reason: rotary positions, norms of queries or
            keys, keys that heads share, a class that derives the size of a head; if the model has adapters in it, or
            quantized or offloaded weights.
        IllegalShapeError: if `head_dim` is no whole number from 1 to the model's.
        HawAdaError: if the batches hold too few positions, or something on them is not finite.

    Example:

        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(
        ...     hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, image_size=16
        ... )
        >>> narrow = narrow_heads(ViTModel(config), [{"pixel_values": torch.randn(32, 3, 16, 16)}], head_dim=4)
        >>> narrow.config.head_dim, narrow.config.num_attention_heads
        (4, 4)
    """
    check_no_adapters(model, "narrow_heads")
    check_loaded(model)
    check_unquantized(model)
    layout = locate(model)
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or not 1 <= head_dim <= layout.head_dim:
        raise IllegalShapeError(
            f"head_dim must be a whole number from 1 to {layout.head_dim}, the model's, got {head_dim!r}"
        )
    check_conforms(layout, vanilla_tensors(model))
    projections = find_projections(layout)
    check_narrow(layout, projections, head_dim)
    moments = collect_head_moments(model, layout, projections, calibration, progress=progress)
    return _narrowed(model, layout, projections, moments, head_dim)


def check_narrow(layout: Layout, projections: Projections, head_dim: int) -> None:
    """
    Check that heads of a size are exact where they can be: on a tiny copy whose heads use no more directions.

    Args:
        layout: the dense model's, with its class and config.
        projections: of its attention.
        head_dim: features of the new heads.

    Raises:
        UnsupportedModelError: if the narrower copy differs, or the class builds something else; with the reason.
    """
    difference = layout.once(("heads", head_dim), lambda: narrow_error(layout, projections, head_dim))
    if difference > ROUNDING:
        raise refused(
            layout,
            f"a tiny copy that needs {head_dim} features per head differs by {difference:.2g} of its largest output "
            f"from the one that has no more, as where scores are not divided by the root of the head's size",
        )


def narrow_error(layout: Layout, projections: Projections, head_dim: int) -> float:
    """What narrower heads change in the outputs of a tiny copy that needs no wider ones, relative to the largest."""
    tiny = tiny_copy(layout, torch.float64, every_kind=True)
    small = relocate(layout, tiny)
    mine = replace(projections, layers=tuple(attentions(tiny, small, projections.out)))
    moments = _reduce_rank(tiny, small, mine, head_dim)
    inputs = example_inputs(tiny)
    expected = output_of(tiny, inputs)
    found = output_of(_narrowed(tiny, small, mine, moments, head_dim), inputs)
    return float((found - expected).abs().max() / expected.abs().max())


def _reduce_rank(model: PreTrainedModel, layout: Layout, projections: Projections, rank: int) -> HeadMoments:
    """
    Make heads of a tiny copy, in place, use `rank` directions of their features, drawn at random.

    Returns:
        Their moments on inputs that are all alike in every direction.
    """
    generator = torch.Generator().manual_seed(0)
    heads, size = layout.dense.sizes()["num_attention_heads"], layout.head_dim
    moments: list[tuple[torch.Tensor, ...]] = []
    for layer in projections.layers:
        found = []
        for name in (projections.query, projections.key, projections.value):
            module = model.get_submodule(f"{layout.stack}.{layer}.{name}")
            draw = torch.randn(heads, size, rank, generator=generator, dtype=torch.float64)
            onto = torch.block_diag(*(each @ each.mT for each in torch.linalg.qr(draw).Q))
            for parameter in module.parameters():
                parameter.data = onto @ parameter.data
            weight, bias = module.get_parameter("weight").data, module._parameters.get("bias")
            found.append((weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.data))
        (query, query_bias), (key, _), (value, mean) = found
        whole = (query @ query.T + torch.outer(query_bias, query_bias), key @ key.T)
        moments.append((*(by_head(each, heads) for each in whole), value @ value.T, mean))
    return HeadMoments(*map(torch.stack, zip(*moments, strict=True)))


def _narrowed(model: Model, layout: Layout, projections: Projections, moments: HeadMoments, head_dim: int) -> Model:
    """The model with other heads, strictly loaded into what its class builds."""
    dense = vanilla_tensors(model)
    made: dict[str, torch.Tensor] = {}
    names = (projections.query, projections.key, projections.value, projections.out)
    for place, layer in enumerate(projections.layers):
        full = [f"{layout.stack}.{layer}.{name}" for name in names]
        given = [(dense[f"{name}.weight"], dense.get(f"{name}.bias")) for name in full]
        for name, pair in zip(full, narrow_attention(moments, place, given, head_dim), strict=True):
            for which, tensor in zip(("weight", "bias"), pair, strict=True):
                if tensor is not None:
                    made[f"{name}.{which}"] = tensor.to(dense[f"{name}.{which}"]).contiguous()
    config = build_narrow(layout, head_dim).config
    result = build_tied(type(model), config, dense)
    state: dict[str, torch.Tensor] = {}
    done: dict[int, torch.Tensor] = {}  # what the class ties stays one tensor
    for name, place in result.state_dict(keep_vars=True).items():
        if id(place) not in done:
            done[id(place)] = made[name] if name in made else dense[name].data.clone()
        if done[id(place)].shape != place.shape:
            raise refused(
                layout, f"{name!r} is {tuple(place.shape)} in its class, and {tuple(done[id(place)].shape)} is needed"
            )
        state[name] = done[id(place)]
    result.load_state_dict(state, strict=True, assign=True)
    plan = Plan.keep_all(layout.dense, layout.tower)
    return finish(model, result, Cutting([(layout, plan)]), plan.sizes)
