"""A slim folder made ready for the Hub, and put there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import AutoConfig, PreTrainedModel

from ..errors import HawAdaError
from .facts import CARD_NAME, REPORT_NAME, ExportFacts
from .model_card import TAG, slim_card
from .report import report_of
from .skeleton import skeleton_of

if TYPE_CHECKING:
    from .verify import Verification

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
    if card_file.is_file() and TAG not in (ModelCard.load(card_file, ignore_metadata_errors=True).data.tags or []):
        raise FileExistsError(f"{card_file} was not written by this package; move it away first")
    report, text = checked_report(skeleton_of(AutoConfig.from_pretrained(folder)), facts, verification)
    processors = [name for name, file in PROCESSOR_FILES.items() if (folder / file).is_file()]
    (folder / REPORT_NAME).write_text(text, encoding="utf-8")
    slim_card(report, processors).save(card_file)


def checked_report(
    model: PreTrainedModel, facts: ExportFacts, verification: Verification | None = None
) -> tuple[dict[str, Any], str]:
    """
    The report and its JSON text.

    Args:
        model: the slim model, or its skeleton.
        facts: what is known beside it.
        verification: of its folder.

    Raises:
        HawAdaError: if the facts contradict the model, or do not fit into JSON.
    """
    report = report_of(model, facts, verification)
    try:
        return report, json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise HawAdaError(f"the facts about the export do not fit into JSON: {error}") from None


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload slim model",
    create_pr: bool = False,
    api: HfApi | None = None,
) -> CommitInfo:
    """
    Upload a slim model's folder as one commit. The repository is made if it does not exist.

    Args:
        folder: a complete folder, as `save_slim` leaves it.
        repo_id: `"name/model"`.
        private: of a new repository; the organisation's default if left out.
        revision: the branch; the main one if left out.
        commit_message: its first line.
        create_pr: as a pull request instead of to the branch.
        api (`huggingface_hub.HfApi`, *optional*): with another token or endpoint than the environment's.

    Raises:
        FileNotFoundError: if the folder lacks a config or weights.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses.
    """
    folder = Path(folder)
    missing = [what for what in ("config.json", "*.safetensors") if not any(folder.glob(what))]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}: pass a folder that `save_slim` has written")
    api = HfApi() if api is None else api
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
