"""The proof: a small model with units closed, and the smaller one that the class builds, give the same."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ...vanilla.skeleton import build_undrawn
from .builds import Dim
from .closing import Closed
from .config_tree import Path, edited
from .found import Found
from .specimen import Specimen, run

ROUNDING = 1e-5
"""The largest difference, of the largest value of an output, that is rounding: norms compute in float32."""

FREE, COUPLED = 2, 4
"""Draws of units on which a proof has to hold: of others at every place, and of the same ones at several."""

Renaming = Callable[[str], str]
"""From a parameter's name in the smaller model to that in the whole one."""


@dataclass
class Cutting:
    """
    What is cut out of a small model, and closed in it.

    Args:
        kept: axes with the units that stay at their places.
        changes: of the config.
        renamed: names in the smaller model to those in the whole one.
        rows: further dimensions with the rows that stay.
        skipped: layers that go.
    """

    kept: list[tuple[Found, dict[Dim, list[int]]]] = field(default_factory=list)
    changes: dict[Path, Any] = field(default_factory=dict)
    renamed: Renaming = str
    rows: dict[Dim, list[int]] = field(default_factory=dict)
    skipped: Sequence[str] = ()

    def closed(self) -> Closed:
        """What the whole model closes."""
        closed = Closed(skipped=self.skipped)
        for axis, kept in self.kept:
            axis.close(closed, kept)
        return closed

    def staying(self, name: str, ndim: int) -> dict[int, list[int]]:
        """The rows of a parameter of the whole model that stay, by dimension."""
        found = {dim: self.rows[name, dim] for dim in range(ndim) if (name, dim) in self.rows}
        for axis, kept in self.kept:
            for dim in range(ndim):
                if (name, dim) in axis.rows:
                    rows = set(axis.staying((name, dim), kept))
                    found[dim] = [row for row in found.get(dim, sorted(rows)) if row in rows]
        return found


def built_with(specimen: Specimen, changes: Mapping[Path, Any]) -> PreTrainedModel:
    """
    A model of the specimen's class with changes of its config, for weights that are put in.

    Raises:
        Exception: one of `REFUSES`.
    """
    small = build_undrawn(specimen.model_class, edited(specimen.config, changes))
    return small.to(torch.float64).eval()  # type: ignore[arg-type]


def cut_out(specimen: Specimen, cutting: Cutting, small: PreTrainedModel | None = None) -> PreTrainedModel:
    """
    The smaller model, of the whole one's weights, which it shares where nothing of them is cut.

    Args:
        specimen: the whole one.
        cutting: what is cut.
        small: of `built_with`, where it is already built.

    Raises:
        Exception: one of `REFUSES`; a ValueError if the class builds other shapes than are cut.
    """
    small = built_with(specimen, cutting.changes) if small is None else small
    whole, state = specimen.parameters, {}
    for name, tensor in small.state_dict().items():
        source = cutting.renamed(name)
        value = whole[source].detach()
        for dim, rows in cutting.staying(source, value.ndim).items():
            value = value.index_select(dim, torch.tensor(rows, dtype=torch.long))
        if value.shape != tensor.shape:
            raise ValueError(f"{name} is cut to {tuple(value.shape)}, and the class builds {tuple(tensor.shape)}")
        state[name] = value
    small.load_state_dict(state, strict=True, assign=True)
    small.tie_weights()
    return small


def difference(specimen: Specimen, cutting: Cutting, small: PreTrainedModel | None = None) -> float:
    """
    How far the smaller model's outputs are from those of the whole one with the same units closed, of each output's
    largest value.

    Raises:
        Exception: one of `REFUSES`, of whatever does not fit.
    """
    return apart(specimen.run(cutting.closed()), run(cut_out(specimen, cutting, small), specimen.inputs))


