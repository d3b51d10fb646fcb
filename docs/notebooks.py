"""The notebooks on the docs site: each is run when the site is built, and shown with what it printed and drew."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
TIMEOUT = 1800
"""Seconds per cell: a cell that hangs ends, one on a busy machine does not."""


def run(path: Path, folder: Path) -> NotebookNode:
    """
    Run a notebook from top to bottom, in a kernel of its own.

    Args:
        path: the notebook.
        folder: where it runs, and leaves what it makes.

    Raises:
        nbclient.exceptions.CellExecutionError: with the cell that failed.
    """
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    own = {"HAWADA_CACHE": "tables", "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib"}
    env = os.environ | {name: str(folder / f".{each}") for name, each in own.items()}
    env |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=where).execute(env=env)


def page_of(stem: str, notebook: NotebookNode) -> tuple[str, dict[str, bytes]]:
    """
    The page of a notebook that was run, and its pictures. What went to stderr tells of the machine, and is left out.

    Args:
        stem: name of the notebook's file.
        notebook: with its outputs.

    Returns:
        Markdown, and the pictures by their paths beside it.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{stem}_files"})
    title, _, rest = text.strip().partition("\n")
    note = f"Run when this page was built. [Download the notebook]({stem}.ipynb)."
    if "ToyClock" in text:
        note += " Milliseconds are those of `ToyClock`, a law of sizes: nothing was timed."
    return f"{title}\n\n{note}\n{rest}\n", resources["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make a page per notebook, with its pictures and the notebook itself beside it."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            text, pictures = page_of(path.stem, run(path, Path(folder)))
        made = {f"{path.stem}.md": text, path.name: path.read_bytes(), **pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files
