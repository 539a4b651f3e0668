"""The notebook: what is committed is small and names no machine; it runs from a fresh kernel."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "own_data.ipynb"
MAX_BYTES = 150_000


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    return [output for cell in cells for output in cell.outputs]


def test_the_committed_notebook_is_small_was_run_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < MAX_BYTES
    assert not re.search(r"/(?:home|root|tmp|work|usr|opt)/|[A-Z]:\\\\|site-packages", text)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    shown = outputs(notebook)
    assert not [output for output in shown if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in shown)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_the_notebook_ends_in_personal_models_and_a_picture(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    # A cell that fails raises here.
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    shown = outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in shown)
    kept = list((tmp_path / "runs" / "offices" / "clients").glob("*/*.safetensors"))
    assert {path.parent.name for path in kept} == {"forest", "harbor", "hill", "marsh"}