def apart(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest difference of two lists of outputs, of each output's largest value."""
    top = max((_largest(each) for each in ones), default=0.0) or 1.0
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        scale = max(_largest(one), 1e-3 * top)
        worst = max(worst, _largest((one - other).where(one.isfinite(), torch.zeros(()))) / scale)
    return worst


def _largest(output: torch.Tensor) -> float:
    finite = output[output.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def draw(axis: Found, units: int, seed: int, *, tied: bool) -> list[tuple[Found, dict[Dim, list[int]]]]:
    """
    Units that stay, drawn at random: others at every place, or in all layers of it the same, where they are `alike`.

    Args:
        axis: the axis; its partner's units are drawn as well.
        units: how many stay.
        seed: of the draw.
        tied: the same units at every place.
    """
    generator = random.Random(seed)
    same: dict[Any, list[int]] = {}
    kept = {}
    for place, count in axis.counts.items():
        left = axis.left_at(place, units)
        if left is None:
            raise ValueError(f"{units} of {axis.units} units are no whole number at {place[0]}")
        drawn = _some(generator, count, left, axis.groups)
        kept[place] = same.setdefault(count if tied else axis.alike.get(place, place), drawn)
    found = [(axis, kept)]
    if axis.partner is not None:
        found += draw(axis.partner, units * axis.partner.units // axis.units, seed, tied=False)
    return found


def _some(generator: random.Random, count: int, left: int, groups: int) -> list[int]:
    if not groups:
        return sorted(generator.sample(range(count), left))
    each, of_each = count // groups, left // groups
    return sorted(group * each + unit for group in range(groups) for unit in generator.sample(range(each), of_each))


def half(axis: Found) -> int:
    """The legal number of units nearest to half of them."""
    return min(axis.sizes, key=lambda size: abs(2 * size - axis.units))


def prove(specimen: Specimen, axis: Found, stacks: Sequence[str] = ()) -> float:
    """
    Close units of one axis at random, and compare; first other units at every place, then, if that is not the same,
    the same ones in all layers (a table that these share), then the same at all places. Says in the axis which it was.

    Args:
        specimen: the model.
        axis: the axis.
        stacks: the dotted names of its lists of layers.

    Raises:
        Exception: one of `REFUSES`, of whatever does not fit.
    """
    found = float("inf")
    layered = {place: _in_every_layer(place[0], stacks) for place in axis.places}
    ways: list[tuple[bool, dict[Dim, str]]] = [(True, {})]
    if not axis.tied:
        some = len({*layered.values()}) < len(layered)
        ways = [(False, {}), *([(False, layered)] if some else []), (True, {})]
    if idle := _idle(specimen, axis, stacks):
        raise ValueError(f"{idle} changes nothing on the example inputs, so that nothing can be proved of it")
    units = half(axis)
    changes = axis.changes(units)
    small = built_with(specimen, changes)
    for tied, alike in ways:
        axis.tied, axis.alike = tied, alike
        # Units that have to stay together may be drawn together by chance, the likelier the fewer are drawn.
        for seed in range(3, 3 + (COUPLED if tied or alike else FREE)):
            found = difference(specimen, Cutting(draw(axis, units, seed, tied=tied), changes), small)
            if found >= ROUNDING:
                break
        else:
            break
    return found


def _idle(specimen: Specimen, axis: Found, stacks: Sequence[str]) -> str:
    """A weight of the layers that gets smaller, and on which in no layer the outputs depend; or nothing."""
    gradients, moves = specimen.open_gradients(()), dict[str, bool]()
    for name, _ in axis.rows:
        if any(name.startswith(f"{stack}.") for stack in stacks) and specimen.parameters[name].ndim > 1:
            short = re.sub(r"\.\d+", ".*", name)
            moves[short] = moves.get(short, False) or (name in gradients and bool(gradients[name].any()))
    return next((name for name, moving in moves.items() if not moving), "")


def _in_every_layer(name: str, stacks: Sequence[str]) -> str:
    """A parameter's name without the index of its layer."""
    for stack in stacks:
        index, _, short = name.removeprefix(f"{stack}.").partition(".")
        if name.startswith(f"{stack}.") and index.isdigit():
            return f"{stack}.*.{short}"
    return name
