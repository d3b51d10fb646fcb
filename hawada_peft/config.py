"""
The adapter's configuration.

Long because every field is explained, and checked as JSON may hold it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from peft import LoraConfig, PeftConfig, PeftType

from ._register import NAME
from .errors import HawAdaError, IncompatibleBaseError
from .files.adapter_card import write_adapter_card
from .gates.kinds import GateStart
from .gates.lora import lora_fields, lora_problems
from .gates.saved import check_adapter_file
from .vanilla.family import Layout, base_sizes

GATES = ("heads", "ffn", "blocks", "layers", "hidden", "experts")
"""
What can be gated: attention heads, FFN channels, attention and FFN as a whole, layers, the residual stream, experts.
"""


@dataclass
class HawAdaConfig(PeftConfig):
    """
    Configuration of a `HawAdaModel`: trainable sigmoid gates on a frozen transformer.

    Args:
        gates (`list[str]`, *optional*, defaults to `("heads", "ffn", "layers")`):
            What is gated when `target_modules` is left out: any of `"heads"` (one gate per query head), `"ffn"` (one
            per group of FFN channels), `"blocks"` (one per attention and one per FFN), `"layers"` (one per layer),
            `"hidden"` (one per group of channels of the residual stream, for the whole model), `"experts"` (one per
            routed expert).
        group_size (`int`, *optional*, defaults to `1`):
            Neighbouring FFN channels, channels of the residual stream, or input features of an explicitly targeted
            module, that share a gate. A slim FFN or hidden size is a multiple of it. Larger groups make smaller
            adapters and coarser choices.
        rotate (`bool`, *optional*, defaults to `False`):
            The gate on `"hidden"` acts on directions of the residual stream, not on its channels. Calibration batches
            say which (`init_basis`); they are saved with the adapter: 4 bytes for each pair of features (1.3 MB for
            576 of them, 17 MB for 2048).
        narrow_heads (`bool`, *optional*, defaults to `False`):
            A plan may keep fewer features in every attention head, the first ones of a basis inside each. Calibration
            batches say which (`init_basis`); they are saved with the adapter: 16 bytes for each pair of features of
            each head (1.8 MB for 12 layers of 12 heads of 32 features, 9.5 MB with heads of 64). There is nothing soft
            about it and nothing to train. For attention without rotary positions.
        temperature (`float`, *optional*, defaults to `1.0`):
            T in `g = sigmoid(theta / T)`.
        init_value (`float`, *optional*, defaults to `0.9`):
            The gates' value at the start. Gates act relative to it, so a fresh adapter changes nothing.
        init_weights (`bool`, *optional*, defaults to `True`):
            `False` starts the gates at random values, far from 1. Useful for tests only.
        target_modules (`list[str]` or `str`, *optional*):
            Left out, the gates are placed by the model's family row, and the adapter can be slimmed. As in PEFT the
            names found are written into the config, so another base model needs a new one. Given (names, a
            regular expression, or `"all-linear"`), every matched Linear, Conv1D or convolution gets one gate per
            `group_size` input features; such gates fold into the weights but remove nothing.
        exclude_modules (`list[str]` or `str`, *optional*): modules to leave out, names or a regular expression.
        modules_to_save (`list[str]`, *optional*): further modules to train and to save with the adapter.
        layers_to_transform (`list[int]` or `int`, *optional*): the layers to gate; all if left out. Not with
            `"hidden"`.
        layers_pattern (`list[str]` or `str`, *optional*): the name of the list of layers, if it is an unusual one.
        lora (`LoraConfig` or `dict`, *optional*): LoRA to train with the gates, on the same base, below them. It
            belongs to the same adapter: switched off, saved and merged with it. Kept as the fields that differ from
            PEFT's defaults.
        towers (`list[str]`, *optional*): of a model made of several, which to gate, by the paths of their sub-configs:
            `("text_config", "vision_config")`; of two stacks `("encoder", "decoder")`. If left out, all of which
            something can go, that with the most parameters in its layers first; with `"hidden"` that one alone.
        plan (`dict`, *optional*): the applied plan; written by `apply_plan`, saved with the adapter.
        plan_in_training (`bool`, *optional*, defaults to `False`): whether the plan closes gates in training as well.
        base_sizes (`dict`, *optional*): the sizes of the base model whose family row placed the gates; written at
            injection and compared when the adapter is loaded.

    Example:

        >>> from peft import get_peft_model
        >>> model = get_peft_model(base, HawAdaConfig(gates=("heads", "ffn"), group_size=8))
    """

    gates: Sequence[str] = field(
        default=("heads", "ffn", "layers"), metadata={"help": f"What is gated: any of {', '.join(GATES)}."}
    )
    group_size: int = field(default=1, metadata={"help": "FFN channels (or input features) that share a gate."})
    rotate: bool = field(
        default=False, metadata={"help": "The gate on hidden acts on directions of the stream, not its channels."}
    )
    narrow_heads: bool = field(
        default=False, metadata={"help": "A plan may keep fewer features in every head, in bases inside of them."}
    )
    temperature: float = field(default=GateStart.temperature, metadata={"help": "T in g = sigmoid(theta / T)."})
    init_value: float = field(default=GateStart.value, metadata={"help": "The gates' value at the start, in (0, 1)."})
    init_weights: bool = field(default=True, metadata={"help": "False: random gates, far from 1. For tests."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules whose input features are gated; the family's places if left out."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "The layers to gate."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The name of the list of layers."})
    lora: LoraConfig | dict[str, Any] | None = field(
        default=None, metadata={"help": "LoRA to train with the gates, below them."}
    )
    towers: Sequence[str] | None = field(
        default=None, metadata={"help": "Which towers to gate, by the paths of their sub-configs."}
    )
    plan: dict[str, Any] | None = field(default=None, metadata={"help": "The applied plan; written by apply_plan."})
    plan_in_training: bool = field(default=False, metadata={"help": "The plan closes gates in training as well."})
    base_sizes: dict[str, Any] | None = field(
        default=None, metadata={"help": "Sizes of the base model, written at injection and compared on loading."}
    )

    _saved: ClassVar[frozenset[str] | None] = None  # the tensors in the file that a config was read beside

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = list(self._type_problems())
        if problems:
            raise HawAdaError("\n".join(problems))
        self.peft_type = PeftType(NAME)
        self.gates = [self.gates] if isinstance(self.gates, str) else list(self.gates)  # as JSON gives it back
        if self.towers is not None:
            self.towers = [self.towers] if isinstance(self.towers, str) else list(self.towers)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.lora is not None:
            self.lora = lora_fields(self.lora)
        problems = list(self._problems())
        if problems:
            raise HawAdaError("\n".join(problems))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> HawAdaConfig:
        """
        As in PEFT, which calls it before it reads an adapter's weights.

        Raises:
            HawAdaError: if a field is of another type than it should be, or the weights beside it are not in a file
                that can be read.
        """
        config = cast(HawAdaConfig, super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs))
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        vars(config)["_saved"] = check_adapter_file(folder)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Write `adapter_config.json`, and say in the folder's `README.md` how the adapter is loaded.

        PEFT calls it for every adapter that it saves, after it has written its own card.

        Args:
            save_directory (`str`): the adapter's folder.
            kwargs: as in PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        write_adapter_card(save_directory, self.to_dict())

    def _type_problems(self) -> Iterator[str]:
        """Fields of a type that JSON, or a slip, may have brought: `_problems` takes them for granted."""
        strings = "a string, or a list of strings"
        for name in ("gates", "towers", "target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is None and name != "gates":
                continue
            if isinstance(value, str):
                pattern = name in ("target_modules", "exclude_modules")
                yield from _pattern_problems(name, value) if pattern else ()
            elif not isinstance(value, Sequence | set) or not all(isinstance(entry, str) for entry in value):
                yield f"{name} must be {strings}, got {_short(value)}"
        layers = self.layers_to_transform
        several = isinstance(layers, Sequence) and all(_is_int(layer) for layer in layers)
        if layers is not None and not _is_int(layers) and not several:
            yield f"layers_to_transform must be a whole number, or a list of them, got {_short(layers)}"
        for name in ("temperature", "init_value"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                yield f"{name} must be a number, got {_short(value)}"
        for name in ("init_weights", "plan_in_training", "inference_mode", "narrow_heads"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                yield f"{name} must be true or false, got {_short(value)}"
        if self.lora is not None and not isinstance(self.lora, LoraConfig | Mapping):
            yield f"lora must be a LoraConfig, or an object with its fields, got {_short(self.lora)}"
        if self.plan is not None and not isinstance(self.plan, Mapping):
            yield f"plan must be an object with the fields of a Plan, got {_short(self.plan)}"
        sizes = self.base_sizes
        if sizes is not None and not (
            isinstance(sizes, Mapping) and all(isinstance(size, str | int | float | None) for size in sizes.values())
        ):
            yield f"base_sizes must be an object of sizes by name, got {_short(sizes)}"

    def _problems(self) -> Any:
        unknown = [gate for gate in self.gates if not isinstance(gate, str) or gate not in GATES]
        if unknown:
            yield f"gates must be among {list(GATES)}, got {unknown}"
        if not self.gates:
            yield f"gates must name at least one of {list(GATES)}"
        if not unknown and len(set(self.gates)) < len(self.gates):
            yield f"gates must be named once each, got {list(self.gates)}"
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 1:
            yield f"group_size must be a whole number of at least 1, got {self.group_size!r}"
        try:
            self.start()
        except HawAdaError as error:
            yield str(error)
        if self.towers is not None and (not self.towers or len(set(self.towers)) < len(self.towers)):
            yield f"towers must name at least one tower, each once, got {list(self.towers)}"
        if self.towers and self.target_modules is not None and not self.base_sizes:
            yield "towers is about the gates that a family row places: leave out it or `target_modules`"
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            yield "`layers_to_transform` cannot be used when `target_modules` is a str."
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            yield "`layers_pattern` cannot be used when `target_modules` is a str."
        if "hidden" in self.gates and self.target_modules is None and self.layers_to_transform is not None:
            yield "the gate on 'hidden' is one for all layers: leave out either it or `layers_to_transform`"
        if self.rotate and ("hidden" not in self.gates or (self.target_modules is not None and not self.base_sizes)):
            yield "rotate is about the gate on 'hidden': add it to `gates`, and leave out `target_modules`"
        chosen = self.target_modules is not None or self.layers_to_transform is not None
        if self.narrow_heads and not self.base_sizes and chosen:
            yield "narrow_heads is about all layers: leave out `target_modules` and `layers_to_transform`"
        if self.layers_pattern and self.layers_to_transform is None:
            yield "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "

        if self.lora is not None:
            yield from lora_problems(self.lora)  # type: ignore[arg-type]  # a dict since __post_init__
            if self.target_modules is not None and self.base_sizes is None:
                yield "lora needs gates that the family row places: leave out `target_modules` of the gates"

    def start(self) -> GateStart:
        """How this configuration's gates start."""
        return GateStart(temperature=self.temperature, value=self.init_value, random=not self.init_weights)

    def check_base(self, layouts: Sequence[Layout]) -> None:
        """
        Check that the adapter was made for a model of these towers.

        Raises:
            IncompatibleBaseError: naming the sizes that differ.
        """
        found = base_sizes(layouts)
        differing = [
            f"{name}: adapter {size}, model {found.get(name)}"
            for name, size in (self.base_sizes or {}).items()
            if found.get(name) != size
        ]
        if differing:
            raise IncompatibleBaseError(
                f"the adapter was made for another base model ({'; '.join(differing)}); load that one, or make a new "
                "adapter with a new HawAdaConfig"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pattern_problems(name: str, pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        yield f"{name} must be a regular expression (or a list of names), got {_short(pattern)}: {error}"


def _short(value: Any) -> str:
    """A value for a message, at most 80 characters of it; nested too deep for that, its type."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
