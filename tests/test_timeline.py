import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import report
from twoclocks.timeline import BINS, bins, timeline_of


def lines_of(run):
    return {(panel.title.split(",")[0], line.label): line for panel in timeline_of(run) for line in panel.lines}


def test_requests_tokens_and_ttft_of_each_second(tmp_path):
    made = [
        record("a" * 32, user=0, intended_at=0.0, sent_at=0.0, ended_at=2.0, chunk_us=[500_000, 1_000_000],
               chunk_kinds=[("content", 2)], output_tokens=2),
        record("b" * 32, user=1, intended_at=0.5, sent_at=0.5, ended_at=1.0, chunk_us=[100_000],
               chunk_kinds=[("content", 1)], output_tokens=1),
    ]  # fmt: skip
    lines = lines_of(twoclocks.load_run(write_folder(tmp_path / "r", made)))

    flying = lines["Users and requests", "requests in flight, client (mean)"]
    assert (flying.at.tolist(), flying.values.tolist()) == ([0, 1, 2], [1.5, 1.0])
    assert lines["Output tokens", "client, by arrival"].values.tolist() == [2, 1]  # at 0.5 and 0.6; at 1.5
    median, largest = (lines["TTFT", f"{name}, client"] for name in ("median", "largest"))
    assert (median.at.tolist(), median.values.tolist()) == ([0.5], [pytest.approx(0.3)])
    assert largest.values.tolist() == [pytest.approx(0.5)]


def test_the_server_has_lines_of_its_own(tmp_path):
    planted = make_run(tmp_path / "r", requests=40)
    lines = lines_of(twoclocks.load_run(tmp_path / "r"))
    tokens = lines["Output tokens", "server, /metrics (rise of a counter)"]

    assert float((tokens.values * np.diff(tokens.at)).sum()) == pytest.approx(sum(planted.tokens))
    assert lines["KV cache used", "server, /metrics"].values.max() < 1
    assert {"running, server, /metrics", "waiting, server, /metrics"} <= {label for _, label in lines}


def test_a_long_run_has_no_more_bins(tmp_path):
    run = twoclocks.load_run(write_folder(tmp_path / "r", [record(sent_at=1.0, ended_at=86_400.0)]))

    assert len(bins(run)) <= BINS + 1
    assert bins(run)[-1] >= 86_400


def test_a_run_that_ended_in_its_warm_up_has_a_chart(tmp_path):
    folder = write_folder(tmp_path / "r", [record(phase="warmup", sent_at=0.0, ended_at=1.0)])

    assert "users active" not in {label for _, label in lines_of(twoclocks.load_run(folder))}
    assert report.build(folder).html.exists()


def test_an_empty_run_has_empty_panels(tmp_path):
    run = twoclocks.load_run(write_folder(tmp_path / "r", []))

    assert [panel.lines for panel in timeline_of(run)] == [[], [], []]
