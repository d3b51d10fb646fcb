"""What stands for a model or an adapter: a folder, or an id on the Hub, which is never asked for folders."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UnsupportedModelError

MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
KINDS = {MODEL_FILE: "a model", ADAPTER_FILE: "an adapter"}
"""Which file makes a folder what it is."""

TIMEOUT = 10.0
"""Seconds that the Hub may take to say whether it has a name."""


def check_source(name: str | os.PathLike[str], file: str = MODEL_FILE) -> None:
    """
    Check that a model or an adapter is there, before a library looks for it: those ask the Hub for whatever is no
    folder of theirs, again and again, and report that it could not be reached.

    Args:
        name: a folder, or an id on the Hub.
        file: what must be in it: `MODEL_FILE` or `ADAPTER_FILE`.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a model on the Hub, or in its cache.
        UnsupportedModelError: if the folder holds something else.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return
        (other,) = KINDS.keys() - {file}
        swapped = f", but {KINDS[other]}: name the dense model first, then its adapter"
        found = swapped if (folder / other).is_file() else f": there is no {file} in it"
        raise UnsupportedModelError(f"the folder {name} does not hold {KINDS[file]}{found}")
    missing = f"there is no folder {name}"
    if folder.is_file():
        raise FileNotFoundError(f"{missing}: it is a file, and {KINDS[file]} is a folder")
    if folder.is_absolute() or name.startswith((".", "~")) or (len(folder.parts) > 1 and folder.parent.is_dir()):
        raise FileNotFoundError(missing)
    # Here: a folder is looked at without the Hub's client.
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # Of the HTTP library that the client is built on: not the same one in all versions.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        HfApi().model_info(name, timeout=TIMEOUT)
    except (HFValidationError, http_error, OfflineModeIsEnabled, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{missing}, and no model {name} that the Hub or its cache could give: {why}"
        ) from None
