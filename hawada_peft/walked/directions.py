"""The basis of the residual stream of a model that is larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..basis.basis import Basis
from ..basis.find import directions_of
from ..basis.marks import check_unshared, is_centred, weight_marks
from ..basis.moments import MOMENTS, Moments, counted, groups_of, kind_of, watching
from ..basis.proof import check_exact
from ..basis.scales import ENOUGH, FACTORS, PART, NormFits
from ..errors import UnsupportedModelError
from ..gates.hidden import plain_norm
from ..progress import Progress, progress_bar
from ..refit.layerwise import Stream
from ..vanilla.batches import Batch
from ..vanilla.family import Layout, hidden_home
from .walk import Walk, open_walk


def checkpoint_basis(
    base: str | os.PathLike[str],
    calibration: Iterable[Batch],
    *,
    device: str | None = None,
    spill: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Basis:
    """
    `find_basis` of a model that is larger than memory, by two walks through its layers, without gradients.

    Directions are the principal ones of what the norms that read the stream pass on, every norm counted alike; they
    are not turned by gradients, which would take a pass back through all layers. In the second walk the factors of
    the norms are fitted, as `fit_scales` does, on some of the batches: narrow models of a few widths go along with
    the dense one.

    Args:
        base: folder or Hub id of the dense model, with safetensors files.
        calibration: batches, keyword arguments of its forward pass; as many positions as the stream has features or
            more. Labels are not used, padding does not count.
        device: where layers are computed; the CPU if left out.
        spill: a folder on a disk for hidden states, in files without a name; they stay in memory if left out, and on
            an accelerator in its own.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `Basis`, on the CPU.

    Raises:
        HawAdaError: if there are no batches, they do not span the stream, or something on them is not finite.
        BadDataError: if a batch holds what the model cannot take.
        UnsupportedModelError: as `walk_checkpoint`; if the rotation is not exact for the model, or its stream is read
            before the first layer.

    References:
        Ashkboos et al., "SliceGPT" (2024), for the rotation.
    """
    with open_walk(base, calibration, device=device, spill=spill) as walk:
        model, layout = walk.weights.model, walk.layout
        _check_walkable(layout)
        check_unshared(model)
        check_exact(layout)
        centred = is_centred(model, layout)
        vectors = directions_of(_moments(walk, progress), layout, centred)
        scales = _scales(walk, vectors, centred, progress)
        marks = weight_marks(walk.checkpoint.whole(f"{name}.weight") for name in layout.norms)
    return Basis(vectors, scales, marks, centred).cpu()


def _check_walkable(layout: Layout) -> None:
    """
    Check that a model's stream is read by norms in its layers, and one behind them.

    Raises:
        UnsupportedModelError: if its row names no norms, or others that stand before the layers.
    """
    hidden_home(layout)
    if layout.family.outer_norms:
        raise UnsupportedModelError(
            f"norms before the layers read the residual stream of model_type={layout.model_type!r} "
            f"({', '.join(layout.family.outer_norms)}): load the model, and find its basis in memory (`find_basis`)"
        )


def _go(
    walk: Walk,
    streams: Sequence[Stream],
    watch: Callable[[int, int, int, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
    desc: str,
    progress: Progress | None,
) -> None:
    """
    Take streams side by side through all layers, and to the norm behind them.

    Args:
        walk: with the batches that the streams are of.
        streams: before the first layer.
        watch: called at every norm that reads the stream with the number of the stream, the number of the batch, the
            site, the norm, its input and its output: the output that the stream goes on with.
        desc: for the progress bar.
        progress: makes one.

    Raises:
        UnsupportedModelError: if the last norm is not called behind the layers.
    """
    now, seen = [0, 0], set[int]()

    def at(site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        seen.add(site)
        return watch(now[0], now[1], site, norm, x, output)

    with watching(walk.weights.model, walk.layout, at):
        layers = range(len(streams[0].layers))
        for layer in progress_bar(progress, iterable=layers, desc=desc, leave=False):
            for number in range(len(walk.batches)):
                for which, stream in enumerate(streams):
                    now[:] = which, number
                    stream.hidden[number] = stream.keep(stream.call(layer, number))
        walk.weights.release()
        with walk.weights.outside():
            for number, batch in enumerate(walk.batches):
                for which, stream in enumerate(streams):
                    now[:] = which, number
                    stream.end(number, batch)
    missing = [name for site, name in enumerate(walk.layout.norms) if site not in seen]
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]} of {type(walk.weights.model).__name__} was not called on the way through the layers: load "
            "the model, and find its basis in memory (`find_basis`)"
        )


def _moments(walk: Walk, progress: Progress | None) -> Moments:
    """As `collect_moments`, of the stream alone."""
    layout, groups = walk.layout, groups_of(walk.layout)
    stream = walk.start()
    dtype = kind_of(walk.weights.model)[1]
    sums = torch.zeros(groups, layout.hidden_size, layout.hidden_size, device=walk.weights.device, dtype=dtype)
    positions = 0

    def add(
        _which: int, number: int, site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        nonlocal positions
        flat = counted(plain_norm(norm, x), walk.batches[number]).to(dtype)
        sums[site * groups // len(layout.norms)].addmm_(flat.T, flat)
        positions += len(flat) if site == 0 else 0
        return output

    _go(walk, [stream], add, MOMENTS, progress)
    return Moments(sums, None, positions).check()


def _scales(walk: Walk, vectors: torch.Tensor, centred: bool, progress: Progress | None) -> torch.Tensor:
    """As `fit_scales`: the narrow models go through a layer after the dense one."""
    walk, stream = walk.up_to(ENOUGH, PART)
    dtype = kind_of(walk.weights.model)[1]
    fits = NormFits(vectors, walk.weights.device, dtype, sites=len(walk.layout.norms), centred=centred)
    narrow = [replace(stream, hidden=list(stream.hidden)) for _ in range(len(fits))]
    dense: dict[int, torch.Tensor] = {}

    def fit(
        which: int, number: int, site: int, norm: nn.Module, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        if which == 0:
            dense[site] = plain_norm(norm, x)
            return output
        return fits.narrow(which - 1, site, norm, x, dense[site], walk.batches[number])

    _go(walk, [stream, *narrow], fit, FACTORS, progress)
    return fits.scales
