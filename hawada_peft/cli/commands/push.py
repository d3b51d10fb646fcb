"""`hawada push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import say
from ..options import Said, Slim
from ..tables import table

EXAMPLES = (
    "hawada push ./slim name/model --dry-run",
    "hawada push ./slim name/model --private --yes",
)


def run(
    slim: Slim,
    repository: Annotated[str, typer.Argument(help="On the Hub, as NAME/MODEL; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository: for its owner alone.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; the main one if left out.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> Said:
    """
    Put a slim folder on the Hub, after showing what will be public.

    The token is that of `hf auth login`.
    """
    from ...shipping.hub import check_complete, push_to_hub

    check_complete(slim)
    files = {str(path.relative_to(slim)): path.stat().st_size for path in sorted(slim.rglob("*")) if path.is_file()}
    shown = f"{_files(files)}\n{_metadata(slim)}"
    where = f"https://huggingface.co/{repository}" + (" (private, if it is new)" if private else "")
    facts = {"repository": repository, "files": files, "private": private}
    if dry_run:
        return Said(f"{shown}\nwould be put at {where}", facts)
    if not yes:
        say(shown)
        if not typer.confirm(f"Put these at {where}?", err=True):
            return Said("nothing was put anywhere", facts | {"url": None}, ok=False)
    info = push_to_hub(slim, repository, private=private or None, revision=revision, create_pr=create_pr)
    return Said(f"{info.commit_url}", facts | {"url": str(info.commit_url)})


def _files(files: dict[str, int]) -> str:
    total = sum(files.values())
    return table(["file", "bytes"], [*((name, f"{size:,}") for name, size in files.items()), ("all", f"{total:,}")])


def _metadata(slim: Path) -> str:
    """What the card says to the Hub, or that there is none."""
    from ...files.names import CARD_NAME
    from ...shipping.facts import metadata_of

    card = slim / CARD_NAME
    if not card.is_file():
        return "without a card: `hawada evaluate` writes one"
    known = metadata_of(card)
    names = ("base_model", "license", "language", "pipeline_tag", "tags")
    return "\n".join(f"{name}: {known.get(name, 'not given')}" for name in names)
