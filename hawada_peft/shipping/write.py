"""The card and the report of a slim folder, written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..errors import HawAdaError
from ..files.adapter_card import TAG
from ..files.atomic import write_text
from ..files.digests import digests_of
from ..files.names import CARD_NAME, REPORT_NAME
from ..latency.timing import Timing
from ..vanilla.skeleton import skeleton_of
from .card import slim_card
from .checks import Verification
from .facts import ExportFacts, QualityChange, metadata_of
from .figures import latency_facts
from .report import read_report, report_of

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
    _check_own(folder / CARD_NAME)
    report = checked_report(skeleton_of(AutoConfig.from_pretrained(folder)), facts, verification)
    _write(folder, report)


def add_to_report(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    quality: Sequence[QualityChange] = (),
    latency: Mapping[str, Timing] | None = None,
) -> dict[str, Any]:
    """
    Write later measurements into a slim folder's report and card. What was measured of the same on the same data is
    replaced; a folder without a report gets one.

    Args:
        folder: of the slim model.
        base: the dense model, for a folder without a report.
        quality: before and after.
        latency: timings of `"dense"` and `"slim"`, side by side.

    Returns:
        The report, as it is now.

    Raises:
        FileExistsError: if there is a README.md that this package has not written.
        HawAdaError: if the report is none.
        IncompatibleTableError: if the two were not timed alike.
    """
    folder = Path(folder)
    _check_own(folder / CARD_NAME)
    report = read_report(folder)
    if report is None:
        facts = ExportFacts(base=base)
        report = checked_report(skeleton_of(AutoConfig.from_pretrained(folder)), facts)
    if latency is not None:
        report["latency"] = latency_facts(latency)
    if quality:
        measured = {(each.name, each.data) for each in quality}
        kept = [each for each in report.get("quality") or [] if (each["name"], each["data"]) not in measured]
        report["quality"] = kept + [asdict(each) for each in quality]
    _write(folder, report)
    return report


def _check_own(card: Path) -> None:
    if card.is_file() and TAG not in (metadata_of(card).get("tags") or []):
        raise FileExistsError(f"{card} was not written by this package; move it away first")


def _write(folder: Path, report: dict[str, Any]) -> None:
    processors = [name for name, file in PROCESSOR_FILES.items() if (folder / file).is_file()]
    card = slim_card(report, processors)
    write_text(folder / REPORT_NAME, _json(report | {"files": digests_of(folder)}))
    write_text(folder / CARD_NAME, str(card))


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
