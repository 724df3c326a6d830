"""The tab in Locust's web UI, clicked through in headless Chromium while a run goes on; and its routes."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from browser import CHROMIUM, browser
from fake_server import FakeServer, plain_answer
from locust_runs import free_port, only_run, read, started, wait_for

from twoclocks.load import load_run
from twoclocks.summary import summarise
from twoclocks.truth import read_log
from twoclocks.web_tab import blocks, whole_lines

TAB = """[...document.querySelectorAll('[role="tab"]')].find((one) => one.textContent === 'LLM metrics')"""
FIGURE = """(() => {{ const row = document.querySelector('.twoclocks [data-figure="{0}"]');
  return row && Object.fromEntries([...row.closest('table').querySelectorAll('th')].map((head, i) =>
    [head.textContent, row.children[i].dataset.value ?? row.children[i].textContent])); }})()"""
HOSTILE = "<img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def page():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser() as one:
        yield one


@contextlib.contextmanager
def schedule_server(*words):
    """The known-schedule server: 100 ms to the first token, 20 ms between tokens."""
    command = [sys.executable, "-m", "twoclocks.schedule_server", "--ttft-ms", "100", "--tpot-ms", "20", *words]
    with subprocess.Popen([*command, "--until-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield json.loads(process.stdout.readline())["url"]
        process.stdin.close()
        process.wait(30)


@contextlib.contextmanager
def web_ui(tmp_path, *words):
    """Locust with its web UI, ready to be asked."""
    url = f"http://127.0.0.1:{free_port()}"
    with started(tmp_path, *words, "--web-port", url.rpartition(":")[2], "--no-report", headless=False):
        wait_for(lambda: answers(url))
        yield url


def test_workers_end_with_a_master_whose_run_was_stopped_in_the_page(tmp_path):
    """After its stop message Locust's master knows no worker until the drain's time is over, and cannot end them."""
    port = str(free_port())
    words = ["--web-port", port, "--no-report", "--processes", "2", "--set", "load.drain_s=100"]
    url = f"http://127.0.0.1:{port}"
    with schedule_server() as server, started(tmp_path, *words, "-H", server, headless=False) as process:
        wait_for(lambda: answers(url) and len(httpx.get(f"{url}/stats/requests").json().get("workers", [])) == 2)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        httpx.post(f"{url}/swarm", data={"user_count": 2, "spawn_rate": 2, "host": server})
        wait_for(lambda: httpx.get(f"{url}/stats/requests").json()["state"] == "running")
        httpx.post(f"{url}/stop", timeout=60).raise_for_status()
        wait_for(
            lambda: '"finished"' in (told := (only_run(tmp_path) / "run.json").read_text()) or "interrupted" in told
        )
        time.sleep(1)  # Locust's own messages of the stop
        process.terminate()
        process.wait(60)

        assert len(workers) >= 2
        assert not [note for note in read(tmp_path)[1]["notes"] if "worker" in note]  # nothing befell any of them
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)  # left alone: 60 s


def swarm(url, users, **more) -> dict:
    """What Locust's form sends, and what it is told."""
    return httpx.post(f"{url}/swarm", data={"user_count": users, "spawn_rate": users} | more).json()


def newest(folder) -> dict:
    """run.json of the newest run, or what it holds at first."""
    told = {"status": "running", "window": {"started_at": None, "ended_at": None}, "notes": []}
    with contextlib.suppress(OSError, ValueError):
        told |= json.loads((max(folder.iterdir()) / "run.json").read_text())
    return told


class Held(FakeServer):
    """Answers once it may."""

    def __init__(self):
        super().__init__(lambda body: self.may_answer.wait(60) and plain_answer())
        self.may_answer = threading.Event()


def test_a_form_cannot_break_a_run_that_warms_up_or_drains(tmp_path):
    with Held() as server, web_ui(tmp_path, "-H", server.url, "--set", "warmup.requests=1") as url:
        assert swarm(url, 1, host=server.url, run_time="1s")["success"]
        wait_for(lambda: server.requests)
        in_warmup = swarm(url, 3)
        logged = "".join(httpx.get(f"{url}/logs").json()["master"])
        time.sleep(1.2)  # a clock that began before the warm-up would end the run in it
        server.may_answer.set()
        wait_for(lambda: newest(tmp_path)["window"]["started_at"])
        server.may_answer.clear()
        wait_for(lambda: newest(tmp_path)["window"]["ended_at"])
        in_drain = swarm(url, 3, host=server.url)
        server.may_answer.set()
        wait_for(lambda: newest(tmp_path)["status"] != "running")
        _, first = read(tmp_path)
        # other users while it measures, which the run tells of
        assert swarm(url, 2, host=server.url, run_time="60s")["success"]
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2 and newest(tmp_path)["window"]["started_at"])
        assert swarm(url, 5)["success"]
        wait_for(lambda: newest(tmp_path)["notes"])
        httpx.post(f"{url}/stop", timeout=60).raise_for_status()

    assert (in_warmup["success"], in_drain["success"]) == (False, False)
    assert "a run is beginning" in in_warmup["message"]
    assert in_warmup["message"] in logged  # the form that changes users shows nothing of it
    assert "drains still" in in_drain["message"]
    assert first["status"] == "finished"
    assert first["window"]["ended_at"] - first["window"]["started_at"] >= 1
    assert "5 from" in newest(tmp_path)["notes"][-1]
    assert "2 before" in newest(tmp_path)["notes"][-1]


