"""What a class builds from a config with numbers changed: shapes on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ...vanilla.skeleton import build_empty, build_undrawn
from .config_tree import Path, edited

Shapes = dict[str, tuple[int, ...]]
"""Of every parameter and saved buffer, by its dotted name."""

Dim = tuple[str, int]
"""A parameter's name and one of its dimensions."""

Moves = dict[Dim, tuple[int, int]]
"""Dimensions whose sizes differ: the old size and the new one."""

REFUSES = (
    AssertionError,  # in older classes: `assert self.dim % self.n_heads == 0` of Flaubert, as of fsmt and led
    AttributeError,  # a config's property that cannot be set: the head size of Falcon
    IndexError,  # lists with fewer entries than there are stages
    RuntimeError,  # tensors that do not fit in a forward pass
    StrictDataclassError,  # a config's own checks, nine in ten of all
    TypeError,  # a norm that takes more than features
    ValueError,  # sizes that do not divide
    ZeroDivisionError,  # every how many layers have experts: none
)
"""
What classes of transformers raise on numbers that do not fit: of configs, of modules, of a forward pass. Each was seen
in what is tried of the types of the zoo but the first, which is in classes that are not among them.
"""


class Builds:
    """
    The shapes that a class builds.

    Args:
        model_class: of transformers.
        config: the one that is changed.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.tree = config.to_dict()
        self.base = shapes_of(model_class, config)
        self._known: dict[str, Shapes | str] = {}

    def shapes(self, changes: Mapping[Path, Any]) -> Shapes | str:
        """What is built with changes; instead, why nothing is."""
        key = repr(sorted(changes.items(), key=repr))
        if key not in self._known:
            try:
                self._known[key] = shapes_of(self.model_class, edited(self.config, changes))
            except REFUSES as error:
                self._known[key] = cause(error)
        return self._known[key]

    def moves(self, changes: Mapping[Path, Any]) -> Moves | str:
        """The dimensions that changes move; instead, why nothing is built, or that it has other parameters."""
        shapes = self.shapes(changes)
        if isinstance(shapes, str):
            return shapes
        if shapes.keys() != self.base.keys() or any(len(shapes[name]) != len(self.base[name]) for name in shapes):
            return "it has other parameters then"
        return {
            (name, dim): (old, new)
            for name, shape in shapes.items()
            for dim, (old, new) in enumerate(zip(self.base[name], shape, strict=True))
            if old != new
        }


def shapes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """
    The shapes of one config; on the CPU where the class computes with numbers when it is built.

    Raises:
        Exception: one of `REFUSES`.
    """
    try:
        model = build_empty(model_class, config)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        model = build_undrawn(model_class, config)
    return shapes_in(model)


def shapes_in(model: PreTrainedModel) -> Shapes:
    """The shapes of a model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def cause(error: BaseException) -> str:
    """The last line of an error, which holds the cause; those before it name transformers' validator."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:160]}" if lines else type(error).__name__
