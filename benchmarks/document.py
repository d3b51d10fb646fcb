"""Sections of a Markdown page that a benchmark writes; the rest of the page is left as it is."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "hawada_peft")


def replace_section(page: Path, name: str, text: str) -> None:
    """
    Put `text` between the page's markers of that name; a page without them gets them, at its end.

    A marker is `<!-- begin NAME -->` or `<!-- end NAME -->`, alone on its line.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    new, found = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: section, old, flags=re.DOTALL)
    page.write_text(new if found else f"{old.rstrip()}\n\n{section}\n".lstrip(), encoding="utf-8")


def circumstances(device: str) -> dict[str, str]:
    """Date, device, versions and command of a run, for its rows and its section."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = f"{found.group(1) if found else platform.processor()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": name,
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "command": shlex.join(["python", *sys.argv]),
    }