def test_a_run_that_locust_starts_by_itself_is_as_long_as_any(tmp_path):
    words = ("--autostart", "--autoquit", "0", "-t", "1", "--set", "warmup.requests=1", "--no-report")
    with Held() as server:
        port = str(free_port())
        with started(tmp_path, "-H", server.url, "--web-port", port, *words, headless=False) as process:
            wait_for(lambda: server.requests)
            time.sleep(1.2)  # longer than the run, in the warm-up
            server.may_answer.set()
            output, _ = process.communicate(timeout=60)
    told = newest(tmp_path)

    assert process.returncode == 0, output
    assert told["status"] == "finished"
    assert told["window"]["ended_at"] - told["window"]["started_at"] >= 1


def answers(url) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url).is_success
    return False


def eventually(page, expression):
    deadline = time.monotonic() + 60
    while not page.ask(f"Promise.resolve({expression}).then(Boolean)"):
        assert time.monotonic() < deadline, f"{expression} in {page.ask('document.body.innerText')} {page.problems}"
        time.sleep(0.1)


def press_start(page, url):
    """As a person does; again, if nothing came of it, as happens while Locust's page is not quite there yet."""
    asked = "performance.getEntriesByType('resource').some((one) => one.name.endsWith('/swarm'))"
    again = 0.0
    while not page.ask(asked):
        if time.monotonic() > again:
            page.ask("document.querySelector('button[type=submit]')?.click()")
            again = time.monotonic() + 3
        time.sleep(0.1)
    # Locust tells a state that is up to 2 s old; who starts within these sees the form until the page is loaded anew
    eventually(page, "fetch('/stats/requests').then((r) => r.json()).then((told) => told.state === 'running')")
    page.call("Page.navigate", url=url)


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_the_tab_shows_a_run_that_goes_on_as_it_is(tmp_path, page, processes):
    log = tmp_path / "sent.npz"
    settings = ("target.name=" + HOSTILE, "slo.ttft_ms=5000", "workload.max_tokens=24")
    words = [word for setting in settings for word in ("--set", setting)]
    with schedule_server("--log", str(log)) as server:
        with web_ui(tmp_path / "runs", "-H", server, "-u", "3", "-r", "3", *words, *processes) as url:
            page.size(1280)
            page.call("Page.navigate", url="about:blank")  # a page of before still asks a server that has ended
            page.wait("location.protocol === 'about:'")
            page.problems.clear()
            page.call("Page.navigate", url=url)
            if processes:
                eventually(page, "fetch('/worker-count').then((r) => r.json()).then((told) => told.worker_count === 2)")
            eventually(page, "document.querySelector('button[type=submit]')")
            press_start(page, url)
            eventually(page, TAB)
            page.ask(f"{TAB}.click()")
            # numbers come, and change
            eventually(page, f"Number({FIGURE.format('ttft')}?.n) > 0")
            before = page.ask(FIGURE.format("ttft"))
            eventually(page, f"Number({FIGURE.format('ttft')}.n) > {before['n']} + 5")
            eventually(page, "document.querySelectorAll('.twoclocks figure').length >= 7")
            drawn = page.ask("[...document.querySelectorAll('.twoclocks figure')].map((one) => one.dataset.chart)")
            heading = page.ask("document.querySelector('.twoclocks').textContent")
            shown = page.ask("location.search")
            # Locust's own switch of light and dark is followed
            dark = page.ask("document.querySelector('.twoclocks').classList.contains('dark')")
            page.ask("""document.querySelector('path[d^="M20 8.69V4"]').closest('button').click()""")
            eventually(page, f"document.querySelector('.twoclocks').classList.contains('dark') !== {str(dark).lower()}")
            so_far = httpx.get(f"{url}/twoclocks/requests.jsonl")
            # another tab and back
            page.ask("document.querySelector('[role=tab]').click()")
            eventually(page, "!document.querySelector('.twoclocks')")
            page.ask(f"{TAB}.click()")
            eventually(page, "document.querySelector('.twoclocks')")
            assert httpx.get(f"{url}/stop", timeout=60).status_code == 405  # Locust wants a POST
            page.ask("fetch('/stop', {method: 'POST'}).then((r) => r.ok)")
            eventually(page, "document.querySelector('.twoclocks h2')?.textContent.endsWith(': interrupted')")
            at_the_end = {name: page.ask(FIGURE.format(name)) for name in ("ttft", "itl", "tpot", "e2e")}
            told = httpx.get(f"{url}/twoclocks/live.json").json()
            assert httpx.get(f"{url}/twoclocks/requests.jsonl").content == records_of(tmp_path / "runs")
            problems = list(page.problems)
    records, _ = read(tmp_path / "runs")
    expected = summarise(load_run(only_run(tmp_path / "runs")))["figures"]
    sent = read_log(log)

    assert problems == []
    assert page.ask("window.pwned === undefined")
    assert HOSTILE in heading
    assert shown == "?tab=twoclocks"
    assert drawn == ["ttft_p50", "itl_p50", "tpot_p50", "output_throughput", "request_throughput", "users", "running"]
    # the same figures as those of summary.json, to the last digit that a browser keeps
    for name, row in at_the_end.items():
        for statistic in ("mean", "p50", "p95", "p99", "max"):
            assert float(row[statistic]) == pytest.approx(expected[name][statistic], rel=1e-9), (name, statistic)
    for name in ("output_throughput", "request_throughput", "goodput", "goodput_share", "requests", "ok", "failed"):
        assert told["figures"][name]["value"] == pytest.approx(expected[name]["value"], rel=1e-9), name
    # and those of the server, by its own log
    assert float(at_the_end["ttft"]["p50"]) == pytest.approx(middle_ttft(sent), abs=0.01)
    assert float(at_the_end["tpot"]["p50"]) == pytest.approx(0.02, rel=0.1)
    assert {record.worker for record in records if record.phase == "measure"} == ({0, 1} if processes else {0})
    lines = so_far.content.splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
    assert 5 < len(lines) <= len(records)
    running = [value for value in told["seconds"]["running"] if value is not None]
    assert max(running) == 3


