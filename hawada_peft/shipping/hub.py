"""A slim folder made ready for the Hub, and put there."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi


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
    check_complete(folder)
    api = HfApi() if api is None else api
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )


def check_complete(folder: str | os.PathLike[str]) -> None:
    """
    Check that a folder can be put on the Hub.

    Raises:
        FileNotFoundError: if it lacks a config or weights.
    """
    missing = [what for what in ("config.json", "*.safetensors") if not any(Path(folder).glob(what))]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {missing}: pass a folder that `save_slim` has written")
