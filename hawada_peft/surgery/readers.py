"""What reads the units of a layer: found before anything is gated, so that nothing is cut that has no gate."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..vanilla.family import Layout
from ..vanilla.legality import tensors_of
from ..vanilla.modules import channels_dim, gateable, norm_offset
from ..vanilla.resize import edit_config
from ..vanilla.shape import FFN, HEADS, KV_GROUPS, Shape
from ..vanilla.skeleton import build_empty
from .axes import SliceRule, find_axes

CUT = {HEADS, KV_GROUPS, FFN}
"""Axes of which every layer keeps its own units."""


Problems = list[tuple[set[str], str]]
"""What stands in the way of cutting axes: of which, and what."""


def check_readers(layout: Layout, cut: Collection[str]) -> dict[str, str]:
    """
    Check that everything that reads the units of a layer is where the family's row has a gate.

    A linear map that reads them without a gate there, or a weight of which it is not known what it does with them,
    would make a slim model that computes something else.

    Args:
        layout: the dense model's, with its class and config.
        cut: the axes that are to be cut; see `find_axes`.

    Returns:
        The norms over these units, by their names relative to a layer, and the axis of each: what they make of the
        units that stay depends on those that go.

    Raises:
        UnsupportedModelError: naming the tensor; as `find_axes`.
    """
    if layout.known is not None:
        return {}  # units that others read were refused when the row was found
    rules = find_axes(layout, cut=cut)
    problems, norms = layout.once("readers", lambda: _readers(layout, rules))
    for axes, problem in problems:
        if axes & {*cut}:
            raise UnsupportedModelError(f"{problem}. {leave_out(axes)}")
    return {name: axis for name, axis in norms.items() if axis in cut}


def _readers(layout: Layout, rules: Mapping[str, tuple[SliceRule, ...]]) -> tuple[Problems, dict[str, str]]:
    one_layer = Shape(num_hidden_layers=1).complete(layout.dense)
    built = build_empty(layout.model_class, edit_config(layout, one_layer, layers=(0,)))
    gated = {layout.family.attention_out: {HEADS}, layout.family.ffn_out: {FFN}}
    layers, tensors = range(layout.dense.sizes()["num_hidden_layers"]), tensors_of(layout)
    problems: Problems = []
    norms: dict[str, str] = {}
    for name, each in rules.items():
        owner, _, parameter = name.rpartition(".")
        module = built.get_submodule(owner[1:] if name.startswith(".") else f"{layout.stack}.0.{owner}")
        for rule in each:
            axes = CUT & set(rule.segments)
            if not axes:
                continue
            if not name.startswith(".") and any(f"{layout.stack}.{layer}.{name}" not in tensors for layer in layers):
                problem = (
                    f"{name!r} of {layout.model_class.__name__} depends on {sorted(axes)}, and only some layers hold "
                    "it: where the others read it too, the same units would have to stay in all of them"
                )
                problems.append((axes, problem))
                continue
            where = f"{name!r} of {layout.model_class.__name__} depends on {sorted(axes)} along dimension {rule.dim}"
            if rule.dim == _input_dim(module, parameter) and not axes <= gated.get(owner, set()):
                problem = (
                    f"{where}: {owner} reads them, and the family row of {layout.model_type!r} has no gate there, "
                    f"only on {layout.family.attention_out} and {layout.family.ffn_out}"
                )
                problems.append((axes, problem))
            elif channels_dim(module) is not None and parameter == "down_proj" and owner != layout.family.ffn_out:
                problem = f"{where}: {owner} reads them, and is not the {layout.family.ffn_out} of the family row"
                problems.append((axes, problem))
            elif not gateable(module) and getattr(module, parameter).ndim > 2:
                problem = f"{where}: it is not known what a {type(module).__name__} does with them"
                problems.append((axes, problem))
            elif mixes(module, parameter):
                if len(axes) > 1 or name.startswith(".") or norm_offset(module) is None:
                    problems.append((axes, f"{where}: it belongs to a norm over them that is not known"))
                norms[owner] = min(axes)
    return problems, norms


def leave_out(axes: set[str]) -> str:
    """What a user can do about axes that cannot be cut."""
    names = sorted({HEADS if axis == KV_GROUPS else axis for axis in axes})
    return f"Leave {' and '.join(map(repr, names))} out of the config's `gates`."


def _input_dim(module: nn.Module, parameter: str) -> int | None:
    """The dimension of a parameter that belongs to what its module reads; None for those that have none."""
    if parameter != "weight" or not gateable(module):
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1 if module.groups == 1 else None
    return 0 if isinstance(module, Conv1D) else 1


def mixes(module: nn.Module, parameter: str) -> bool:
    """
    Whether what a module makes of one feature depends on the others, as a norm does; told by running it.

    Args:
        module: of any kind; only those are run that hold vectors of one length, and nothing else.
        parameter: one of these.
    """
    tensors = [*module.parameters(), *module.buffers()]
    size = len(getattr(module, parameter))
    if isinstance(module, nn.Embedding) or gateable(module) or [*module.children()]:
        return False
    if any(tuple(tensor.shape) != (size,) for tensor in tensors) or size < 2:
        return False
    copied = copy.deepcopy(module).to_empty(device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for tensor in [*copied.parameters(), *copied.buffers()]:
        tensor.data = torch.rand(size, generator=generator) + 0.5
    x = torch.randn(1, size, generator=generator)
    other = x.clone()
    other[:, size // 2 :] *= 2
    try:
        with torch.inference_mode():
            before, after = copied.eval()(x), copied(other)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it takes something else than features
    return not torch.equal(before[:, : size // 2], after[:, : size // 2])
