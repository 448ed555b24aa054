"""Run the code of the tutorial in this process. The thorough tier runs the notebook in a Jupyter kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from checkout import ROOT

pytestmark = [pytest.mark.source_tree, pytest.mark.filterwarnings("default")]

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_code_runs_for_an_epoch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WAKESLEEP_TUTORIAL_EPOCHS", "1")
    monkeypatch.delenv("WAKESLEEP_TUTORIAL_DATA", raising=False)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert capsys.readouterr().out.count("epoch") == 4


def test_outputs_are_those_of_one_run_and_name_no_folder() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"display_data", "stream"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    for output in outputs:
        if output["output_type"] == "stream":
            assert output["name"] == "stdout"
            assert not re.search(r"/\w+/", "".join(output["text"]))
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.thorough
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("WAKESLEEP_TUTORIAL_EPOCHS", "2")
    monkeypatch.delenv("WAKESLEEP_TUTORIAL_DATA", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
