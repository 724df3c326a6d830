"""The Prometheus exporter: its counts against numpy and the report's, and how it lives and ends with a run."""

import contextlib
import functools
import json
import socket
import threading
from collections import Counter

import httpx
import numpy as np
import pytest
from fake_server import FakeServer, answer, delta, plain_answer, response, usage, words
from locust_runs import free_port, only_run, run, started, wait_for
from make_run import make_run, record
from prometheus_client.parser import text_string_to_metric_families

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Export
from twoclocks.export import open_port
from twoclocks.families import families
from twoclocks.hosts import is_wide
from twoclocks.load import load_run
from twoclocks.record import encode_record
from twoclocks.summary import summarise
from twoclocks.totals import BOUNDS, MAX_KINDS, Meta, Totals, Window


@functools.cache
def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value."""
    read = text_string_to_metric_families(page)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in read for one in family.samples}


def value(page: str, name: str, **labels: str) -> float:
    """The sum of all series of this name that carry these labels."""
    found = [
        value
        for (series, carried), value in samples(page).items()
        if series == name and labels.items() <= dict(carried).items()
    ]
    assert found, name
    return sum(found)


class Scraper:
    """Scrapes a port again and again until its run is over, as Prometheus does."""

    def __init__(self, port: int) -> None:
        self.url, self.pages, self.over = f"http://127.0.0.1:{port}/metrics", [], threading.Event()
        self.thread = threading.Thread(target=self._scrape)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def _scrape(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self.over.wait(0.2):
                with contextlib.suppress(httpx.TransportError):  # not there yet, or over
                    self.pages.append(client.get(self.url).raise_for_status().text)


def of_folder(folder, limits=(), *, is_open=False) -> Totals:
    """What a run folder holds, in three pieces."""
    totals = Totals(dict(limits), is_open=is_open)
    meta = json.loads((folder / "run.json").read_text())
    totals.meta = Meta(window=Window(**meta["window"]))
    lines = (folder / "requests.jsonl").read_bytes().splitlines(keepends=True)
    for begin in range(3):
        totals.add_requests(b"".join(lines[begin::3]))
    return totals


def test_histograms_are_those_of_numpy_over_the_reports_values(tmp_path):
    make_run(tmp_path / "run")
    made, totals = load_run(tmp_path / "run"), of_folder(tmp_path / "run")
    expected = {"ttft": made.ok["ttft"], "tpot": made.ok["tpot"], "e2e": made.ok["e2e"], "itl": made.gaps.seconds}

    for name, values in expected.items():
        known = np.asarray(values)[~np.isnan(values)]
        by_hand = [int((known <= bound).sum()) for bound in (*BOUNDS, np.inf)]

        assert len(known) > 20
        assert np.cumsum(totals.histograms[name].counts).tolist() == by_hand
        assert totals.histograms[name].sum == pytest.approx(known.sum())


def test_a_value_on_a_bound_belongs_to_the_bucket_that_it_ends():
    totals = Totals({}, is_open=False)
    second = {"at": 1.0, "worker": 0, "loop_lag_s": [BOUNDS[7], 0.0, 5000.0], "cpu_s": 0.1, "loop_cpu_s": 0.1}
    totals.meta = Meta(window=Window(0.0))
    totals.add_self(json.dumps(second).encode() + b"\n")
    counts = totals.histograms["loop_lag"].counts

    assert (counts[7], counts[0], counts[-1], counts.sum()) == (1, 1, 1, 3)


def test_only_measured_requests_count_and_only_ok_ones_have_latencies():
    two = {"chunk_us": [100_000, 20_000], "chunk_kinds": [("content", 2)], "output_tokens": 2, "prompt_tokens": 5}
    rows = [
        record(phase="warmup", **two),
        record(**two),
        record(sent_at=11.0, **two),  # after the window's end
        record(status="error", error_kind="http_500", **two),
        record(status="cancelled", error_kind="hung_up", **two),
        record(sent_at=None, status="error", error_kind="refused"),
        record(**(two | {"chunk_us": [900_000, 20_000]})),  # misses the SLO
    ]
    totals = Totals({"ttft": 0.5}, is_open=True)
    totals.meta = Meta(window=Window(0.0, 10.0))
    totals.add_requests(b"".join(map(encode_record, rows)))

    assert totals.requests == {
        ("warmup", "ok", "none"): 1,
        ("measure", "ok", "none"): 2,
        ("drain", "ok", "none"): 1,
        ("measure", "error", "http_500"): 1,
        ("measure", "cancelled", "hung_up"): 1,
        ("measure", "error", "refused"): 1,
    }
    assert {name: one.counts.sum() for name, one in totals.histograms.items()} == {
        "ttft": 2, "itl": 2, "tpot": 2, "e2e": 2, "loop_lag": 0, "send_lateness": 4,
    }  # fmt: skip
    assert (totals.counts["output_tokens"], totals.counts["prompt_tokens"]) == (4, 10)
    assert (totals.counts["good_requests"], totals.counts["judged_requests"]) == (1, 4)


def test_labels_are_bounded_and_hold_no_text_of_others():
    totals = Totals({}, is_open=False)
    kinds = ['"} evil{x="', "a b", "Ä", "x" * 1000, *(f"http_{status}" for status in range(100, 1000))]
    totals.add_requests(b"".join(encode_record(record(status="error", error_kind=kind)) for kind in kinds))
    told = {kind for _, _, kind in totals.requests}

    assert len(told) == MAX_KINDS + 1
    assert totals.requests["measure", "error", "other"] == len(kinds) - MAX_KINDS
    assert not told & set(kinds[:4])


def test_names_have_base_units_and_every_figure_its_meaning():
    totals = Totals({"ttft": 0.5}, is_open=True)
    told = list(families(totals, {"run": "x"}, ended=False))

    assert all(one.name.startswith("twoclocks_") and one.documentation for one in told)
    assert {one.name for one in told if one.type == "histogram"} == {
        f"twoclocks_{name}_seconds" for name in ("ttft", "itl", "tpot", "e2e", "send_lateness", "loop_lag")
    }
    assert "twoclocks_cached_tokens" not in {one.name for one in told}  # no answer has told of any


def test_others_are_told_where_they_can_read_it():
    assert [is_wide(host) for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9")] == [False] * 4
    assert [is_wide(host) for host in ("::", "10.1.2.3", "host.example")] == [True] * 3


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_of_either_family_is_opened(host):
    try:
        with open_port(Export(prometheus_port=free_port(), host=host)) as listener:
            assert listener.getsockname()[0] == host
    except ExperimentError:
        assert host == "::1"  # a machine without it


def scripted(server):
    """Five tokens, but every seventh request fails in one of two ways."""

    def script(body):
        turn = len(server.requests)
        if turn % 7 == 6:
            return response(503, b'{"error": "busy"}') if turn % 2 else answer(delta(role="assistant"), *words(2))
        last = delta(content="end", finish_reason="length")
        return answer(delta(role="assistant", content=""), *words(4), last, usage(5), gap_s=0.01)

    return script


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run folder, pages that were scraped, output, port) of a run with workers and some failures."""
    tmp_path, port = tmp_path_factory.mktemp("exported"), free_port()
    with FakeServer() as server, Scraper(port) as scraper:
        server.script = scripted(server)
        settings = (f"export.prometheus_port={port}", "slo.ttft_ms=5000", "export.linger_s=30")
        words_ = ("-H", server.url, "-u", "3", "-r", "3", "-t", "4", "--no-report", "--processes", "2")
        _, output = run(tmp_path, *words_, *(word for one in settings for word in ("--set", one)))
    return only_run(tmp_path), scraper.pages, output, port


