import os
from pathlib import Path

import nbformat
import pytest
from make_run import make_run
from nbclient import NotebookClient
from test_curves import folder_of, level

from twoclocks import curves

NOTEBOOK = Path(__file__).parent.parent / "analysis" / "compare.ipynb"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("sweeps"), [level(1, 2), level(2, 6)])
    curves.build(folder)
    return folder


@pytest.mark.filterwarnings("default")  # the notebook's machinery warns of its own libraries
@pytest.mark.parametrize("servers", [["vllm"], ["vllm", "transformers", "silent"]])
def test_the_notebook_runs_on_run_folders(tmp_path, monkeypatch, servers, sweep):
    for server in servers:
        make_run(tmp_path / server, server=server, requests=20)
    monkeypatch.setenv("TWOCLOCKS_RUNS", os.pathsep.join(str(tmp_path / server) for server in servers))
    monkeypatch.setenv("TWOCLOCKS_SWEEP", str(sweep))
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 + 2 * len(servers) + 1  # the violins; a waterfall and a timeline a run; the curves
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.count("vLLM bench serve:") == len(servers)
    assert ("Side by side, in ms" if len(servers) > 1 else "Load test results") in printed


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
