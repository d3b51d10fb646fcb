"""From calibration batches to a basis of the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import HawAdaError, UnsupportedModelError
from ..gates.bases import helmert
from ..gates.reading import head_maps
from ..processes import in_main_process
from ..progress import Progress
from ..vanilla.batches import Batch
from ..vanilla.family import Layout, locate
from ..vanilla.mode import adapters_off
from .bases import Bases
from .basis import Basis, basis_gate
from .heads.find import find_in_heads
from .heads.turn import set_in_heads
from .marks import check_unshared, is_centred, stream_norms, weight_marks
from .moments import Moments, collect_moments
from .refine import pooled, principal_directions, refined
from .scales import fit_scales


def find_basis(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Basis:
    """
    Find the directions of the residual stream in descending order of importance. The model is left as it is.

    They start as the principal directions of what the norms that read the stream pass on, every norm counted alike,
    and are turned to where the loss's gradients say that an error costs least (`refined`). One pass over the
    calibration batches has gradients; on some of them the norms' factors are then fitted at a few widths.

    Args:
        model: a dense vanilla model, on any device.
        calibration: batches, keyword arguments of the forward pass. Labels are not used.
        seed: of the targets drawn from the model's predictions.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        HawAdaError: if there are no batches, they do not span the stream, or something on them is not finite.
        UnsupportedModelError: if the family's row names no norms through which the stream is read, or weights are
            shared that it does not know of.

    References:
        Ashkboos et al., "SliceGPT" (2024), for the rotation; the metric of gradients is that of the Fisher
        information, as in Hassibi and Stork, "Optimal Brain Surgeon" (1993), with input and gradient independent
        (Martens and Grosse, "K-FAC", 2015).
    """
    batches, layout = list(calibration), locate(model)
    check_unshared(model)
    moments = collect_moments(model, layout, batches, seed=seed, progress=progress)
    centred = is_centred(model, layout)
    vectors = directions_of(moments, layout, centred, progress)
    scales = fit_scales(model, layout, batches, vectors, centred=centred, progress=progress)
    marks = weight_marks([norm.weight for norm in cast(Any, stream_norms(model, layout))])
    return Basis(vectors, scales, marks, centred)


def init_basis(
    model: PeftModel,
    calibration: Iterable[Batch],
    *,
    seed: int = 0,
    adapter_name: str | None = None,
    progress: Progress | None = None,
) -> Bases:
    """
    Give an adapter its bases, found on calibration batches: the gates on the residual stream the one that they act in
    (`find_basis`), and heads those in which their size is cut (`find_in_heads`).

    In a training of several processes each has to call this, and the first one's batches decide.

    Args:
        model: with an adapter of `HawAdaConfig(gates=(..., "hidden"), rotate=True)`, or `narrow_heads=True`, or both.
        calibration: as in `find_basis`.
        seed: as in `find_basis`.
        progress: as in `find_basis`.
        adapter_name: whose; that of the active adapter if left out.

    Returns:
        `Bases`: which are saved with the adapter.

    Raises:
        HawAdaError: as `find_basis` and `find_in_heads`, and if the adapter has no place for a basis.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    name, batches, layout = adapter_name or model.active_adapter, list(calibration), locate(base)
    gate, in_heads = basis_gate(base, layout, name), bool(head_maps(base, layout, name))
    if gate is None and not in_heads:
        raise UnsupportedModelError(
            f"adapter {name!r} has no gates in a basis of the residual stream, nor bases inside of heads: make it "
            'with HawAdaConfig(gates=(..., "hidden"), rotate=True), or narrow_heads=True'
        )

    def find() -> Bases:
        stream = None if gate is None else find_basis(base, batches, seed=seed, progress=progress)
        return Bases(stream, find_in_heads(base, batches, progress=progress) if in_heads else None).cpu()

    with adapters_off(model):
        bases = in_main_process(find)
    if gate is not None and bases.stream is not None:
        gate.set_basis(bases.stream.vectors, bases.stream.scales, bases.stream.marks)
    if bases.heads is not None:
        set_in_heads(base, layout, name, bases.heads)
    return bases


def ensure_basis(model: PeftModel, calibration: Iterable[Batch]) -> None:
    """`init_basis` for the active adapters that have a place for a basis and none there yet."""
    base = cast(PreTrainedModel, model.get_base_model())
    for name in model.active_adapters:
        placed = model.peft_config[name].to_dict()["base_sizes"] is not None  # by a family row
        layout = locate(base)
        gate = basis_gate(base, layout, name) if placed else None
        maps = head_maps(base, layout, name) if placed else []
        if (gate is not None and not gate.marks.any()) or (maps and not maps[0][1].found):
            init_basis(model, calibration, adapter_name=name)


def directions_of(moments: Moments, layout: Layout, centred: bool, progress: Progress | None = None) -> torch.Tensor:
    """
    The directions of a stream in descending order of importance, by its moments: (features, units).

    Without gradients they are the principal ones.

    Args:
        moments: of the stream.
        layout: of the model.
        centred: whether LayerNorms read it: then the mean comes first.
        progress: makes a progress bar.

    Raises:
        HawAdaError: if the moments are of fewer positions than there are directions.
    """
    stream, size = moments.stream, layout.hidden_size
    frame = torch.eye(size, dtype=stream.dtype, device=stream.device)
    if centred:
        frame = helmert(size, dtype=torch.float64).to(stream)
    inside = frame.T @ stream @ frame
    _check_span(inside, moments.positions)
    found = frame @ principal_directions(inside)
    if moments.gradient is not None:
        found = refined(found, stream, moments.gradient, progress=progress)
    if centred:
        found = torch.cat([found.new_full((size, 1), size**-0.5), found], 1)
    return found


def _check_span(inside: torch.Tensor, positions: int) -> None:
    """Each norm sees `positions` vectors: fewer than directions say nothing about some of them."""
    units = inside.shape[1]
    if positions < units:
        values = torch.linalg.eigvalsh(pooled(inside))
        spanned = int((values > units * torch.finfo(values.dtype).eps * values[-1]).sum())
        raise HawAdaError(
            f"the calibration batches hold {positions} positions, which over all norms span {spanned} of the {units} "
            f"directions of the residual stream: give batches of {units} positions (tokens, patches) or more, better "
            "several times that"
        )
