"""From a slim folder to a page."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from . import figures
from .drawing import write_pngs
from .dropped import dropped_picture
from .html import page
from .known import read_facts
from .layer_map import kept
from .rungs import race_picture
from .stages import stages_picture

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """
    What `write_report` wrote.

    Args:
        page (`Path`): the HTML file; it needs nothing beside it.
        pictures (`list[Path]`): the PNG files.
    """

    page: Path
    pictures: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        return {"page": str(found["page"]), "pictures": [str(path) for path in found["pictures"]]}

    def __str__(self) -> str:
        return "\n".join(str(path) for path in (self.page, *self.pictures))


def write_report(
    slim: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    training: str | os.PathLike[str] | None = None,
    search: str | os.PathLike[str] | None = None,
    peers: str | os.PathLike[str] | None = None,
    pictures: bool = True,
) -> WrittenReport:
    """
    Write what is known of a slim model as one HTML page, and its pictures as PNG files beside it.

    The page needs no network and no other file. What is not known is left out, and the page says how to get it.

    Args:
        slim: a folder with `hawada_report.json`, as `save_slim(card=...)`, `train_recipe` and `slim_checkpoint` write
            it.
        output: folder for `report.html` and the pictures; made if it does not exist, files of the same names are
            replaced. `NAME-report` beside the slim folder if left out.
        training: folder with `gate_history.json`: a recipe's output folder, or that of a `HawAdaTrainer`. Found
            without it where the slim folder lies in a recipe's output folder.
        search: the file that `hawada plan` leaves beside the plan, where the slim folder's report holds no search.
        peers: a file of JSON lines, each with `name`, `quality`, and `latency_ms` or `speedup`; `measure` where the
            quality is not the first measure of the page.
        pictures: draw them; needs matplotlib (`pip install 'hawada_peft[report]'`).

    Returns:
        `WrittenReport`: the paths.

    Raises:
        HawAdaError: if the slim folder holds no report, a file is damaged or of another model, a line of the peers is
            not a peer, or matplotlib is missing.
        FileNotFoundError: if there is no such peers or search file.
    """
    facts = read_facts(slim, training, peers, search)
    folder = Path(slim).absolute()
    target = folder.with_name(f"{folder.name}-report") if output is None else Path(output)
    makers = (
        figures.milliseconds,
        figures.frontier,
        dropped_picture,
        race_picture,
        stages_picture,
        figures.peers,
        kept,
        figures.gates,
        figures.training,
    )
    drawers = makers if pictures else ()
    drawn = [picture for draw in drawers if (picture := draw(facts)) is not None]
    text = page(facts, {picture.name: picture for picture in drawn})
    target.mkdir(parents=True, exist_ok=True)
    path = target / PAGE_NAME
    write_text(path, text)
    return WrittenReport(path, write_pngs(drawn, target))
