"""The dense model below the adapters: seen without them, and given back when something done to it fails."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..gates.adapter import GateAdapter
from ..planning.plan import Plan
from ..vanilla.family import locate, mark
from .conformity import below, check_conforms, vanilla_tensors
from .source import build_tied, materialise
from .stream_masks import unmask

CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def put_back(base: nn.Module, *, always: bool) -> Iterator[None]:
    """
    What is done to a model inside the block is undone when the block fails, for whatever reason, Ctrl-C included.

    Weights, modules, hooks, buffers, flags and the config are what they were, and the same objects. No weight is
    copied: what is done may put new tensors in the place of weights, not write into them.

    Args:
        base: the model.
        always: undo it also when the block does not fail.
    """
    state = _State(base)
    try:
        yield
    except BaseException:
        state.restore()
        raise
    if always:
        state.restore()


class _State:
    """All that a model holds, by reference."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(each, each.data, each.requires_grad) for each in model.parameters()]
        owners: list[Any] = [*model.modules(), *(model.config for _ in [0] if isinstance(model, PreTrainedModel))]
        self._fields = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._contents = [
            (value, copy.copy(value))
            for _, fields in self._fields
            for value in fields.values()
            if type(value) in CONTAINERS
        ]

    def restore(self) -> None:
        for container, content in [*self._fields, *self._contents]:  # in place: handles of hooks point there
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, tensor, requires_grad in self._parameters:
            parameter.data = tensor
            parameter.requires_grad_(requires_grad)


def unmerge(base: nn.Module) -> None:
    """Take gates that were merged into the weights out of them again, bit for bit."""
    for module in base.modules():
        if isinstance(module, GateAdapter) and module.merged:
            module.unmerge()


def unshare(base: nn.Module) -> None:
    """Give every gated module weights of its own, where layers share them: each layer's gates are folded in apart."""
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for module in base.modules():
        if isinstance(module, GateAdapter):
            inner = module.get_base_layer()
            for name, parameter in inner._parameters.items():
                if parameter is not None and owners[id(parameter)] > 1:
                    inner._parameters[name] = nn.Parameter(parameter.data, parameter.requires_grad)


def take_off(base: PreTrainedModel) -> None:
    """
    Leave the dense model as it was before there were adapters: all of them go, and what was trained beside them.

    Args:
        base: with adapters in it, unmerged.
    """
    found = {name: module for name, module in base.named_modules() if below(module) is not module}
    for name in sorted(found, key=len):  # outer ones first: what they hold goes with them
        if not any(name.startswith(f"{outer}.") for outer in found):
            base.set_submodule(name, below(found[name]))
    for module in found.values():
        if isinstance(module, GateAdapter):
            module.release()
    unmask(base)
    vars(base).pop("peft_config", None)


def dense_view(base: PreTrainedModel) -> PreTrainedModel:
    """
    The vanilla model around which adapters were put: a model of the same class with the same tensors, in eval mode.

    Nothing is copied and the base model stays as it is. What adapters add is not in the view.

    Args:
        base: with adapters in it, unmerged, its weights not quantized.

    Raises:
        UnsupportedModelError: if its weights are not those of its class.
    """
    layout, tensors = locate(base), vanilla_tensors(base)
    check_conforms(layout, tensors)
    view = build_tied(layout.model_class, copy.deepcopy(base.config), tensors)
    values = {name: tensor.data for name, tensor in tensors.items()}
    view.load_state_dict({name: values[name] for name in view.state_dict()}, strict=True, assign=True)
    materialise(base, view, layout, Plan.keep_all(layout.dense, layout.tower))
    view.tie_weights()
    mark(view, layout)
    return view.eval()
