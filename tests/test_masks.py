"""What may be secret is found by its name, refused where it would be written down, and taken out of texts."""

import base64

import msgspec
import pytest

from twoclocks.endpoint import make_endpoint, request_headers, secrets_of
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Start, Target, Timeouts, load_experiment
from twoclocks.masks import masked, redact, secret_words, tells_a_secret


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


def test_a_word_of_a_language_is_hidden_where_it_stands_alone():
    secrets = secret_words(["something", "key-0123456789"])

    assert redact("something somethings akey-0123456789", secrets) == "*** somethings a***"
    assert redact("it ends with somethin", secrets) == "it ends with ***"


def test_the_values_of_a_cookie_are_secrets_and_its_names_are_not():
    cookie = "PHPSESSID=abcdef123456; theme=0123456789"

    assert {"abcdef123456", "0123456789"} < set(secret_words([cookie]))
    assert redact("bad PHPSESSID abcdef123456", secret_words([cookie])) == "bad PHPSESSID ***"


def test_headers_that_route_and_label_hide_nothing(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    headers = {
        "X-Traffic": "benchmark requests",
        "Content-Type": "application/json",
        "X-Model": "Llama-3.1-8B-Instruct",
    }
    kept = {"X-Auth-User": "somebody", "X-Any": "0123456789abcdef", "X-Login": "Bearer short-key"}

    assert secrets_of(Target(headers=headers)) == ()
    assert set(secrets_of(Target(headers=headers | kept))) == {"somebody", "0123456789abcdef", "short-key"}


def test_a_schema_of_an_answer_is_shown():
    schema = {"properties": {"password": {"description": "choose something memorable"}, "token": "key-1"}}
    shown = {"properties": {"password": {"description": "choose something memorable"}, "token": "***"}}

    assert masked({"response_format": {"json_schema": {"schema": schema}}}) == {
        "response_format": {"json_schema": {"schema": shown}}
    }


@pytest.mark.parametrize(
    ("tree", "shown", "told"),
    [
        (
            "command:kubectl logs --token abc --tail 1 HF_TOKEN=x",
            "command:kubectl logs --token *** --tail 1 HF_TOKEN=***",
            ["abc", "x"],
        ),
        ("command:docker logs -f 'my server'", "command:docker logs -f 'my server'", []),
        ("command:docker exec -u 1000:1000 x tail f", "command:docker exec -u 1000:1000 x tail f", []),
        ("command:curl -H 'Authorization: Bearer k'", "command:curl -H 'Authorization: Bearer ***'", ["k"]),
        ("command:curl -H 'Cookie: a=b; c=d' h", "command:curl -H 'Cookie: ***' h", ["a=b; c=d"]),
        ("command:curl -u me:pw h", "command:curl -u *** h", ["me:pw"]),
        ("command:curl https://me:pw@h/logs", "command:curl https://***@h/logs", ["me:pw"]),
        ("command:curl 'Authorization: Bearer k", "command:curl 'Authorization: Bearer ***", ["k"]),  # a quote too few
        (
            "command:ssh h 'docker logs --token k --tail 1'",
            "command:ssh h 'docker logs --token *** --tail 1'",
            ["k"],
        ),
        (
            ["bash", "-c", "vllm serve m --api-key k --port 1 --max-num-batched-tokens 2"],
            ["bash", "-c", "vllm serve m --api-key *** --port 1 --max-num-batched-tokens 2"],
            ["k"],
        ),
        (["bash", "-c", "curl -u me:pw h"], ["bash", "-c", "curl -u *** h"], ["me:pw"]),
        (["--otlp", "http://me:pw@h"], ["--otlp", "http://***@h"], ["me:pw"]),
        ({"HTTPS_PROXY": "http://me:pw@h"}, {"HTTPS_PROXY": "http://***@h"}, ["me:pw"]),
        ({"password": 12345678, "token": None}, {"password": "***", "token": None}, ["12345678"]),
    ],
)
def test_masks_of_commands_and_addresses(tree, shown, told):
    hidden = []

    assert masked(tree, hidden=hidden) == shown
    assert [one for one in hidden if one != "***"] == told


@pytest.mark.parametrize(
    "name",
    ["clientSecret", "accessToken", "userPassword", "OPENAI_KEY", "private_key", "privateKey", "passphrase", "X-Token"],
)
def test_names_of_secrets(name):
    assert masked({name: "x"}) == {name: "***"}


@pytest.mark.parametrize("name", ["max_tokens", "maxTokens", "api_key_env", "prompt_cache_key", "keys", "monkey"])
def test_names_of_what_is_none(name):
    assert masked({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    ("word", "tells"),
    [
        ("target.headers.Authorization=Bearer x", True),
        ("target.headers.Authorization=${KEY}", False),
        ("target.headers.Authorization=Bearer ${KEY}", False),
        ("target.headers.Authorization=Bearer ${KEY:-}", False),
        ("target.headers.Authorization=Bearer ${KEY:-x}", True),
        ("target.headers.Authorization=***", False),
        ("target.start.env.HTTPS_PROXY=http://me:pw@h", True),
        ("workload.requests=by_key.jsonl", False),
        ("target.extra_body.api_key=x", True),
        ("workload.max_tokens=3", False),
        ("target.api_key_env=NAME", False),
        ("target.api_key_file=/run/secrets/key", False),
    ],
)
def test_a_command_line_that_tells_a_secret(word, tells):
    assert tells_a_secret(word) == tells
