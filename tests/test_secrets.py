"""Keys: planted in every place, said back by a hostile server in every way, and then looked for everywhere."""

import base64
import json
import sys
from pathlib import Path

import httpx
import msgspec
import pytest
from fake_server import CLOSE, DONE, END, HEAD, FakeServer, answer, chunked, delta, event, response, usage
from locust_runs import free_port, only_run, started, wait_for
from make_spans import export, vllm_span

from twoclocks.endpoint import make_endpoint, request_headers, secrets_of
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Start, Target, Timeouts, load_experiment
from twoclocks.masks import masked, masked_command, redact, secret_words, tells_a_secret

KEY, HEADER, BODY, PAIR = "sk-planted-0001", "planted-header-0002", "planted-body-0003", "planted-pair-0004"
PLANTED = (KEY, HEADER, BODY, PAIR)
ECHO = " ".join(PLANTED)
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
        self.pages["GET /v1/models"] = response(200, json.dumps({"data": [{"id": f"model {ECHO}"}]}).encode())
        self.pages["GET /version"] = response(200, json.dumps({"version": f"1 {ECHO}"}).encode())
        page = f'# HELP a {ECHO}\n# TYPE a gauge\na{{key="{ECHO}"}} 1\nvllm:num_requests_running 0\n'
        self.metrics = lambda: response(200, page.encode(), "text/plain", f"x-key: {KEY}\r\n")
        self.heard: list[dict[str, str]] = []
        self.answers = [
            answer(delta(content=f"you sent {KEY[:7]}"), delta(content=f"{KEY[7:]} and {ECHO}", finish_reason=ECHO),
                   event({"choices": [], "metrics": {"note": ECHO}}), usage(9), DONE),
            response(401, json.dumps({"error": {"message": f"no key: {ECHO}"}}).encode(), headers=f"x-k: {KEY}\r\n"),
            response(500, f"<h1>{'x' * 480} {ECHO}</h1>".encode(), "text/html"),
            response(302, b"", headers=f"location: http://127.0.0.1:9/{KEY}\r\n"),
            [f"HTTP/9 {ECHO}\r\n\r\n".encode(), CLOSE],
            [HEAD, chunked(event({"error": {"message": ECHO}})), CLOSE],
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
def told(tmp_path_factory):
    """All that a run with planted keys shows: {where: bytes}."""
    place = tmp_path_factory.mktemp("secrets")
    key_file = place / "key.txt"
    key_file.write_text(KEY + "\n")
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
                "collect": {"log": f"command:{sys.executable} -c {json.dumps(LOG)}", "metrics_interval_s": 0.3},
                "export": {"prometheus_port": exporting},
                "output_text": True,
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
            form = {"user_count": 2, "spawn_rate": 2, "host": server.url}
            assert httpx.post(f"{url}/swarm", data=form).json()["success"]
            wait_for(lambda: len(server.heard) > 4 + 2 * len(server.answers))
            wait_for(lambda: b"***" in httpx.get(f"{url}/stats/failures/csv").content)
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    found[f"argv of {path}"] = path.read_bytes()
                except OSError:
                    continue
            for page in PAGES:
                got = httpx.get(url + page)
                found[page] = str(got.headers).encode() + got.content
            found["exporter"] = httpx.get(f"http://127.0.0.1:{exporting}/metrics").content
            httpx.post(f"{url}/stop", timeout=60).raise_for_status()
            wait_for(lambda: (only_run(runs) / "report.html").exists())
            process.terminate()
            output, _ = process.communicate(timeout=60)
    found["output"] = output.encode()
    found |= {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    return found, server.heard


def _answers(url) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_planted_keys_were_sent_and_are_nowhere_to_be_found(told):
    found, heard = told

    assert {headers["authorization"] for headers in heard} == {f"Bearer {KEY}"}
    assert {headers["x-other"] for headers in heard} == {HEADER}
    places = {
        where: [key for key in (*PLANTED, BASIC.split()[1]) if key.encode() in text] for where, text in found.items()
    }
    assert {where: keys for where, keys in places.items() if keys} == {}


def test_no_one_saw_too_little_to_say_so(told):
    """Each of the places was really filled with what the server said."""
    found, _ = told
    run = next(name for name in found if name.endswith("/requests.jsonl") and not name.startswith("/"))
    records = [json.loads(line) for line in found[run].splitlines()]
    folder = run.rpartition("/")[0]
    kinds = {record["error_kind"] for record in records if record["error_message"] and "***" in record["error_message"]}

    assert {"http_401", "http_500", "http_302", "protocol", "error_event", "malformed"} <= kinds
    answered = next(record for record in records if record["output_text"])
    assert answered["output_text"] == "you sent *** and *** *** *** ***"
    assert (answered["finish_reason"], answered["server"]["note"]) == ("*** *** *** ***", "*** *** *** ***")
    assert json.loads(found[f"{folder}/run.json"])["target"]["model"] == "model *** *** *** ***"
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


@pytest.mark.parametrize(
    "setting",
    [
        "target.url=http://user:planted-0005@127.0.0.1:1",
        "target.url=ftp://user:planted-0005@127.0.0.1:1",
        "target.url=http://127.0.0.1:1/?api_key=planted-0005",
        "collect.metrics_url=[http://user:planted-0005@127.0.0.1:1/metrics]",
        "collect.metrics_url=[http://127.0.0.1:1/metrics?token=planted-0005]",
        "collect.gpu=[http://user:planted-0005@127.0.0.1:1/metrics]",
        "target.stages=[{name: a, metrics_url: http://user:planted-0005@127.0.0.1:1/metrics}]",
        "target.headers.Authorization: planted-0005",
        "target.headers={X-Key: [planted-0005]}",
        "target.headers=planted-0005",
    ],
)
def test_a_key_where_it_would_be_written_down_is_refused_and_not_shown(tmp_path, setting):
    path = tmp_path / "x.yaml"
    path.write_text("{}")
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path, [setting])

    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the key, on one line, and nothing else"),
        ("one\ntwo", "expected the key, on one line, and nothing else"),
        ("\udcff", "is no text"),
        (None, "cannot be read: No such file or directory"),
        ("x" * 20_000, "expected the key, on one line, and nothing else"),
    ],
    ids=["empty", "two lines", "bytes", "missing", "large"],
)
def test_a_key_file_that_holds_no_key(tmp_path, text, message):
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ExperimentError) as caught:
        request_headers(Target(api_key_file=str(path)))

    assert str(caught.value) == f"target.api_key_file: {path}: {message}"


