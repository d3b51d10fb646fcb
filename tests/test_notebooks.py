"""The notebooks: stripped in the repository; one is run from top to bottom by a kernel of its own."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 1800
"""Seconds per cell: a cell that hangs ends, one on a busy machine does not."""

# asyncio warns of sockets that jupyter's own clean-up leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["add_a_family", "slim_llama", "slim_vit"]


def test_is_valid_and_stripped(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


def test_what_it_takes_of_the_package_is_there(notebook: NotebookNode) -> None:
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    taken = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    own = [node for node in taken if (node.module or "").startswith("hawada_peft")]
    assert own
    for node in own:
        assert {each.name for each in node.names} <= {*dir(importlib.import_module(node.module or ""))}


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that trains nothing. `make docs` runs all of them, and fails where a cell does."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / ".jupyter"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    where = {"metadata": {"path": str(tmp_path)}}
    notebook = nbformat.read(FOLDER / "add_a_family.ipynb", as_version=nbformat.NO_CONVERT)
    ran = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "slim" / "model.safetensors").exists()
