import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import msgspec
import pytest
from fake_server import HANG, FakeServer, response
from make_spans import OTHER, export, vllm_span

from twoclocks.collect import Collectors, Job
from twoclocks.collector import Lines, Scraper
from twoclocks.errors import TargetError
from twoclocks.experiment import Target
from twoclocks.fetch import open_client
from twoclocks.target import metrics_urls, resolve


def job(folder, **changes):
    plain = {"run_folder": str(folder), "zero_ns": time.monotonic_ns(), "metrics_urls": [], "interval_s": 0.05}
    return Job(**plain | {"headers": {}, "tls_verify": True} | changes)


def page(**values):
    lines = [f'# TYPE {name} gauge\n{name}{{engine="0"}} {value}\n' for name, value in values.items()]
    return response(200, "".join(lines).encode(), "text/plain")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def send_spans(port, *spans):
    headers = {"Content-Type": "application/x-protobuf"}
    body = export(*spans).SerializeToString()
    assert httpx.post(f"http://127.0.0.1:{port}/v1/traces", content=body, headers=headers).status_code == 200


def scrapes(pages, tmp_path):
    out = io.BytesIO()
    pages = iter(pages)
    with FakeServer() as server, httpx.Client(timeout=0.3) as client:
        server.metrics = lambda: next(pages)
        scraper = Scraper(f"{server.url}/metrics", job(tmp_path), lambda _: client, Lines(out))
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


def test_a_proxy_that_cannot_be_used_is_a_fault_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    scraper = Scraper("https://server.invalid/metrics", job(tmp_path), open_client, Lines(io.BytesIO()))

    assert "only http:// proxies can be used" in scraper.scrape()


def test_a_key_is_hidden_in_labels_and_names_stay(tmp_path):
    out, text = io.BytesIO(), b'# TYPE a_running gauge\na_running{x="is running"} 1\n'
    with FakeServer() as server, httpx.Client() as client:
        server.metrics = lambda: response(200, text, "text/plain")
        told = msgspec.structs.replace(job(tmp_path), secrets=["a_running", "running"])
        Scraper(f"{server.url}/metrics", told, lambda _: client, Lines(out)).scrape()
    line = json.loads(out.getvalue())

    assert line["samples"] == [["a_running", {"x": "is ***"}, 1.0]]
    assert line["types"] == {"a_running": "gauge"}


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


def test_a_page_that_makes_new_series_for_ever_is_read_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.collector.MAX_SERIES", 3)
    lines, errors = scrapes([page(a=1, b=1), page(b=2, c=1), page(c=2, d=1)], tmp_path)

    assert [error is None for error in errors] == [True, True, False]
    assert "more than 3 series" in errors[2]
    assert lines[2]["samples"] == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/", "http://a\u200b/metrics", "/metrics"])
def test_an_address_that_is_none_is_told(tmp_path, url):
    with httpx.Client(timeout=0.3) as client:
        assert Scraper(url, job(tmp_path), lambda _: client, Lines(io.BytesIO())).scrape()


def test_the_child_scrapes_until_the_server_is_idle(tmp_path):
    running = iter([3, 3, 3, 2, 1])
    with FakeServer() as server:
        server.metrics = lambda: page(**{"vllm:num_requests_running": next(running, 0)})
        collectors = Collectors(job(tmp_path, metrics_urls=[f"{server.url}/metrics"]))
        collectors.stop()
    lines = lines_of(tmp_path / "server_samples.jsonl")

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


