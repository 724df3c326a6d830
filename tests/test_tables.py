import json
import sys

import numpy as np
import pandas as pd
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import cli, tables
from twoclocks.vllm_bench import vllm_bench


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    make_run(folder, requests=20, failures=1)
    return folder


def told(run, *arguments):
    assert cli.main(["export", str(run), *map(str, arguments)]) == 0


def test_csv_has_a_row_a_request_and_every_figure_unrounded(run, capsys):
    told(run, "--format", "csv")
    back, requests = pd.read_csv(run / "requests.csv"), twoclocks.load_run(run).requests

    assert capsys.readouterr().out == f"csv: {run / 'requests.csv'}\n"
    assert list(back["request_id"].astype(str).str.zfill(32)) == list(requests["request_id"])
    for name in ("sent_at", "ttft", "tpot", "e2e", "server_queue", "output_tokens"):
        np.testing.assert_array_equal(back[name], requests[name])
    assert not set(tables.NESTED) & set(back.columns)


def test_csv_of_chunks_holds_every_arrival(run, tmp_path):
    told(run, "--format", "csv", "--table", "chunks", "--out", tmp_path / "c.csv")
    back, chunks = pd.read_csv(tmp_path / "c.csv"), twoclocks.load_run(run).chunks

    np.testing.assert_array_equal(back["at"], chunks["at"])
    assert list(back["kind"]) == list(chunks["kind"])


def test_parquet_comes_back_the_same(run, tmp_path):
    for table in tables.TABLES:
        told(run, "--format", "parquet", "--table", table, "--out", tmp_path / table)
    loaded = twoclocks.load_run(run)

    pd.testing.assert_series_equal(pd.read_parquet(tmp_path / "requests")["ttft"], loaded.requests["ttft"])
    assert len(pd.read_parquet(tmp_path / "chunks")) == len(loaded.chunks)


def test_without_pyarrow_one_line_names_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert cli.main(["export", str(run), "--format", "parquet"]) == 2

    assert capsys.readouterr().err.splitlines()[-1] == (
        "twoclocks: Parquet needs pyarrow, which is not installed here: pip install pyarrow"
    )


def test_vllms_layout(run, tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.vllm_bench.PART", 7)  # the gaps of 20 requests, in three parts
    told(run, "--format", "vllm-bench", "--out", tmp_path / "v.json")

    assert json.loads((tmp_path / "v.json").read_text()) == vllm_bench(twoclocks.load_run(run))


def test_markdown_holds_the_figures_and_the_rosetta_table(run):
    told(run, "--format", "markdown")
    text = (run / "summary.md").read_text()
    ttft = twoclocks.load_run(run).ok["ttft"]

    assert f"| Time to first token (TTFT) | ms | 20 | {ttft.mean() * 1e3:.1f} |" in text
    assert "| vLLM bench serve |" in text
    tables_ = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(
        len({line.count(" | ") for line in block.splitlines()}) == 1 for block in tables_ if "| | |" not in block
    )


def test_a_servers_text_is_no_formula_and_steers_no_terminal(tmp_path):
    bad = record(status="error", error_kind="http", error_message='=HYPERLINK("x")\x1b[31m')
    folder = write_folder(tmp_path / "r", [bad], target={"server": "<b>|x"})
    told(folder, "--format", "csv")
    told(folder, "--format", "markdown")

    text = (folder / "requests.csv").read_text()
    assert "'=HYPERLINK" in text
    assert "\x1b" not in text
    assert "&lt;b>\\|x" in (folder / "summary.md").read_text()


def test_a_place_that_cannot_be_written_is_one_line(run, capsys):
    for kind in ("csv", "markdown", "vllm-bench"):
        assert cli.main(["export", str(run), "--format", kind, "--out", "/nowhere/x"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("twoclocks: /nowhere/x: cannot be written: ")
