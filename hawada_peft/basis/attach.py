"""Gates on directions of the residual stream, put into an adapter that has none, and taken out again."""

from __future__ import annotations

import copy
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..errors import UnsupportedModelError
from ..gates.adapter import HIDDEN_UNITS, GateAdapter
from ..gates.bases import BasisGate
from ..gates.concrete import AttentionHeadAdapter, QueryAdapter
from ..gates.hidden import HiddenAdapter
from ..gates.kinds import SigmoidGate
from ..gates.placement import check_norms, place_head_maps, share_hidden, stream_gate
from ..planning.plan import Plan
from ..vanilla.family import Layout, hidden_home, locate
from ..vanilla.shape import HIDDEN
from .bases import Bases
from .heads.projections import queries_of
from .heads.turn import set_in_heads
from .marks import is_centred
from .proof import check_exact


def attach_directions(model: PeftModel, adapter_name: str) -> BasisGate:
    """
    Put a gate on directions of the residual stream into an adapter. What the model computes stays.

    The adapter is then as one of `HawAdaConfig(gates=(..., "hidden"), rotate=True)`, saved and loaded as such, and its
    basis is to be found yet (`init_basis`).

    Args:
        model: with gates placed by a family row, none of them on the residual stream.
        adapter_name: whose.

    Raises:
        UnsupportedModelError: if the stream cannot be rotated exactly, or the adapter gates a choice of layers;
            nothing has been changed then.
    """
    base = model.get_base_model()
    layout, config = locate(base), copy.copy(_config(model, adapter_name))
    if config.layers_to_transform is not None:
        raise UnsupportedModelError("the gate on the residual stream is one for all layers, and the adapter has some")
    check_norms(base, layout)
    check_exact(layout)
    gate = stream_gate(layout, centred=is_centred(base, layout), group_size=config.group_size, start=config.start())
    for name in layout.norms:
        module = base.get_submodule(name)
        gates: dict[str, SigmoidGate] = {HIDDEN_UNITS: gate} if name == hidden_home(layout) else {}
        if isinstance(module, HiddenAdapter):
            module.update_layer(adapter_name, gates, config.inference_mode)
        else:
            _put(base, name, HiddenAdapter(module, adapter_name, gates=gates, inference_mode=config.inference_mode))
    share_hidden(base, layout)
    config.gates, config.rotate = [*config.gates, HIDDEN], True
    config.target_modules = {*config.target_modules, *_targets(layout)}
    model.peft_config[adapter_name] = config
    return cast(BasisGate, gate)


def give_bases(model: PeftModel, plan: Plan, bases: Bases) -> None:
    """
    Put gates on directions in, with a basis, if a plan is about them and the active adapter does not gate the stream;
    and bases inside of heads, if a plan narrows these and it has none.

    Args:
        model: with gates placed by a family row, one adapter active.
        plan: that is to be applied.
        bases: that the plan was made with.

    Raises:
        UnsupportedModelError: as `attach_directions`, `attach_in_heads`.
    """
    (name,) = model.active_adapters
    basis, heads = bases.stream, bases.heads
    if basis is not None and plan.rotated and HIDDEN not in _config(model, name).gates:
        attach_directions(model, name).set_basis(basis.vectors, basis.scales, basis.marks)
    if heads is not None and plan.head_dim is not None and not _config(model, name).narrow_heads:
        attach_in_heads(model, name)
        base = model.get_base_model()
        set_in_heads(base, locate(base), name, heads)


def attach_in_heads(model: PeftModel, adapter_name: str) -> None:
    """
    Put bases inside of heads into an adapter. What the model computes stays.

    The adapter is then as one of `HawAdaConfig(narrow_heads=True)`, and the bases are to be found yet (`init_basis`).

    Args:
        model: with gates placed by a family row in one tower.
        adapter_name: whose.

    Raises:
        UnsupportedModelError: if the heads cannot be narrowed exactly, or the adapter gates a choice of layers;
            nothing has been changed then.
    """
    base = model.get_base_model()
    layout, config = locate(base), copy.copy(_config(model, adapter_name))
    if config.layers_to_transform is not None:
        raise UnsupportedModelError("heads have one size in all layers, and the adapter gates some of these")
    config.target_modules = {*config.target_modules}
    for name, kind in _ends_of_heads(layout).items():
        module = base.get_submodule(name)
        if not isinstance(module, GateAdapter):
            _put(base, name, kind(module, adapter_name, gates={}, inference_mode=config.inference_mode))
            config.target_modules.add(name)
    place_head_maps(base, layout, queries_of(layout), adapter_name)
    config.narrow_heads = True
    model.peft_config[adapter_name] = config


def detach_in_heads(model: PeftModel, adapter_name: str) -> None:
    """The inverse of `attach_in_heads`: the adapter is as it was before."""
    base = model.get_base_model()
    layout, config = locate(base), copy.copy(_config(model, adapter_name))
    config.target_modules = {*config.target_modules}
    for name in _ends_of_heads(layout):
        module = cast(GateAdapter, base.get_submodule(name))
        del module.head_maps[adapter_name]
        used = module.head_maps or any(module.gates(each) for each in model.peft_config)
        if name in config.target_modules and not used:
            _put(base, name, module.base_layer)
        config.target_modules.discard(name)
    config.narrow_heads = False
    model.peft_config[adapter_name] = config


def detach_directions(model: PeftModel, adapter_name: str) -> None:
    """The inverse of `attach_directions`: the adapter is as it was before."""
    base = model.get_base_model()
    layout, config = locate(base), copy.copy(_config(model, adapter_name))
    for name in layout.norms:
        module = cast(HiddenAdapter, base.get_submodule(name))
        if any(each != adapter_name and module.gates(each) for each in model.peft_config):
            gates: nn.ModuleDict = getattr(module, HIDDEN_UNITS)
            if adapter_name in gates:  # PEFT's `delete_adapter` would activate another one
                del gates[adapter_name]
        else:
            _put(base, name, module.get_base_layer())
    config.gates, config.rotate = [kind for kind in config.gates if kind != HIDDEN], False
    config.target_modules = set(config.target_modules) - _targets(layout)
    model.peft_config[adapter_name] = config


def _config(model: PeftModel, adapter_name: str) -> Any:
    return model.peft_config[adapter_name]


def _targets(layout: Layout) -> set[str]:
    """The norms, as PEFT finds them by the ends of their names."""
    return {*layout.family.hidden_norms, *layout.norms_outside}


def _ends_of_heads(layout: Layout) -> dict[str, type[AttentionHeadAdapter | QueryAdapter]]:
    """What makes queries and what is behind heads, in full, and which adapters have bases of them."""
    queries, layers = queries_of(layout), range(layout.dense.sizes()["num_hidden_layers"])
    outs = {f"{layout.stack}.{layer}.{queries}": layout.attention_out(layer) for layer in layers}
    return {
        name: kind
        for query, out in outs.items()
        if out
        for name, kind in ((query, QueryAdapter), (out, AttentionHeadAdapter))
    }


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, module)
