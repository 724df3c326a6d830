"""One run against a server that says back every key it was sent, and markup, and control characters, wherever a server
can say something. Then all that the run shows is looked through: files, output, processes, pages.
"""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, browser
from fake_server import CLOSE, DONE, END, HEAD, FakeServer, answer, chunked, delta, event, response, usage
from locust_runs import free_port, only_run, started, wait_for
from make_spans import export, vllm_span
from make_study import cell, make_study, skipped

from twoclocks import compare, study_report, tables

KEY, HEADER, BODY, PAIR = "sk-planted-0001", "planted-header-0002", "planted-body-0003", "planted-pair-0004"
PLANTED = (KEY, HEADER, BODY, PAIR)
MARKUP = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> =1+1"
STEER = "\x1b]0;hacked\x07"  # a terminal's title
ECHO = f"{' '.join(PLANTED)} {MARKUP}"
SAID = f"*** *** *** *** {MARKUP}"
BASIC = "Basic " + base64.b64encode(f"user:{PAIR}".encode()).decode()
LOG = "import os, time; [print(os.environ['PLANTED_KEY'], flush=True) or time.sleep(0.1) for _ in range(1000)]"
PAGES = ["/", "/login", "/tasks", "/logs", "/exceptions", "/exceptions/csv", "/stats/requests", "/stats/requests/csv"]
PAGES += ["/stats/failures/csv", "/stats/report", "/stats/report?download=1", "/worker-count"]
PAGES += [f"/twoclocks/{name}" for name in ("live.json", "requests.jsonl", "live.js", "live.css")]


class Hostile(FakeServer):
    """Says back whatever it was sent, wherever a server can say something."""

    def __init__(self, otlp: str) -> None:
        super().__init__()
        self.otlp, self.spans = otlp, 0
        self.pages["GET /v1/models"] = response(200, json.dumps({"data": [{"id": f"model {ECHO}{STEER}"}]}).encode())
        self.pages["GET /version"] = response(200, json.dumps({"version": f"1 {ECHO}"}).encode())
        page = f'# HELP a {ECHO}\n# TYPE a gauge\na{{key="{ECHO}"}} 1\nvllm:num_requests_running 0\n'
        self.metrics = lambda: response(200, page.encode(), "text/plain", f"x-key: {KEY}\r\n")
        self.heard: list[dict[str, str]] = []
        self.answers = [
            answer(delta(content=f"you sent {KEY[:7]}"), delta(content=f"{KEY[7:]} and {ECHO}", finish_reason=ECHO),
                   event({"choices": [], "metrics": {"note": ECHO}}), usage(9), DONE),
            response(401, event({"error": {"message": f"no key: {ECHO} {STEER}"}})[6:], headers=f"x-key: {KEY}\r\n"),
            response(500, f"<h1>{'x' * 480} {ECHO}</h1>".encode(), "text/html"),
            response(302, b"", headers=f"location: http://127.0.0.1:9/{KEY}\r\n"),
            [f"HTTP/9 {ECHO}\r\n\r\n".encode(), CLOSE],
            [HEAD, chunked(event({"error": {"message": f"{MARKUP} {ECHO}{STEER}"}})), CLOSE],
            [HEAD, chunked(f"data: {{{ECHO}\n\n".encode()), END],
        ]  # fmt: skip

    def answer(self, headers, body):
        self.heard.append(headers)
        if self.spans < 3:
            self.spans += 1
            span = vllm_span(headers["x-request-id"], **{"http.request.header": ECHO, "cut": "x" * 190 + KEY})
            told = export(span).SerializeToString()
            httpx.post(self.otlp, content=told, headers={"content-type": "application/x-protobuf"}).raise_for_status()
        assert body["api_key"] == BODY
        return self.answers[len(self.heard) % len(self.answers)]


@pytest.fixture(scope="module")
def page():
    if CHROMIUM is None:
        yield None
        return
    with browser() as one:
        one.size(1280)
        yield one


