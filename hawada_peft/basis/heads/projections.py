"""The projections of an attention whose heads can be made narrower: found by building, and by what they do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ...discovery.inputs import example_inputs
from ...errors import UnsupportedModelError
from ...vanilla.family import Layout
from ...vanilla.legality import tensors_of
from ...vanilla.outputs import outputs_of
from ...vanilla.resize import edit_config
from ...vanilla.skeleton import build_empty
from ..proof import ROUNDING
from ..tiny import tiny_copy

MATRIX = ("weight", "bias")
"""What a linear map is made of."""


@dataclass(frozen=True)
class Projections:
    """
    The linear maps of an attention in which features of heads lie, relative to a layer.

    Args:
        query (`str`): makes queries of the stream.
        key (`str`): makes keys.
        value (`str`): makes values.
        out (`str`): what heads give goes through it to the stream.
        layers (`tuple[int, ...]`): those that have them.
    """

    query: str
    key: str
    value: str
    out: str
    layers: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, relative to a layer."""
        return self.query, self.key, self.value, self.out


def refused(layout: Layout, why: str) -> UnsupportedModelError:
    """The error that says why a class's heads cannot be made narrower."""
    return UnsupportedModelError(
        f"the heads of {layout.model_class.__name__} cannot be made narrower: {why}. `hawada inspect` tells what else "
        "can be removed of this model"
    )


def build_narrow(layout: Layout, head_dim: int) -> PreTrainedModel:
    """
    A model of other heads and the same sizes otherwise, on the meta device.

    Raises:
        UnsupportedModelError: if the config class refuses it.
    """
    try:
        config = edit_config(layout, replace(layout.dense, head_dim=head_dim))
        return build_empty(layout.model_class, config)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        cause = str(error).strip().splitlines()[-1].strip()
        raise refused(layout, f"its config refuses heads of {head_dim} features ({cause})") from None


def find_projections(layout: Layout) -> Projections:
    """
    The projections of a class's attention. Which they are is found by building it with larger heads; which makes what,
    by shifting the outputs of each in a tiny copy: the same shift of all keys changes nothing, as softmax does not
    see what all scores of a query have in common; that of all values shifts what a head gives; that of queries
    does neither.

    Args:
        layout: the dense model's, with its class and config.

    Raises:
        UnsupportedModelError: if they are not three linear maps and the one behind the heads, every head with keys of
            its own; a head's size is derived or occurs elsewhere; keys depend on their place, or are normed.
    """
    return layout.once("projections of heads", lambda: _find(layout))


def _find(layout: Layout) -> Projections:
    sizes = layout.dense.sizes()
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    made, out, layers = _moved(layout, {heads, groups})
    tiny = tiny_copy(layout, torch.float64, every_kind=True)
    there = attentions(tiny, layout, out)
    try:
        found = {_roles(tiny, f"{layout.stack}.{layer}", made, out) for layer in there}
    except (ValueError, RuntimeError) as error:
        raise refused(layout, f"a tiny copy, on which that is proved, does not run ({error})") from None
    if any(not keys for _, keys, _ in found):
        raise refused(
            layout,
            "a shift of all keys changes what its heads give, as with rotary positions, norms of keys, or sinks",
        )
    if groups != heads:
        raise refused(layout, f"{heads // groups} query heads share each of its {groups} KV groups")
    if len(found) != 1 or any(len(names) != 1 for each in found for names in each):
        raise refused(layout, f"of {', '.join(made)} it is not clear which makes queries, keys and values")
    (query, key, value) = (names[0] for names in found.pop())
    return Projections(query, key, value, out, layers)


def queries_of(layout: Layout) -> str:
    """
    What makes queries, relative to a layer, in a model in whose heads bases can lie.

    Raises:
        UnsupportedModelError: as `find_projections`; if heads are gated elsewhere than behind these projections.
    """
    found = find_projections(layout)
    if any(layout.attention_out(layer) != f"{layout.stack}.{layer}.{found.out}" for layer in found.layers):
        raise refused(
            layout, f"its heads are known at {layout.family.attention_out!r}, and were found at {found.out!r}"
        )
    return found.query


