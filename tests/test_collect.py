import io
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fake_server import HANG, FakeServer, response

from twoclocks.collect import Collectors, Job, LogTail, Scraper, parse_page
from twoclocks.errors import TargetError
from twoclocks.experiment import Target
from twoclocks.target import metrics_urls, resolve


def job(folder, **changes):
    plain = {"run_folder": str(folder), "zero_ns": time.monotonic_ns(), "metrics_urls": [], "interval_s": 0.05}
    return Job(**plain | {"headers": {}, "tls_verify": True, "log_path": None} | changes)


def page(**values):
    lines = [f'# TYPE {name} gauge\n{name}{{engine="0"}} {value}\n' for name, value in values.items()]
    return response(200, "".join(lines).encode(), "text/plain")


def scrapes(pages, tmp_path):
    out = io.BytesIO()
    pages = iter(pages)
    with FakeServer() as server, httpx.Client(timeout=0.3) as client:
        server.metrics = lambda: next(pages)
        scraper = Scraper(f"{server.url}/metrics", job(tmp_path), client, out)
        errors = [scraper.scrape() for _ in range(3)]
    return [json.loads(line) for line in out.getvalue().splitlines()], errors


def test_only_what_changed_is_written_again(tmp_path):
    lines, _ = scrapes([page(a=1, b=2), page(a=1, b=3), page(a=1)], tmp_path)

    assert [line["samples"] for line in lines] == [
        [["a", {"engine": "0"}, 1.0], ["b", {"engine": "0"}, 2.0]],
        [["b", {"engine": "0"}, 3.0]],
        [],
    ]
    assert (lines[0]["types"], lines[2]["gone"]) == ({"a": "gauge", "b": "gauge"}, [["b", {"engine": "0"}]])


@pytest.mark.parametrize(
    "broken",
    [response(500, b"", "text/plain"), [HANG], response(200, b"a{ 1 oops\n", "text/plain"), ["close"]],
    ids=["500", "silence", "garbage", "closed"],
)
def test_a_scrape_that_fails_is_a_line_of_its_own_and_the_next_goes_on(tmp_path, broken):
    lines, errors = scrapes([page(a=1), broken, page(a=2)], tmp_path)

    assert [line["error"] is None for line in lines] == [True, False, True]
    assert errors == [line["error"] for line in lines]
    assert [line["samples"] for line in lines] == [[["a", {"engine": "0"}, 1.0]], [], [["a", {"engine": "0"}, 2.0]]]


def test_a_page_of_a_real_server_is_read_whole():
    text = (Path(__file__).parent / "data" / "recorded_vllm_0.32_metrics_after.prom").read_text()
    series, types = parse_page(text)
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]

    assert len(series) == len(samples)
    assert types["vllm:time_to_first_token_seconds"] == "histogram"


def test_a_log_is_followed_through_partial_lines_rotation_and_truncation(tmp_path):
    source, copy = tmp_path / "s.log", tmp_path / "copy.log"
    source.write_text("before the run\n")
    tail = LogTail(source, copy)
    with source.open("a") as file:
        file.write("one\ntw")
    tail.copy()
    with source.open("a") as file:
        file.write("o\nlast of the old file\n")
    source.rename(tmp_path / "s.log.1")
    source.write_text("first of the new file\n")
    tail.copy()
    source.write_text("short\n")
    tail.copy()
    tail.close()

    assert copy.read_text() == "one\ntwo\nlast of the old file\nfirst of the new file\nshort\n"


def test_a_log_that_comes_late_is_read_from_its_beginning(tmp_path):
    tail = LogTail(tmp_path / "late.log", tmp_path / "copy.log")
    tail.copy()
    (tmp_path / "late.log").write_text("hello\n")
    tail.copy()
    tail.close()

    assert (tmp_path / "copy.log").read_text() == "hello\n"


def test_the_child_scrapes_until_the_server_is_idle(tmp_path):
    running = iter([3, 3, 3, 2, 1])
    with FakeServer() as server:
        server.metrics = lambda: page(**{"vllm:num_requests_running": next(running, 0)})
        collectors = Collectors(job(tmp_path, metrics_urls=[f"{server.url}/metrics"]))
        collectors.stop()
    lines = [json.loads(line) for line in (tmp_path / "server_samples.jsonl").read_text().splitlines()]

    assert collectors.errors == {f"{server.url}/metrics": None}
    assert [line["samples"][0][2] for line in lines if line["samples"]][-1] == 0
    assert collectors.process.returncode == 0


def test_a_scrape_can_be_asked_for(tmp_path):
    values = iter(range(100))
    with FakeServer() as server:
        server.metrics = lambda: page(a=next(values))
        collectors = Collectors(job(tmp_path, metrics_urls=[f"{server.url}/metrics"], interval_s=60))
        answer = collectors.scrape()
        written = len((tmp_path / "server_samples.jsonl").read_text().splitlines())
        collectors.stop()

    assert (answer, written) == ({f"{server.url}/metrics": None}, 2)


def test_the_child_ends_when_its_input_ends(tmp_path):
    collectors = Collectors(job(tmp_path))
    collectors.process.stdin.close()
    collectors.process.stdout.close()

    assert collectors.process.wait(10) == 0


def test_the_collector_imports_neither_locust_nor_pandas():
    program = "import sys, twoclocks.collect; print({'locust', 'gevent', 'pandas', 'matplotlib'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "set()"


# target


def test_the_first_model_is_named():
    with FakeServer() as server:
        assert resolve(Target(url=f"{server.url}/v1")) == ("fake-model", None)
        assert resolve(Target(url=server.url, model="mine")) == ("mine", None)


def test_an_unreachable_target_says_how_to_go_on():
    with pytest.raises(TargetError, match=r"not reachable .* -H http://HOST:PORT"):
        resolve(Target(url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("server", "setting", "expected"),
    [
        ("vllm", "auto", ["http://h:1/metrics"]),
        ("transformers", "auto", []),
        ("openai", "auto", []),
        ("vllm", "none", []),
        ("vllm", ["http://a/metrics", "http://b/metrics"], ["http://a/metrics", "http://b/metrics"]),
    ],
)
def test_which_pages_are_scraped(server, setting, expected):
    assert metrics_urls(Target(url="http://h:1/v1", server=server), setting) == expected


def test_a_page_that_drips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.collect.PAGE_S", 0.3)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    _, errors = scrapes([[head, *[0.05, b"#"] * 100], page(a=1), page(a=1)], tmp_path)

    assert "not whole after" in errors[0]
    assert errors[1:] == [None, None]