def middle_ttft(sent) -> float:
    first = np.cumsum(sent.writes) - sent.writes
    return float(np.median((sent.after_ns[first] - sent.arrived_ns) / 1e9))


def records_of(folder) -> bytes:
    return (only_run(folder) / "requests.jsonl").read_bytes()


def test_routes_are_closed_to_other_pages_and_say_so_where_no_run_could_begin(tmp_path):
    with web_ui(tmp_path, "-H", "http://127.0.0.1:9") as url:
        nothing = httpx.get(f"{url}/twoclocks/live.json")
        assert httpx.get(f"{url}/twoclocks/requests.jsonl").status_code == 404
        for path in ("live.json", "live.js", "requests.jsonl"):
            foreign = httpx.get(f"{url}/twoclocks/{path}", headers={"Origin": "http://evil.example"})
            assert foreign.status_code == 403
        assert httpx.get(f"{url}/twoclocks/live.json", headers={"Origin": url}).is_success
        form = {"user_count": 1, "spawn_rate": 1, "host": "http://127.0.0.1:9", "run_time": "2s"}
        assert httpx.post(f"{url}/swarm", data=form).json()["success"]
        wait_for(lambda: httpx.get(f"{url}/twoclocks/live.json").json()["error"])
        trouble = httpx.get(f"{url}/twoclocks/live.json").json()["error"]
        logged = "".join(httpx.get(f"{url}/logs").json()["master"])
        index = httpx.get(url).text

    assert nothing.json() == {"run": None, "error": None}
    assert nothing.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "not reachable" in trouble
    assert trouble in logged
    assert index.count("./twoclocks/live.js") == 1
    assert '"href": "./twoclocks/requests.jsonl"' in index


@pytest.mark.parametrize(("text", "whole"), [(b"", b""), (b"a\nbc\nd", b"a\nbc\n"), (b"abc", b""), (b"a\n", b"a\n")])
def test_whole_lines_alone_are_sent(tmp_path, monkeypatch, text, whole):
    monkeypatch.setattr("twoclocks.web_tab.BLOCK_BYTES", 2)
    path = tmp_path / "requests.jsonl"
    path.write_bytes(text)

    assert b"".join(blocks(path, whole_lines(path))) == whole
