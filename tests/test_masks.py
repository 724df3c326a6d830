"""What may be secret is found by its name, refused where it would be written down, and taken out of texts."""

import base64

import msgspec
import pytest

from twoclocks.endpoint import make_endpoint, request_headers, secrets_of
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Start, Target, Timeouts, load_experiment
from twoclocks.masks import masked, masked_command, redact, secret_words, tells_a_secret


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
