"""The notebooks run from start to end, and are committed without outputs."""

import os
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
  assert {"quickstart", "custom_loss"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_start_to_end(path, tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient")
  nbformat = pytest.importorskip("nbformat")
  notebook = nbformat.read(path, as_version=4)
  assert all(not cell.get("outputs") for cell in notebook.cells)
  root = str(path.parents[1])
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  where = {"metadata": {"path": tmp_path}}
  client = nbclient.NotebookClient(notebook, timeout=600, resources=where)
  client.execute()  # Raises CellExecutionError with the traceback of the cell.
  outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
  assert any("image/png" in out.get("data", {}) for out in outputs)
