"""The card and the report of a slim folder, written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..errors import HawAdaError
from ..files.adapter_card import TAG
from ..files.atomic import write_text
from ..files.digests import digests_of
from ..files.names import CARD_NAME, REPORT_NAME
from ..vanilla.skeleton import skeleton_of
from .card import slim_card
from .checks import Verification
from .facts import ExportFacts, metadata_of
from .report import report_of

PROCESSOR_FILES = {"tokenizer": "tokenizer_config.json", "image_processor": "preprocessor_config.json"}


def write_card(
    folder: str | os.PathLike[str], facts: ExportFacts | None = None, verification: Verification | None = None
) -> None:
    """
    Write `README.md` and `hawada_report.json` into a slim model's folder. No weights are read.

    Args:
        folder: holds a `config.json`.
        facts (`ExportFacts`, *optional*): what is known beside it.
        verification (`Verification`, *optional*): of `verify_slim` on this folder.

    Raises:
        FileExistsError: if there is a README.md that this package has not written.
        HawAdaError: if the facts contradict the folder; see `ExportFacts`.
    """
    folder, facts = Path(folder), facts or ExportFacts()
    card_file = folder / CARD_NAME
    if card_file.is_file() and TAG not in (metadata_of(card_file).get("tags") or []):
        raise FileExistsError(f"{card_file} was not written by this package; move it away first")
    report = checked_report(skeleton_of(AutoConfig.from_pretrained(folder)), facts, verification)
    processors = [name for name, file in PROCESSOR_FILES.items() if (folder / file).is_file()]
    card = slim_card(report, processors)
    write_text(folder / REPORT_NAME, _json(report | {"files": digests_of(folder)}))
    write_text(card_file, str(card))


def checked_report(
    model: PreTrainedModel, facts: ExportFacts, verification: Verification | None = None
) -> dict[str, Any]:
    """
    The report, which fits into JSON.

    Args:
        model: the slim model, or its skeleton.
        facts: what is known beside it.
        verification: of its folder.

    Raises:
        HawAdaError: if the facts contradict the model, or do not fit into JSON.
    """
    report = report_of(model, facts, verification)
    _json(report)
    return report


def _json(report: dict[str, Any]) -> str:
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise HawAdaError(f"the facts about the export do not fit into JSON: {error}") from None
