import json

import numpy as np
import pytest
from make_run import make_run

import twoclocks
from twoclocks import scraped
from twoclocks.expositions import ALL_HISTOGRAMS

SAMPLES = "server_samples.jsonl"


def change(folder, by):
    """Rewrite each scraped line, a dictionary, of a run."""
    path = folder / SAMPLES
    lines = [by(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return twoclocks.load_run(folder)


def row(run, metric):
    return next(row for row in scraped.server_window(run) if row["metric"] == metric)


def test_rows_hold_what_the_server_planted_beside_what_the_client_saw(tmp_path):
    planted = make_run(tmp_path / "r", requests=60)
    run = twoclocks.load_run(tmp_path / "r")
    measured = slice(2, None)  # the scrape before the window leaves the warm-up out

    ttft, queue = row(run, "ttft"), row(run, "queue")

    assert (ttft["server_n"], ttft["client_n"]) == (60, 60)
    assert ttft["server_mean"] == pytest.approx(np.mean(planted.ttft[measured]))
    assert ttft["client_mean"] == pytest.approx(run.ok["ttft"].mean())
    assert ttft["difference"] == pytest.approx(ttft["client_mean"] - ttft["server_mean"])
    assert ttft["server_names"] == ["vllm:time_to_first_token_seconds"]
    assert "arrival at the API server" in ttft["server_definition"]
    assert ttft["server_p50"]["lower"] <= np.median(planted.ttft[measured]) <= ttft["server_p50"]["upper"]
    assert (ttft["since_restart"], ttft["caveats"], ttft["engines"]) == (False, [], [])
    assert (queue["client_n"], queue["client_definition"], queue["difference"]) == (0, "not seen from outside", None)
    assert "too few for a shape" in queue["no_shape"]


def test_figures_of_a_restarted_server_are_marked_and_held_against_nothing(tmp_path):
    make_run(tmp_path / "r", requests=60)

    def restart(line):
        if line["at"] > 6:
            line["samples"] = [
                [name, labels, value * 0.001 if name.endswith(("_bucket", "_count", "_sum")) else value]
                for name, labels, value in line["samples"]
            ]
        return line

    found = row(change(tmp_path / "r", restart), "ttft")

    assert found["since_restart"]
    assert "restarted: counted from" in found["caveats"][0]
    assert found["difference"] is None
    assert found["client_definition"].startswith("not compared")


def test_each_engine_is_told_where_there_are_several(tmp_path):
    planted = make_run(tmp_path / "r", requests=60)

    def two_engines(line):
        twins = [[name, labels | {"engine": "1"}, 2 * value] for name, labels, value in line["samples"] if labels]
        return line | {"samples": line["samples"] + twins}

    found = row(change(tmp_path / "r", two_engines), "ttft")

    assert [(engine["labels"]["engine"], engine["n"]) for engine in found["engines"]] == [("0", 60), ("1", 120)]
    assert found["server_n"] == 180
    assert found["difference"] is None  # others had a share: 180 against our 60
    assert found["engines"][0]["mean"] == pytest.approx(np.mean(planted.ttft[2:]))


def test_every_figure_that_a_client_has_too_is_there(tmp_path):
    make_run(tmp_path / "r")
    run = twoclocks.load_run(tmp_path / "r")
    values = scraped.client_values(run)

    besides = {source.beside for sources, _ in ALL_HISTOGRAMS.values() for source in sources} - {""}

    assert besides == set(values)
    assert all(len(found) and definition for found, definition in values.values())


def test_a_server_that_tells_nothing_has_no_rows(tmp_path):
    make_run(tmp_path / "r", server="silent")

    assert scraped.server_window(twoclocks.load_run(tmp_path / "r")) == []