def test_at_the_end_every_count_is_that_of_the_summary(exported):
    folder, pages, output, _ = exported
    summary = summarise(load_run(folder))
    figures, last = summary["figures"], pages[-1]

    assert value(last, "twoclocks_run_ended") == 1, output
    for name in ("ttft", "itl", "tpot", "e2e"):
        assert value(last, f"twoclocks_{name}_seconds_count") == figures[name]["n"] > 0
        assert value(last, f"twoclocks_{name}_seconds_sum") == pytest.approx(figures[name]["n"] * figures[name]["mean"])
    measured = {"phase": "measure"}
    assert value(last, "twoclocks_requests_total", **measured) == figures["requests"]["value"]
    assert value(last, "twoclocks_requests_total", **measured, status="ok") == figures["ok"]["value"]
    assert value(last, "twoclocks_requests_total", phase="warmup") == figures["warmup"]["value"]
    assert value(last, "twoclocks_output_tokens_total") == figures["output_tokens"]["value"]
    assert value(last, "twoclocks_prompt_tokens_total") == figures["prompt_tokens"]["value"]
    good = value(last, "twoclocks_good_requests_total")
    assert good / value(last, "twoclocks_judged_requests_total") == pytest.approx(figures["goodput_share"]["value"])


def test_errors_are_counted_by_kind(exported):
    folder, pages, _, _ = exported
    kinds = Counter(load_run(folder).measured["error_kind"].fillna("none"))

    assert {"http_503", "no_end"} <= kinds.keys()
    for kind, count in kinds.items():
        assert value(pages[-1], "twoclocks_requests_total", phase="measure", error_kind=kind) == count


def test_it_is_live_and_counters_only_rise(exported):
    _, pages, _, _ = exported
    counts = [value(page, "twoclocks_itl_seconds_count") for page in pages]

    assert len(set(counts)) > 3
    assert counts == sorted(counts)
    assert max(value(page, "twoclocks_users") for page in pages) == 3
    assert 1 <= max(value(page, "twoclocks_in_flight") for page in pages) <= 3
    assert value(pages[-1], "twoclocks_in_flight") == 0


def test_the_end_frees_the_port(exported):
    *_, port = exported
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_one_line_before_any_load(tmp_path):
    with FakeServer() as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, output = run(tmp_path, "-H", server.url, "-t", "1", "--set", f"export.prometheus_port={port}")

    assert code == 2
    assert server.requests == []
    (line,) = [line for line in output.splitlines() if "twoclocks: " in line]
    assert f"export.prometheus_port: 127.0.0.1:{port} cannot be listened at (address already in use)" in line
    assert f"--set export.prometheus_port={port % 65535 + 1}" in line
    assert "Traceback" not in output


def test_the_exporter_dies_with_its_run(tmp_path):
    port = free_port()
    with FakeServer(lambda body: plain_answer(5, gap_s=0.01)) as server:
        words_ = ("-H", server.url, "-t", "60", "--no-report", "--set", f"export.prometheus_port={port}")
        with started(tmp_path, *words_) as process, Scraper(port) as scraper:
            wait_for(lambda: scraper.pages)
            process.kill()
            process.wait()
            wait_for(lambda: is_free(port))


def is_free(port: int) -> bool:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False
