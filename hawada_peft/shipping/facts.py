"""What is known about an export and cannot be read off the slim folder."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import HawAdaError
from ..files.names import CARD_NAME
from ..latency.table import LatencyTable
from ..planning.plan import Plan
from ..race.record import RaceRecord
from ..search.result import SearchResult
from .figures import Latency
from .passport import PassportLine

logger = logging.getLogger(__name__)

CARD_FIELDS = ("license", "license_name", "license_link", "language")
"""What a slim model's card takes over from the base model's."""


@dataclass(frozen=True)
class QualityChange:
    """
    A measure of quality before and after.

    Args:
        name (`str`): what was measured: `"perplexity"`, `"accuracy in %"`.
        dense (`float`): of the dense model.
        slim (`float`): of the slim model.
        data (`str`): on what: `"200 held-out windows of 512 tokens"`.

    Raises:
        HawAdaError: if a value is not a finite number.
    """

    name: str
    dense: float
    slim: float
    data: str

    def __post_init__(self) -> None:
        wrong = [value for value in (self.dense, self.slim) if not math.isfinite(value)]
        if wrong:
            raise HawAdaError(f"{self.name}: the quality of the dense and the slim model must be finite, got {wrong}")


@dataclass(frozen=True)
class ExportFacts:
    """
    What is known about an export and cannot be read off the slim folder. What is left out is left out of the card and
    the report.

    Args:
        base (`str` or path, *optional*): the dense model: its id on the Hub, or its folder. A folder's (or a cached
            repository's) own card gives the licence and the language.
        plan (`Plan`, *optional*): what was kept.
        latency (*optional*): a `SearchResult`; or timings by `measure_many` under the names `"dense"` and `"slim"`; or
            a `LatencyTable`, whose estimate is then called an estimate.
        search (*optional*): the search that chose the shape: a `SearchResult`, as `HawAdaTrainer.search`, or its
            `figures()`. The `SearchResult` in `latency` if left out.
        race (*optional*): the race that chose the plan: a `RaceRecord`, or what its `to_dict` gave.
        quality (`tuple[QualityChange, ...]`): before and after.
        reconstruction (*optional*): a dataclass or a mapping with what reconstruction reported.
        losses (`dict`): held-out distillation losses by step: `gates`, `recovery_start`, `recovery_end`.
        calibration (`dict`, *optional*): what the data for importance or reconstruction was: `calibration_facts`.
        checked (`tuple[PassportLine, ...]`): runtimes that the slim model was run in: `check_compile`, `check_onnx`.
        license (`str`, *optional*): instead of the base model's.
        repo_id (`str`, *optional*): where the slim model will be; stands in the card's example.
    """

    base: str | os.PathLike[str] | None = None
    plan: Plan | None = None
    latency: Latency | None = None
    search: SearchResult | Mapping[str, Any] | None = None
    race: RaceRecord | Mapping[str, Any] | None = None
    quality: Sequence[QualityChange] = ()
    reconstruction: Any = None
    losses: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    checked: Sequence[PassportLine] = ()
    license: str | None = None
    repo_id: str | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[Any, str]] = {
            "base": (str | os.PathLike, "an id or a path"),
            "plan": (Plan, "a Plan"),
            "latency": (SearchResult | LatencyTable | Mapping, "a SearchResult, a LatencyTable or timings"),
            "search": (SearchResult | Mapping, "a SearchResult, or its `figures()`"),
            "calibration": (Mapping, "a mapping, as `calibration_facts` gives it"),
            "license": (str, "a string"),
            "repo_id": (str, "a string"),
        }
        problems = [
            f"{name} must be {words}, got {getattr(self, name)!r:.80}"
            for name, (kind, words) in kinds.items()
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind)
        ]
        for name, kind in (("quality", QualityChange), ("checked", PassportLine)):
            several = getattr(self, name)
            if not isinstance(several, Sequence) or not all(isinstance(entry, kind) for entry in several):
                problems.append(f"{name} must be a list of {kind.__name__}, got {several!r:.80}")
        if isinstance(self.license, str) and not re.fullmatch(r"[\w.+-]{1,96}", self.license):
            problems.append(f"license must be an identifier such as 'apache-2.0', got {self.license!r:.80}")
        if problems:
            raise HawAdaError("\n".join(problems))


def calibration_facts(batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """
    What calibration data was, without the data: so that it can be told from evaluation data later.

    Args:
        batches: keyword arguments of the forward pass, each (examples, ...).

    Returns:
        `{"examples": ..., "batches": ..., "sha256": ...}`: the hash is of names, dtypes, shapes and bytes, in order.
    """
    digest, examples, count = hashlib.sha256(), 0, 0
    for batch in batches:
        rows = 0
        for name, tensor in sorted(batch.items()):
            if not isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor!r};".encode())
                continue
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
            rows = len(plain) if plain.ndim else rows
        examples, count = examples + rows, count + 1
    return {"examples": examples, "batches": count, "sha256": digest.hexdigest()}


def base_facts(facts: ExportFacts) -> dict[str, Any]:
    """
    The base model's name, its id on the Hub if it has one, and what its card says of licence and language.

    Nothing is downloaded: a card is read from the folder, or from the cache.
    """
    found: dict[str, Any] = {}
    if facts.base is not None:
        folder = Path(facts.base)
        if folder.is_dir():
            found["name"] = folder.resolve().name
            card: Any = folder / CARD_NAME
        else:
            found["name"] = found["id"] = str(facts.base)
            try:
                card = try_to_load_from_cache(str(facts.base), CARD_NAME)
            except HFValidationError as error:
                raise HawAdaError(
                    f"base must be a folder that exists or the id of a model on the Hub, got {facts.base!r}: {error}"
                ) from None
        if isinstance(card, str | Path) and Path(card).is_file():
            data = metadata_of(Path(card))
            found |= {name: data[name] for name in CARD_FIELDS if _is_text(data.get(name))}
    if facts.license is not None:
        found = {name: value for name, value in found.items() if not name.startswith("license")}
        found["license"] = facts.license
    return found


def metadata_of(card: Path) -> dict[str, Any]:
    """The metadata of a model card; none if it is broken, which is someone else's affair."""
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, AttributeError, YAMLError, OSError) as error:
        logger.info("%s has no metadata that can be read: %s", card, error)
        return {}


