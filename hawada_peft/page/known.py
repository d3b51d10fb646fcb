"""What is known of a slim folder: its report, how its gates were trained, its peers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import HawAdaError
from ..files.names import REPORT_NAME
from ..planning.plan import Plan
from ..training.history import HISTORY_FILE
from ..vanilla.shape import FFN, HEADS

NO_SEARCH = "Pass the file that `hawada plan` leaves beside the plan"
AGREEMENT = "predictions that are the dense model's, in %"
"""The measure of quality that says nothing of other models."""

WEIGHT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Peer:
    """
    Another model to compare with: one line of a peers file.

    Args:
        name (`str`): what it is.
        quality (`float`): by the same measure as the slim model's.
        latency_ms (`float`, *optional*): under the same regime on the same device.
        speedup (`float`, *optional*): instead: over the same dense model.
        measure (`str`, *optional*): the name of the measure of quality; that of the page if left out.

    Raises:
        HawAdaError: if a number is not finite or not above 0, or not exactly one of both latencies is given.
    """

    name: str
    quality: float
    latency_ms: float | None = None
    speedup: float | None = None
    measure: str | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.latency_ms, self.speedup) if value is not None]
        numbers = [self.quality, *given]
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n)]
        if not isinstance(self.name, str) or wrong or len(given) != 1 or not given[0] > 0:
            raise HawAdaError(
                "a peer needs a name, a finite quality, and one of latency_ms and speedup, above 0; got "
                f"{ {field.name: getattr(self, field.name) for field in fields(self)} }"
            )

    def ms(self, dense_ms: float) -> float:
        """Its latency in milliseconds, beside a dense model of so many."""
        return self.latency_ms if self.latency_ms is not None else dense_ms / float(self.speedup or 1)


@dataclass(frozen=True)
class SlimFacts:
    """
    What is known of a slim folder.

    Args:
        folder (`Path`): the slim model's.
        report (`dict`): `hawada_report.json`.
        history (`dict`, *optional*): `gate_history.json`.
        peers (`tuple[Peer, ...]`): other models.
        planned (`dict`, *optional*): the search's own file.
    """

    folder: Path
    report: Mapping[str, Any]
    history: Mapping[str, Any] | None = None
    peers: Sequence[Peer] = ()
    planned: Mapping[str, Any] | None = None

    @property
    def search(self) -> Mapping[str, Any] | None:
        """The search that chose the shape."""
        return self.report.get("search") or (self.history or {}).get("search") or self.planned

    @property
    def race(self) -> Mapping[str, Any] | None:
        """The race that chose the plan, once it is over."""
        race = self.report.get("race")
        return race if race and race["winner"] is not None else None

    @property
    def depth(self) -> Mapping[str, Any] | None:
        """What the search found that dropping each layer costs."""
        return (self.search or {}).get("depth") or None

    @property
    def dropped(self) -> set[int]:
        """Dense layers that are gone."""
        plan = self.plan
        return set() if plan is None else set(range(plan.dense.sizes()["num_hidden_layers"])) - set(plan.layers)

    @property
    def plan(self) -> Plan | None:
        """What was kept."""
        return Plan.from_dict(self.report["plan"]) if "plan" in self.report else None

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        """The gates over training, if there is more than one moment of it."""
        entries = (self.history or {}).get("entries", [])
        return entries if len(entries) > 1 else []

    @property
    def qualities(self) -> list[Mapping[str, Any]]:
        """Measures of quality, those that say something of other models first."""
        return sorted(self.report.get("quality", []), key=lambda change: change["name"] == AGREEMENT)

    @property
    def measured_peers(self) -> list[Peer]:
        """The peers that can stand beside the slim model: its latency and a measure of quality are known."""
        if "latency" not in self.report or not self.qualities:
            return []
        return [peer for peer in self.peers if peer.measure in (None, self.qualities[0]["name"])]


def read_facts(
    slim: str | os.PathLike[str],
    training: str | os.PathLike[str] | None = None,
    peers: str | os.PathLike[str] | None = None,
    search: str | os.PathLike[str] | None = None,
) -> SlimFacts:
    """
    Read what is known; arguments and errors as in `write_report`.
    """
    folder = Path(slim)
    path = folder / REPORT_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not path.is_file():
        raise HawAdaError(f"{folder} holds no {REPORT_NAME}, which every export of a slim model writes: is it one?")
    facts = SlimFacts(
        folder,
        _json(path),
        _history(folder, training),
        () if peers is None else read_peers(peers),
        None if search is None else _search(Path(search)),
    )
    if facts.planned is not None and facts.plan is not None:
        shape = facts.plan.shape.to_dict()
        if all(point["shape"] != shape for point in facts.planned["points"]):
            raise HawAdaError(
                f"{search} is the search for another model: the shape of {folder}, {shape}, is not in it; pass the "
                "file beside the plan that the folder was made with"
            )
    return facts


def read_peers(path: str | os.PathLike[str]) -> tuple[Peer, ...]:
    """
    Peers from a file of JSON lines, each with the fields of `Peer`; empty lines do not count.

    Raises:
        FileNotFoundError: if there is no such file.
        HawAdaError: naming the line that is not a peer.
    """
    found, allowed = [], {field.name for field in fields(Peer)}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if not isinstance(data, dict) or not {"name", "quality"} <= set(data) <= allowed:
                raise HawAdaError(f"an object with name, quality and some of {sorted(allowed)} is needed, got {line}")
            found.append(Peer(**data))
        except (json.JSONDecodeError, HawAdaError) as error:
            raise HawAdaError(f"{path}, line {number}: {error}") from None
    return tuple(found)


def _search(path: Path) -> Mapping[str, Any]:
    try:
        found = _json(path)
    except HawAdaError as error:
        raise HawAdaError(f"{error}. {NO_SEARCH}") from None
    if not isinstance(found.get("points"), list):
        raise HawAdaError(f"{path} holds no search. {NO_SEARCH}")
    return found


def _history(folder: Path, training: str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    root = folder.absolute().parent if training is None else Path(training)
    places = [root / HISTORY_FILE, root / "gates" / HISTORY_FILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None and training is not None:
        raise HawAdaError(
            f"{root} holds no {HISTORY_FILE}: pass the output folder of a recipe, or of a `HawAdaTrainer` that has "
            "ended"
        )
    if found is None:
        return None
    history = _json(found)
    if not fits(history, folder):
        if training is None:
            return None  # of another model that happens to lie beside it
        raise HawAdaError(f"{found} is of a model with another number of layers than {folder} was cut from")
    return history


def fits(history: Mapping[str, Any], folder: Path) -> bool:
    """Whether a history is of a model with as many layers as the dense one, as far as that is known."""
    dense = _json(folder / REPORT_NAME).get("dense")
    counts = {len(entry[axis]["keep"]) for entry in history["entries"][-1:] for axis in (HEADS, FFN) if axis in entry}
    return dense is None or counts <= {dense["num_hidden_layers"]}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise HawAdaError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict) or data.get("format") != 1:
        raise HawAdaError(f"{path} is of a format that this version cannot read; it reads 1")
    return data