def test_the_file_goes_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    (tmp_path / "key").write_text("of-the-file\n")

    assert request_headers(Target(api_key_file=str(tmp_path / "key"))) == {"Authorization": "Bearer of-the-file"}
    assert request_headers(Target()) == {"Authorization": "Bearer of-the-environment"}


def test_what_is_secret_of_a_target(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("http_proxy", "http://me:proxy-password@127.0.0.1:1")
    start = {
        "kind": "command",
        "command": ["serve", "--api-key", "key-of-a-server"],
        "env": {"HF_TOKEN": "hf_0123456789"},
    }
    monkeypatch.setenv("no_proxy", "")
    target = Target(
        url="http://10.0.0.1:1",
        model="some-large-model",
        headers={"X-Model": "some-large-model", "X-Short": "abc"},
        extra_body={
            "user": "somebody-else",
            "auth": {"token": "of-the-body"},
            "credentials": {"secret": ["in-a-list"]},
        },
        start=msgspec.convert(start, Start),
    )
    secrets = secrets_of(target)

    assert set(secrets) == {"sk-0123456789", "of-the-body", "in-a-list", "key-of-a-server", "hf_0123456789"}
    assert make_endpoint(target, Timeouts()).secrets[-2:] == secret_words(
        ["Basic " + base64.b64encode(b"me:proxy-password").decode()]
    )[-2:]  # fmt: skip


def test_redacting_leaves_numbers_and_what_is_no_secret():
    secrets = secret_words(["Bearer 12345678-key", "12345678"])
    told = {"12345678": [12345678, "12345678-key", None, True], "text": "at 12345678 and 1234567"}

    assert secrets == ("12345678-key", "12345678")
    assert redact(told, secrets) == {"***": [12345678, "***", None, True], "text": "at *** and 1234567"}
    assert redact("it ends with 12345678-k", ("12345678-key",)) == "it ends with ***"
    assert redact(told, ()) is told


def test_masks_of_commands():
    assert (
        masked_command("kubectl logs --token abc --tail 1 HF_TOKEN=x")
        == "kubectl logs --token *** --tail 1 HF_TOKEN=***"
    )
    assert masked({"log": "command:tail --password x f"}) == {"log": "command:tail --password *** f"}
    assert masked_command("docker logs -f 'my server'") == "docker logs -f 'my server'"


@pytest.mark.parametrize(
    ("word", "tells"),
    [
        ("target.headers.Authorization=Bearer x", True),
        ("target.headers.Authorization=${KEY}", False),
        ("target.headers.Authorization=***", False),
        ("target.extra_body.api_key=x", True),
        ("workload.max_tokens=3", False),
        ("target.api_key_env=NAME", False),
        ("target.api_key_file=/run/secrets/key", False),
    ],
)
def test_a_command_line_that_tells_a_secret(word, tells):
    assert tells_a_secret(word) == tells
