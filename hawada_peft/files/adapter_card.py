"""The card of an adapter's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

from .atomic import write_text
from .markdown import code, place_of, prose, quoted
from .names import CARD_NAME

logger = logging.getLogger(__name__)

TAG = "hawada"
"""In the tags of every card that this package writes, so that it knows its own."""


HERE = "path/to/this/folder"


ADAPTER_HEADING = "## Load this adapter"


def write_adapter_card(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """
    Say in an adapter's card how it is loaded: PEFT does not know its type before `import hawada_peft`.

    What PEFT (or a person) has written there stays.

    Args:
        folder: the adapter's folder.
        config: the adapter's config, as in `adapter_config.json`.
    """
    path = Path(folder) / CARD_NAME
    fresh = ModelCardData(base_model=_base_id(config), library_name="peft").to_yaml()
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{fresh}\n---\n")
    except (ValueError, YAMLError) as error:
        logger.warning("%s is left as it is, its metadata cannot be read: %s", path, error)
        return
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    _hide_places(card, config)
    lines = card.text.splitlines()
    if ADAPTER_HEADING not in lines:
        title = next((index + 1 for index, line in enumerate(lines) if line.startswith("# ")), 0)
        lines[title:title] = ["", *_adapter_lines(config)]
        card.text = "\n".join(lines) + "\n"
    write_text(path, str(card))


def _hide_places(card: ModelCard, config: Mapping[str, Any]) -> None:
    """Of a base that is a folder PEFT writes the whole path into the metadata and its tags: a card is for others."""
    base = config.get("base_model_name_or_path")
    if not base or _base_id(config) is not None:
        return
    if card.data.get("base_model") == base:
        card.data.pop("base_model")
    card.data["tags"] = [tag for tag in card.data["tags"] if base not in tag]
    card.text = card.text.replace(base, code(place_of(base)))


def _base_id(config: Mapping[str, Any]) -> str | None:
    """The base model's id; None if it is a folder, or not known."""
    base: str | None = config.get("base_model_name_or_path")
    return base if base and place_of(base) == base and not Path(base).is_dir() else None


def _adapter_lines(config: Mapping[str, Any]) -> list[str]:
    base = _base_id(config) or "path/to/the/base/model"
    sizes = config.get("base_sizes")
    made_for = (
        [f"The base model must have these sizes: {', '.join(prose(f'{k} {v}') for k, v in sizes.items())}.", ""]
        if sizes
        else []
    )
    merge = (
        "A plan is applied: `merge_and_unload` gives the smaller model."
        if config.get("plan")
        else "No plan is applied yet: `model.apply_plan(model.plan(keep_ratio=0.5))` closes what is to go."
    )
    return [
        ADAPTER_HEADING,
        "",
        "These are gates of hawada_peft on a frozen base model. Import the package before PEFT loads them: without it "
        "PEFT says `KeyError: 'HAWADA'`.",
        "",
        "```python",
        "import hawada_peft  # makes the adapter type known to PEFT",
        "from peft import PeftModel",
        "from transformers import AutoModel  # or the AutoModelFor... class of the task",
        "",
        f"base = AutoModel.from_pretrained({quoted(base)})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "slim = model.merge_and_unload()  # a vanilla transformers model",
        "```",
        "",
        *made_for,
        f"{merge} A slim model needs neither this package nor PEFT.",
    ]