def attentions(model: PreTrainedModel, layout: Layout, out: str) -> list[int]:
    """The layers that have a projection behind heads."""
    names = dict(model.named_modules())
    layers = range(len(model.get_submodule(layout.stack)))  # type: ignore[arg-type]  # a list of modules
    return [layer for layer in layers if f"{layout.stack}.{layer}.{out}" in names]


def _moved(layout: Layout, counts: set[int]) -> tuple[list[str], str, tuple[int, ...]]:
    """What a class builds of other sizes when its heads are: the maps to them, the one from them, and the layers."""
    old, new = layout.head_dim, 2 * layout.head_dim
    dense, other = tensors_of(layout), build_narrow(layout, new)
    whole = {(count * old, count * new) for count in counts}
    found: dict[int, dict[str, int]] = {}
    for name, tensor in other.state_dict().items():
        dims = [dim for dim, size in enumerate(tensor.shape) if size != dense[name][dim]]
        if not dims:
            continue
        owner, _, which = name.rpartition(".")
        place, module = layout.within(owner), other.get_submodule(owner)
        sizes = {(dense[name][dim], tensor.shape[dim]) for dim in dims}
        if place is None:
            raise refused(layout, f"{name!r} lies outside of its layers and depends on the size of a head as well")
        if len(dims) > 1 or not sizes <= whole or not isinstance(module, nn.Linear) or which not in MATRIX:
            raise refused(
                layout,
                f"{name!r} of shape {tuple(dense[name])} depends on the size of a head, and is none of the linear "
                "maps to queries, to keys, to values and back",
            )
        if which == "weight":
            found.setdefault(place[0], {})[place[1]] = dims[0]
    if not found:
        raise refused(layout, "it derives the size of a head from its hidden size, whatever the config says")
    kinds = {tuple(sorted(each.items())) for each in found.values()}
    made, out = ([name for name, dim in sorted(kinds)[0] if dim == wanted] for wanted in (0, 1))
    if len(kinds) > 1 or len(made) != 3 or len(out) != 1:
        told = "; ".join(", ".join(name for name, _ in kind) for kind in sorted(kinds))
        raise refused(layout, f"needed are three projections to its heads and one from them, found {told}")
    return made, out[0], tuple(sorted(found))


def _roles(model: PreTrainedModel, layer: str, made: list[str], out: str) -> tuple[tuple[str, ...], ...]:
    """Which projections of a layer make queries, which keys, and which values."""
    inputs, generator = example_inputs(model), torch.Generator().manual_seed(0)
    seen: list[torch.Tensor] = []

    def given(*hooked: tuple[str, torch.Tensor]) -> torch.Tensor:
        """What heads give when the outputs of some projections are shifted."""
        seen.clear()
        with ExitStack() as hooks:
            module = model.get_submodule(f"{layer}.{out}")
            hooks.callback(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
            for name, shift in hooked:
                module = model.get_submodule(f"{layer}.{name}")
                hooks.callback(module.register_forward_hook(_added(shift)).remove)
            outputs_of(model, inputs)
        return seen[0]

    plain = given()
    queries, keys, values = list[str](), list[str](), list[str]()
    for name in made:
        features = cast(int, model.get_submodule(f"{layer}.{name}").out_features)
        shift = torch.randn(features, generator=generator, dtype=torch.float64)
        change = given((name, shift)) - plain
        small = ROUNDING * float(plain.abs().max() + shift.abs().max())
        if change.abs().max() <= small:
            keys.append(name)
        elif features == plain.shape[-1] and (change - shift).abs().max() <= small:
            values.append(name)
        else:
            queries.append(name)
    return tuple(queries), tuple(keys), tuple(values)


def _added(shift: torch.Tensor) -> Callable[..., Any]:
    return lambda _module, _args, output: output + shift
