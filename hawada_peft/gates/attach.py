"""Put adapters on the modules of any `nn.Module` tree, take them off again, and list their gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from ..errors import UnsupportedModelError
from ..vanilla.modules import gateable
from .adapter import GateAdapter
from .bases import HeadMap
from .concrete import AttentionHeadAdapter
from .kinds import SigmoidGate

Filter = Callable[[str, nn.Module], bool] | str | type[nn.Module] | tuple[type[nn.Module], ...]
Model = TypeVar("Model", bound=nn.Module)

_ATTENTION_OUTPUT = re.compile(
    r"(^|\.)[^.]*(attn|attention)[^.]*\.([^.]+\.)*(o_proj|out_proj|c_proj|out_lin|dense|proj|Wo|o)$", re.IGNORECASE
)
_FFN_OUTPUT = re.compile(r"(^|\.)(down_proj|fc2|lin2|(mlp|ffn|feed_forward)\.(c_proj|dense_4h_to_h|Wo|w2|wo|proj))$")


def is_attention_layer(name: str, module: nn.Module) -> bool:
    """Whether this is the output projection of an attention block, where heads are gated. By its name."""
    return gateable(module) and _ATTENTION_OUTPUT.search(name) is not None


def is_ffn_layer(name: str, module: nn.Module) -> bool:
    """Whether this is the output projection of a feed-forward block, where channels are gated. By its name."""
    return gateable(module) and _FFN_OUTPUT.search(name) is not None


def attach_adapters(
    model: Model,
    adapter_cls: type[GateAdapter] = AttentionHeadAdapter,
    filter_fn: Filter = is_attention_layer,
    *,
    adapter_name: str = "default",
    **options: Any,
) -> Model:
    """
    Wrap every module that the filter selects, in place. The base weights are neither copied nor frozen.

    A state dict of the bare model still loads into the result, and `detach_adapters` gives the bare model back.

    Args:
        model (`nn.Module`): any module tree.
        adapter_cls (`type[GateAdapter]`): which adapter to wrap with.
        filter_fn: a function of (name, module), a regular expression for the whole name, or a type or tuple of types.
        adapter_name (`str`): the name of the gates.
        options: passed to the adapter, e.g. `head_dim` or `group_size`. A `head_dim` that is left out is taken from
            the attention module around the projection.

    Returns:
        The model that was passed in.

    Raises:
        UnsupportedModelError: if the filter selects nothing, or a module that gates cannot be placed on.
    """
    selects = _as_function(filter_fn)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, GateAdapter))
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name and not isinstance(module, GateAdapter) and not name.startswith(inside) and selects(name, module)
    ]
    if not found:
        known = sorted({name for name, module in model.named_modules() if name and gateable(module)})
        raise UnsupportedModelError(
            f"{filter_fn!r} selects no module of this {type(model).__name__}. Modules that gates can be placed on: "
            f"{known[:20]}{' ...' if len(known) > 20 else ''}"
        )
    adapters = []
    for name, module in found:
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        chosen = dict(options)
        if issubclass(adapter_cls, AttentionHeadAdapter):
            chosen.setdefault("head_dim", getattr(parent, "head_dim", None))
        adapters.append((parent, child_name, adapter_cls(module, adapter_name, **chosen).train(module.training)))
    for parent, child_name, adapter in adapters:  # once all could be made
        setattr(parent, child_name, adapter)
    return model


def detach_adapters(model: Model) -> Model:
    """
    Put every wrapped module back in its place, unmerged: the model is as it was before `attach_adapters`.

    Returns:
        The model that was passed in.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, GateAdapter):
            if module.merged:
                module.unmerge()
            parent_name, _, child_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child_name, module.base_layer)
            module.release()
    return model


def collect_gates(model: nn.Module, adapter_name: str | None = None) -> dict[str, SigmoidGate]:
    """
    Every gate of the model by its dotted name, in the order of the modules; a shared gate once.

    Args:
        adapter_name (`str`, *optional*): only the gates of this name.
    """
    return {
        f"{name}.{slot}.{key}": gate
        for name, module in model.named_modules()
        if isinstance(module, GateAdapter)
        for slot in module.adapter_layer_names
        for key, gate in getattr(module, slot).items()
        if adapter_name in (None, key)
    }


@contextmanager
def masks_put_back(model: nn.Module) -> Iterator[None]:
    """What plans close is afterwards what it was before."""
    gates = [(gate, gate.kept, gate.hard_in_training) for gate in collect_gates(model).values()]
    maps = [(module, module.kept) for module in model.modules() if isinstance(module, HeadMap)]
    try:
        yield
    finally:
        for gate, kept, hard in gates:
            gate.set_plan(kept, in_training=hard)
        for head_map, size in maps:
            head_map.kept = size


def _as_function(filter_fn: Filter) -> Callable[[str, nn.Module], bool]:
    if isinstance(filter_fn, str):
        pattern = re.compile(filter_fn)
        return lambda name, module: pattern.fullmatch(name) is not None
    if isinstance(filter_fn, (type, tuple)):
        types = filter_fn
        return lambda name, module: isinstance(module, types)
    return filter_fn
