"""Gates on directions of the residual stream, put into an adapter that has none, and taken out again."""

from __future__ import annotations

import copy
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..errors import UnsupportedModelError
from ..gates.adapter import HIDDEN_UNITS
from ..gates.hidden import HiddenAdapter
from ..gates.kinds import SigmoidGate
from ..gates.placement import check_norms, share_hidden, stream_gate
from ..gates.stream_basis import BasisGate
from ..planning.plan import Plan
from ..vanilla.family import Layout, hidden_home, locate
from ..vanilla.shape import HIDDEN
from .basis import Basis
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


def give_directions(model: PeftModel, plan: Plan, basis: Basis | None) -> None:
    """
    Put gates on directions in, with a basis, if a plan is about them and the active adapter does not gate the stream.

    Args:
        model: with gates placed by a family row, one adapter active.
        plan: that is to be applied.
        basis: that the plan was made with.

    Raises:
        UnsupportedModelError: as `attach_directions`.
    """
    (name,) = model.active_adapters
    if basis is not None and plan.rotated and HIDDEN not in _config(model, name).gates:
        attach_directions(model, name).set_basis(basis.vectors, basis.scales, basis.marks)


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


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, module)