def test_a_page_that_hangs_delays_neither_the_others_nor_the_log(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("")
    answers = iter([page(a=0)])
    numbers = iter(range(1000))
    with FakeServer() as slow, FakeServer() as quick:
        slow.metrics = lambda: next(answers, [HANG])
        quick.metrics = lambda: page(b=next(numbers))
        urls = [f"{slow.url}/metrics", f"{quick.url}/metrics"]
        collectors = Collectors(job(tmp_path, metrics_urls=urls, log=f"file:{log}"))
        log.write_text("hello\n")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # httpx gives the hanging page up after 2 s
            lines = lines_of(tmp_path / "server_samples.jsonl")
            quick_ones = [line for line in lines if line["url"] == urls[1]]
            if len(quick_ones) > 10 and (tmp_path / "server.log").read_text():
                break
            time.sleep(0.02)
        slow_ones = [line for line in lines if line["url"] == urls[0] and line["error"] is None]
        collectors.stop()

    assert len(quick_ones) > 10
    assert len(slow_ones) == 1
    assert (tmp_path / "server.log").read_text() == "hello\n"
    assert collectors.errors == dict.fromkeys(urls)


def test_a_stage_has_pages_of_its_own(tmp_path):
    with FakeServer() as engine, FakeServer() as gateway:
        engine.metrics = lambda: page(a=1)
        gateway.metrics = lambda: page(b=1)
        stage_urls = [("gateway", f"{gateway.url}/metrics")]
        collectors = Collectors(job(tmp_path, metrics_urls=[f"{engine.url}/metrics"], stage_urls=stage_urls))
        collectors.stop()
    lines = lines_of(tmp_path / "server_samples.jsonl")

    assert {line["url"]: line.get("stage") for line in lines} == {
        f"{engine.url}/metrics": None,
        f"{gateway.url}/metrics": "gateway",
    }
    assert all("stage" not in line for line in lines if line["url"] == f"{engine.url}/metrics")
    assert len(collectors.errors) == 2


def test_what_cannot_be_collected_is_told_in_the_first_answer_and_stops_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"otlp_port": port, "log": f"file:{tmp_path}/none.log", "gpu": ["http://127.0.0.1:9/metrics"]}
        collectors = Collectors(job(tmp_path, **settings))
        notes = " | ".join(collectors.notes)
        ended = collectors.stop()

    assert f"port {port} cannot be listened on" in notes
    assert "none.log" in notes
    assert collectors.process.returncode == 0
    assert all("early" not in note for note in ended)


def numbered(number):
    return f"{number:016x}" * 2


def test_the_end_waits_for_the_last_batch(tmp_path):
    port = free_port()
    collectors = Collectors(job(tmp_path, otlp_port=port, otlp_tail_s=3.0))
    send_spans(port, vllm_span(numbered(1)), vllm_span("mine", trace_id=OTHER, parent_id=""))
    late = threading.Timer(0.5, send_spans, (port, vllm_span(numbered(2))))
    late.start()
    began = time.monotonic()
    notes = collectors.stop(3)  # the third was cut off: its span never comes
    took = time.monotonic() - began
    late.join()

    assert [line["request_id"] for line in lines_of(tmp_path / "server_requests.jsonl")] == [numbered(1), numbered(2)]
    assert took > 3.4
    assert notes == ["OTLP: 1 spans were of requests that this run did not send; they were left out"]


def test_there_is_no_wait_once_all_spans_are_there(tmp_path):
    port = free_port()
    collectors = Collectors(job(tmp_path, otlp_port=port, otlp_tail_s=60))
    (tmp_path / "requests.jsonl").write_text("".join(f'{{"request_id":"{numbered(one)}"}}\n' for one in (1, 2)))
    send_spans(port, vllm_span(numbered(1)), vllm_span(numbered(2)))
    began = time.monotonic()
    notes = collectors.stop(2)

    assert notes == []
    assert time.monotonic() - began < 30


def test_there_is_no_wait_when_no_span_ever_came(tmp_path):
    collectors = Collectors(job(tmp_path, otlp_port=free_port(), otlp_grpc_port=free_port(), otlp_tail_s=60))
    began = time.monotonic()
    collectors.stop(2)

    assert time.monotonic() - began < 30
    assert not (tmp_path / "server_requests.jsonl").exists()