def _is_text(value: Any) -> bool:
    """A string, or a list of them, as the metadata of a card may be."""
    several = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return bool(value) and (isinstance(value, str) or several)


def known_base(name: str | None) -> str | None:
    """A model's `name_or_path` if it is a folder that exists or a repository in the cache; it may be anything else."""
    if not name or Path(name).is_dir():
        return name or None
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def race_facts(facts: ExportFacts) -> dict[str, Any] | None:
    """The race that chose the plan, for JSON, without the plans of those that lost; None if there was none."""
    if facts.race is None:
        return None
    race = facts.race.to_dict() if isinstance(facts.race, RaceRecord) else dict(facts.race)
    entrants = [{name: value for name, value in each.items() if name != "plan"} for each in race["entrants"]]
    return race | {"entrants": entrants}


def search_facts(facts: ExportFacts) -> dict[str, Any] | None:
    """The search that chose the shape, for JSON; None if nothing is known of one."""
    search = facts.search
    if search is None and isinstance(facts.latency, SearchResult):
        search = facts.latency
    if isinstance(search, SearchResult):
        return search.figures()
    return None if search is None else dict(search)


def plain_facts(reported: Any) -> dict[str, Any]:
    """What reconstruction reported, as a dictionary; `HawAdaError` if it is neither a dataclass nor a mapping."""
    if dataclasses.is_dataclass(reported) and not isinstance(reported, type):
        return dataclasses.asdict(reported)
    if isinstance(reported, Mapping):
        return dict(reported)
    raise HawAdaError(f"reconstruction must be a dataclass or a mapping, got a {type(reported).__name__}")
