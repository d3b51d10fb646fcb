"""A small model with random weights that claims are tried on, with inputs, in float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModelError
from ..inputs import example_inputs
from .builds import REFUSES, Builds, Dim, cause
from .closing import Closed, closed_units
from .config_tree import scopes_of

SEEDS = range(1, 9)
"""Of weights, tried until half of each output is not zero: of those that end in a ReLU some give nothing."""

ALIVE = 0.5

LENGTH = 24
"""Tokens of a text."""

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Specimen:
    """
    A model of a class and config, its inputs, and what it computes.

    Args:
        model_class: of transformers.
        config: with small numbers; `experts_implementation` is set to the one that computes in float64.
        given: inputs by name, instead of drawn ones.

    Raises:
        UnsupportedModelError: if the model does not run on the inputs, gives nothing to compare, or gives something
            else each time.
    """

    def __init__(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, given: Mapping[str, Any] | None = None
    ) -> None:
        for _, inner in scopes_of(config):
            inner._experts_implementation = "eager"
        self.builds = Builds(model_class, config)
        self.model_class, self.config, self.base = model_class, config, self.builds.base
        self._open: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        best = -1.0
        for seed in SEEDS:
            model = random_model(model_class, config, seed)
            try:
                inputs = example_inputs(model, length=LENGTH, given=given)
                outputs = run(model, inputs)
            except REFUSES as error:
                raise UnsupportedModelError(
                    f"a small {model_class.__name__} with random weights does not run on example inputs "
                    f"({cause(error)}): give some by the names of its arguments, as `inputs`"
                ) from error
            alive = min((float((each != 0).double().mean()) for each in outputs), default=0.0)
            if alive > best:
                best, self.model, self.inputs, self.dense = alive, model, inputs, outputs
            if best >= ALIVE:
                break
        if not self.dense:
            raise UnsupportedModelError(f"{model_class.__name__} gives no floating tensors that can be compared")
        if any(not torch.equal(one, two) for one, two in zip(self.dense, run(self.model, self.inputs), strict=True)):
            raise UnsupportedModelError(
                f"{model_class.__name__} gives something else each time on the same inputs, in evaluation mode: "
                "nothing can be proved of random outputs. Look for a dropout or a sampling that is left on"
            )

    @cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Every saved parameter and buffer, tied ones by each of their names."""
        named: dict[str, torch.Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        return named | {name: buffer for name, buffer in self.model.named_buffers() if name in self.base}

    @cached_property
    def weights_of_loss(self) -> list[torch.Tensor]:
        """Random weights of all outputs, whose weighted sum is derived."""
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in self.dense]

    def run(self, closed: Closed | None = None) -> list[torch.Tensor]:
        """All floating outputs, with units closed."""
        with closed_units(self.model, closed or Closed()):
            return run(self.model, self.inputs)

    def open_gradients(self, linear: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """As `gradients`, with nothing closed; kept."""
        if linear not in self._open:
            self._open[linear] = self.gradients(Closed(linear=linear))
        return self._open[linear]

    def gradients(self, closed: Closed, of: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Of the weighted sum of all outputs, for every parameter that it depends on, or some of them."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        asked = set(map(id, (named[name] for name in (named if of is None else of) if name in named)))
        for parameter in named.values():
            parameter.requires_grad_(parameter.dtype.is_floating_point and id(parameter) in asked)
            parameter.grad = None
        with closed_units(self.model, closed):
            outputs = floats_in(self.model(**self.inputs))
            pairs = zip(outputs, self.weights_of_loss, strict=True)
            loss = sum(((out.masked_fill(~out.isfinite(), 0) * weight).sum() for out, weight in pairs), start=0)
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
        found = {name: parameter.grad.nan_to_num_() for name, parameter in named.items() if parameter.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def told(self, module: str) -> str:
        """What tells a module from others: the names of its parameters, and their shapes."""
        before = f"{module}."
        return repr(sorted((name[len(before) :], self.base[name]) for name in self.base if name.startswith(before)))

    # -- what a parameter is to its module

    def owner(self, name: str) -> nn.Module:
        """The module that owns a parameter."""
        return self.model.get_submodule(name.rpartition(".")[0])

    def input_dim(self, name: str) -> int | None:
        """The dimension of a weight along which its module reads its input; None for other parameters."""
        module = self.owner(name)
        if name.rpartition(".")[2] != "weight":
            return None
        if isinstance(module, Conv1D):
            return 0
        plain = isinstance(module, nn.Linear) or (isinstance(module, CONVS) and module.groups == 1)
        return 1 if plain else None

    def norm_of(self, name: str) -> str | None:
        """The norm over the last dimension whose scale a parameter is; None for other parameters."""
        module, _, own = name.rpartition(".")
        owner, parameter = self.owner(name), self.parameters[name]
        if own != "weight" or parameter.ndim != 1 or list(owner.children()):
            return None
        return module if _normalises(owner, len(parameter)) else None

    def reads(self, dims: Any) -> list[Dim]:
        """Those of some dimensions along which a module reads its input."""
        return [(name, dim) for name, dim in dims if self.input_dim(name) == dim]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """All floating tensors that a model gives."""
    with torch.no_grad():
        return floats_in(model(**inputs))


def floats_in(output: Any) -> list[torch.Tensor]:
    """All floating tensors of an output, at any depth, in their order; caches are none."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [found for value in values for found in floats_in(value)]


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """
    A model in float64 on the CPU, in evaluation mode, none of whose weights has a special value: no bias is 0, no
    norm's scale 1. What is made and not trained (sinusoids) stays as it is made. The caller's random state stays.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape)
            if parameter.ndim < 2:
                parameter.data = parameter.data + 0.1 * noise
            else:
                fan = parameter.shape[-1] if parameter.ndim == 3 else parameter.shape[1:].numel()
                parameter.data = noise / max(1, fan) ** 0.5
        return model.to(torch.float64).eval()  # type: ignore[arg-type]


def _normalises(module: nn.Module, size: int) -> bool:
    """Whether a module gives the same for inputs that differ by a large factor."""
    probe = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        with torch.no_grad():
            one, other = module(probe), module(probe * 64)
    except REFUSES:
        return False
    if not isinstance(one, torch.Tensor) or one.shape != probe.shape:
        return False
    moved = float((one - other).abs().max())
    return moved < 0.05 * float(one.abs().max()) and float((one - one[:, :, :1]).abs().max()) > 0
