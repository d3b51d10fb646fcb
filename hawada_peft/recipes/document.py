"""YAML that people write: of bounded size, without what multiplies, hides or is said twice."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import HawAdaError

MOST_BYTES, MOST_DEPTH, MOST_DIGITS = 2**20, 16, 64
"""Of a file, of mappings and lists within each other, and of a number."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (PyYAML takes `1e-4` for a word), no aliases, and no name twice in a mapping."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases are not taken, and *{event.anchor} is one: write the value out", event.start_mark
            )
        self.depth += 1
        if self.depth > MOST_DEPTH:
            message = f"mappings and lists within each other are taken {MOST_DEPTH} deep at most"
            raise yaml.composer.ComposerError(None, None, message, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
        if (
            isinstance(node, yaml.ScalarNode)
            and node.tag.endswith((":int", ":float"))
            and len(node.value) > MOST_DIGITS
        ):
            message = f"a number of {len(node.value)} characters; {MOST_DIGITS} are taken at most"
            raise yaml.composer.ComposerError(None, None, message, node.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _check_names(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise yaml.constructor.ConstructorError(None, None, "names must be words", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value!r} is there twice: leave one of them out", key.start_mark
            )
        seen.add(key.value)


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The mapping in a YAML file.

    Args:
        path: the file.

    Raises:
        HawAdaError: if it is too large, no YAML, or holds something else; or aliases, or a name twice.
        FileNotFoundError: if there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise HawAdaError(f"{file} has {size:,} bytes: recipes of {MOST_BYTES:,} at most are read")
    try:
        data = parsed(file.read_text(encoding="utf-8"), file)
    except UnicodeDecodeError as error:
        raise HawAdaError(f"{file} is no text in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise HawAdaError(f"{file} must hold a mapping of names to values, got a {type(data).__name__}")
    return data


def parsed(text: str, source: object) -> Any:
    """
    A value written in YAML.

    Args:
        text: it.
        source: for the message.

    Raises:
        HawAdaError: if it is none, or holds what is not taken.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise HawAdaError(f"{source} is no YAML that is taken: {error}") from None


def override(data: dict[str, Any], text: str) -> None:
    """
    Set one value of nested mappings.

    Args:
        data: the mapping, changed in place.
        text: `"section.name=value"`, the value as YAML; `null` takes the name out.

    Raises:
        HawAdaError: if it is not written like that, or a section on the way is none.
    """
    path, equals, value = text.partition("=")
    *outer, last = path.strip().split(".")
    if not equals or not last or "" in outer:
        raise HawAdaError(f"an override must be written as section.name=value, got {shown(text)}")
    for index, name in enumerate(outer):
        inner = data.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise HawAdaError(
                f"{shown(text)}: {'.'.join(outer[: index + 1])} is {shown(inner)}, and holds no {last!r}"
            )
        data[name] = inner or {}
        data = data[name]
    data[last] = parsed(value, shown(text))
    if data[last] is None:
        del data[last]


def shown(value: Any) -> str:
    """A value in a message: not all of it if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