def _look_at_tabs(page, url):
    """(which tab, what the page shows there) of Locust's UI; `hacked` in front where markup came to life."""
    page.call("Page.navigate", url=url)
    page.wait("document.querySelectorAll('[role=tab]').length > 5")
    for number in range(page.ask("document.querySelectorAll('[role=tab]').length")):
        name = page.ask(
            f"(t => {{ t.click(); return t.textContent; }})(document.querySelectorAll('[role=tab]')[{number}])"
        )
        page.wait("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        if name == "Failures":
            page.wait("document.body.innerText.includes('http_401')")
        if name == "LLM metrics":
            page.wait("document.querySelector('.twoclocks h2')?.textContent.length > 0")
        yield name, str(page.ask("[window.hacked, document.body.innerText]")).encode()
    page.call("Page.navigate", url=f"{url}/stats/report")
    page.wait("document.body?.innerText.includes('Failures Statistics')")
    yield "report", str(page.ask("[window.hacked, document.body.innerText]")).encode()


@pytest.fixture(scope="module")
def told(tmp_path_factory, page):
    """All that the run shows: {where: bytes}; the folder; the headers that the server heard."""
    place = tmp_path_factory.mktemp("secrets")
    key_file = place / "key.txt"
    key_file.write_text(KEY + "\n")
    prompts = place / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": f"{MARKUP}{STEER}", "prompt": "Hello"}))
    found: dict[str, bytes] = {}
    otlp, exporting, web = free_port(), free_port(), free_port()
    experiment = place / "experiment.yaml"
    experiment.write_text(
        json.dumps(
            {
                "target": {
                    "server": "vllm",
                    "api_key_file": str(key_file),
                    "headers": {"X-Other": "${PLANTED_HEADER}", "X-Pair": "${PLANTED_PAIR}"},
                    "extra_body": {"api_key": "${PLANTED_BODY}"},
                },
                "collect": {
                    "log": f"command:{sys.executable} -c {json.dumps(LOG)}",
                    "metrics_interval_s": 0.3,
                    "otlp_tail_s": 1,
                },
                "export": {"prometheus_port": exporting},
                "output_text": True,
                "name": MARKUP,
                "labels": {MARKUP: MARKUP},
                "workload": {"requests": str(prompts)},
            }
        )
    )
    planted = {"PLANTED_KEY": KEY, "PLANTED_HEADER": HEADER, "PLANTED_BODY": BODY, "PLANTED_PAIR": BASIC}
    runs = place / "runs"
    with pytest.MonkeyPatch.context() as patch, Hostile(f"http://127.0.0.1:{otlp}/v1/traces") as server:
        for name, value in planted.items():
            patch.setenv(name, value)
        words = ["--experiment", str(experiment), "-H", server.url, "--web-port", str(web), "--loglevel", "DEBUG"]
        words += ["--set", f"collect.otlp_port={otlp}"]
        with started(runs, *words, headless=False) as process:
            url = f"http://127.0.0.1:{web}"
            wait_for(lambda: _answers(url))
            form = {"user_count": 8, "spawn_rate": 8, "host": server.url}
            assert httpx.post(f"{url}/swarm", data=form).json()["success"]
            wait_for(lambda: len(server.heard) > 4 + 2 * len(server.answers))
            wait_for(lambda: b"***" in httpx.get(f"{url}/stats/failures/csv").content)
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    found[f"argv of {path}"] = path.read_bytes()
                except OSError:
                    continue
            for path in PAGES:
                got = httpx.get(url + path)
                found[path] = str(got.headers).encode() + got.content
            if page is not None:
                found |= {f"hacked {where}": text for where, text in _look_at_tabs(page, url)}
            found["exporter"] = httpx.get(f"http://127.0.0.1:{exporting}/metrics").content
            httpx.post(f"{url}/stop", timeout=60).raise_for_status()
            wait_for(lambda: (only_run(runs) / "report.html").exists())
            process.terminate()
            output, _ = process.communicate(timeout=60)
    found["output"] = output.encode()
    found |= {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    return found, only_run(runs), server.heard


def _answers(url) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_planted_keys_were_sent_and_are_nowhere_to_be_found(told):
    found, _, heard = told

    assert {headers["authorization"] for headers in heard} == {f"Bearer {KEY}"}
    assert {headers["x-other"] for headers in heard} == {HEADER}
    places = {
        where: [key for key in (*PLANTED, BASIC.split()[1]) if key.encode() in text] for where, text in found.items()
    }
    assert {where: keys for where, keys in places.items() if keys} == {}


def test_no_one_saw_too_little_to_say_so(told):
    """Each of the places was really filled with what the server said."""
    found, _, _ = told
    run = next(name for name in found if name.endswith("/requests.jsonl") and not name.startswith("/"))
    records = [json.loads(line) for line in found[run].splitlines()]
    folder = run.rpartition("/")[0]
    kinds = {record["error_kind"] for record in records if record["error_message"] and "***" in record["error_message"]}

    assert {"http_401", "http_500", "http_302", "protocol", "error_event", "malformed"} <= kinds
    answered = next(record for record in records if record["output_text"])
    assert answered["output_text"] == f"you sent *** and {SAID}"
    assert (answered["finish_reason"], answered["server"]["note"]) == (SAID, SAID)
    assert json.loads(found[f"{folder}/run.json"])["target"]["model"] == f"model {SAID}{STEER}"
    for name in ("server_samples.jsonl", "server.log", "server_requests.jsonl", "experiment.yaml", "report.html"):
        assert b"***" in found[f"{folder}/{name}"], name
    assert b'"cut":"' + b"x" * 190 + b'***"' in found[f"{folder}/server_requests.jsonl"]  # 200 characters are kept
    for page in (
        "/stats/failures/csv",
        "/stats/requests",
        "/stats/report",
        "/twoclocks/requests.jsonl",
        "/logs",
        "exporter",
    ):
        assert b"***" in found[page], page
    assert any(b"twoclocks.collector" in text for text in found.values())


def test_markup_stays_text_in_locusts_own_pages(told, page):
    if page is None:
        pytest.skip("no Chromium here")
    found, _, _ = told
    seen = {where: text for where, text in found.items() if where.startswith("hacked ")}

    assert {"hacked Statistics", "hacked Failures", "hacked Logs", "hacked LLM metrics", "hacked report"} <= seen.keys()
    assert {where for where, text in seen.items() if not text.startswith(b"[None, ")} == set()
    for where in ("hacked Failures", "hacked report", "hacked LLM metrics"):
        assert b"<script>window.hacked=1</script>" in seen[where], where


def test_markup_stays_text_in_our_pages(told, page, tmp_path):
    if page is None:
        pytest.skip("no Chromium here")
    _, folder, _ = told
    made = compare.compare([folder, folder], tmp_path / "compared", lambda _: None)
    only = cell(1, MARKUP, MARKUP, folder="1")
    make_study(tmp_path / "study", [only], name=MARKUP, skipped=[skipped(f"b{MARKUP}", MARKUP)])
    shutil.copytree(folder, tmp_path / "study" / only.folder)
    study = study_report.build(tmp_path / "study", lambda _: None)
    assert "<script>" not in study.text.read_text().replace(r"\<script\>", "")
    for html in (folder / "report.html", made.html, study.html):
        page.open(html)

        assert page.ask("window.hacked") is None, html
        assert page.ask("document.querySelectorAll('img[src=x]').length") == 0
        assert "<script>window.hacked=1</script>" in page.ask("document.body.innerText")


def test_nothing_steers_the_terminal_and_no_cell_is_a_formula(told, tmp_path):
    found, folder, _ = told
    assert b"\x1b]0;" not in found["output"]
    assert b"\x1b]0;" not in (folder / "summary.txt").read_bytes() + (folder / "report.html").read_bytes()
    for kind in ("csv", "markdown"):
        text = tables.export(folder, kind, out=tmp_path / kind).read_text()

        assert "\x1b" not in text
        assert not re.search(r"(^|,|\|)\s*=1\+1", text)
    assert "<script>" not in (tmp_path / "markdown").read_text()
    for page in ("/stats/failures/csv", "/stats/requests/csv", "/exceptions/csv"):
        assert b"\x1b" not in found[page]


def test_names_of_files_stay_below_the_output_folder(told):
    _, folder, _ = told

    assert re.fullmatch(r"\d{8}-\d{6}-[\w.-]+", folder.name)
    assert all(path.resolve().is_relative_to(folder) for path in folder.rglob("*"))