def test_the_wait_for_spans_is_bounded_though_they_keep_coming(tmp_path):
    port = free_port()
    collectors = Collectors(job(tmp_path, otlp_port=port, otlp_tail_s=0.5))
    over = threading.Event()

    def keep_sending():
        number = 0
        while not over.wait(0.05):
            number += 1
            with contextlib.suppress(httpx.HTTPError, AssertionError):  # the receiver has closed
                send_spans(port, vllm_span(numbered(number)))

    sender = threading.Thread(target=keep_sending)
    send_spans(port, vllm_span(numbered(1)))
    sender.start()
    try:
        collectors.stop(1_000_000)
    finally:
        over.set()
        sender.join()

    assert collectors.process.returncode == 0


def test_an_interruption_ends_the_wait_and_not_the_writing(tmp_path):
    port = free_port()
    collectors = Collectors(job(tmp_path, otlp_port=port, otlp_tail_s=60))
    send_spans(port, vllm_span(numbered(1)), vllm_span("mine", trace_id=OTHER, parent_id=""))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        notes = collectors.stop(2)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert 1.0 <= time.monotonic() - began < 30
    assert collectors.process.returncode == 0
    assert len(lines_of(tmp_path / "server_requests.jsonl")) == 1
    assert "1 spans were of requests that this run did not send" in notes[0]


def test_a_collector_that_died_is_told(tmp_path):
    collectors = Collectors(job(tmp_path, metrics_urls=["http://127.0.0.1:9/metrics"]))
    collectors.process.kill()
    collectors.process.wait()

    assert "has ended" in collectors.scrape()["http://127.0.0.1:9/metrics"]
    assert "ended early" in collectors.stop()[0]


def test_hostile_pages_do_not_end_it(tmp_path):
    pages = iter([b"a 99999999999999999999999999999\n", b'{x=" "} 1\n', b"a " + b"9" * 400 + b"\n", b"\xff\xfe\0"])
    with FakeServer() as server:
        server.metrics = lambda: response(200, next(pages, b"a 1\n"), "text/plain")
        collectors = Collectors(job(tmp_path, metrics_urls=[f"{server.url}/metrics"], interval_s=60))
        errors = [collectors.errors, *(collectors.scrape() for _ in range(4))]
        collectors.stop()

    assert [next(iter(error.values())) is None for error in errors] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("collector", {"locust", "gevent", "pandas", "matplotlib"}),
        ("collect", {"grpc", "opentelemetry", "google.protobuf", "prometheus_client", "pynvml"}),
    ],
)
def test_the_process_and_its_handle_import_what_they_need(module, absent):
    program = f"import sys, twoclocks.{module}; print({absent} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "set()"


# target


def test_the_first_model_is_named():
    with FakeServer() as server:
        assert resolve(Target(url=f"{server.url}/v1")) == ("fake-model", None)
        assert resolve(Target(url=server.url, model="mine")) == ("mine", None)


def test_a_server_whose_words_are_not_utf_8_has_no_version_and_no_model():
    with FakeServer() as server:
        server.pages |= {"GET /version": response(200, b'{"version": "\xff"}')}
        assert resolve(Target(url=server.url)) == ("fake-model", None)

        server.pages |= {"GET /v1/models": response(200, b'{"data": [{"id": "\xff"}]}')}
        with pytest.raises(TargetError, match=r"names no model; name it with --set target.model=NAME"):
            resolve(Target(url=server.url))


def test_an_unreachable_target_says_how_to_go_on():
    with pytest.raises(TargetError, match=r"not reachable .*--url http://HOST:PORT \(Locust: -H\)$"):
        resolve(Target(url="http://127.0.0.1:9"))


def test_what_a_proxy_did_is_not_told_as_the_servers(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    told = r"refused.*\. It was asked through the proxy 127\.0\.0\.1:9: NO_PROXY=127\.0\.0\.1 goes without$"
    with FakeServer() as server, pytest.raises(TargetError, match=told):
        resolve(Target(url=server.url))


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
    monkeypatch.setattr("twoclocks.collector.PAGE_S", 0.3)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    _, errors = scrapes([[head, *[0.05, b"#"] * 100], page(a=1), page(a=1)], tmp_path)

    assert "not whole after" in errors[0]
    assert errors[1:] == [None, None]
