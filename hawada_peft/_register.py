"""Makes the tuner type known to PEFT: the package's only global effect.

PEFT's registry accepts names that are members of the `PeftType` enum only, and an enum cannot be extended in public.
So a real member is put into the enum's tables, once, before PEFT's own `register_peft_method` is called.
"""

from __future__ import annotations

from enum import EnumMeta
from typing import Any

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method

from .errors import RegistrationError

NAME = "HAWADA"
PREFIX = "hawada_"


def _load_member(name: str) -> PeftType:
    """Unpickles a member: importing this module has registered it by the time this runs."""
    return PeftType(name)


def _add_member() -> PeftType:
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    # A process that has not imported this package unpickles by this route, and so imports it.
    member.__reduce_ex__ = lambda protocol: (_load_member, (NAME,))
    type.__setattr__(PeftType, NAME, member)  # EnumMeta refuses; Python 3.12 and later look here
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable: list[str] | None = PeftType.__dict__.get("_hashable_values_")  # Python 3.12 and later
    if hashable is not None:
        hashable.append(NAME)
    return member


def _check(member: PeftType, config_cls: type, model_cls: type) -> None:
    facts = {
        "PeftType(value)": PeftType(NAME) is member,
        "PeftType[name]": PeftType[NAME] is member,
        "PeftType.name": getattr(PeftType, NAME, None) is member,
        "iteration": member in list(PeftType),
        "type": isinstance(member, PeftType) and isinstance(PeftType, EnumMeta) and member.value == NAME,
        "config class": PEFT_TYPE_TO_CONFIG_MAPPING.get(member) is config_cls,
        "model class": PEFT_TYPE_TO_TUNER_MAPPING.get(member) is model_cls,
        "prefix": PEFT_TYPE_TO_PREFIX_MAPPING.get(member) == PREFIX,
    }
    failed = [what for what, holds in facts.items() if not holds]
    if failed:
        raise RegistrationError(
            f"PEFT does not know the tuner type {NAME!r} after registration; failed: {', '.join(failed)}. "
            "Check that the installed peft version is a supported one (0.21 or later)."
        )


def _qualified(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def register(config_cls: type, model_cls: type) -> PeftType:
    """
    Register the tuner with PEFT. Idempotent: a second import or a reload registers the newest classes.

    Args:
        config_cls (`type`): the `PeftConfig` subclass.
        model_cls (`type`): the `BaseTuner` subclass.

    Returns:
        `PeftType`: the member.

    Raises:
        RegistrationError: if another package owns the name, or PEFT does not find what was registered.
    """
    member = PeftType[NAME] if NAME in PeftType.__members__ else _add_member()
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if present is None:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=False
        )
    elif _qualified(present) == _qualified(config_cls):
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    else:
        raise RegistrationError(
            f"The PEFT method {NAME!r} is already registered by {present.__module__}.{present.__qualname__}; "
            "uninstall that package, or use its implementation."
        )
    _check(member, config_cls, model_cls)
    return member
