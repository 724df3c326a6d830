from pathlib import Path

import pytest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, load_experiment, masked_word, replace, to_yaml

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides, **environ):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, overrides, environ)

    return load


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_experiments_load(path):
    assert load_experiment(path).name


def test_an_empty_file_is_the_defaults(load):
    assert load("") == Experiment()


def test_overrides_and_variables(load):
    target = "target: {url: '${URL:-http://a:1}', extra_body: {stop: '${STOP}'}}"
    text = f"load: {{users: 3}}\n{target}\nworkload: {{max_tokens: '${{MAX}}'}}"
    experiment = load(text, "load.users=10", "target.extra_body.temperature=0", STOP="x ${y}", MAX="7")

    assert experiment.load.users == 10
    assert experiment.target.url == "http://a:1"
    assert experiment.target.extra_body == {"stop": "x ${y}", "temperature": 0}
    assert experiment.workload.max_tokens == 7


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("lod: 1", (), "unknown key 'lod'; known here: name, target"),
        ("load: {usrs: 1}", (), "unknown key 'load.usrs'; known here: shape, users"),
        ("load: {users: 0}", (), "load.users: expected `int` >= 1"),
        ("load: {users: many}", (), "load.users: expected `int`, got `str`"),
        ("load: 3", (), "load: expected `object`, got `int`"),
        ("load: {duration_s: 0}", (), "load.duration_s: expected `float` > 0"),
        ("load: {ramp_s: 9, duration_s: 5}", (), "load.ramp_s: the ramp (9 s) is longer than load.duration_s (5 s)"),
        ("target: {server: vlm}", (), "target.server: expected vllm | tgi | "),
        ("slo: {ttft_ms: fast}", (), "slo.ttft_ms: expected a number above 0 | none, found 'fast'"),
        ("target: {url: localhost:8000}", (), "target.url: expected http://HOST:PORT, found 'localhost:8000'"),
        ("target: {url: 'http://me:pw@h'}", (), "target.url: holds a password"),
        ("target: {url: '${NO_SUCH}'}", (), "${NO_SUCH} is not set; export NO_SUCH or write"),
        ("target: {tls_verify: nope.pem}", (), "target.tls_verify: no CA bundle at 'nope.pem'"),
        (
            "target: {server: transformers}\nworkload: {ignore_eos: true}",
            (),
            "workload.ignore_eos: transformers serve refuses",
        ),
        ("collect: {log: x.log}", (), "collect.log: expected none or file:PATH"),
        ("collect: {metrics_url: [localhost]}", (), "collect.metrics_url: expected auto, none or a list of URLs"),
        ("- a", (), "expected keys such as 'target:'"),
        ("a: [", (), "line 1 is not YAML"),
        ("", ("load.users",), "--set 'load.users': expected KEY=VALUE"),
        ("load: {users: 1}", ("load.users.x=1",), "--set load.users.x: 'users' holds a value, not keys"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_key(load, text, overrides, expected):
    with pytest.raises(ExperimentError) as caught:
        load(text, *overrides)

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ExperimentError, match=r"nope\.yaml: no such experiment file"):
        load_experiment(Path("nope.yaml"))


def test_the_resolved_experiment_reads_back_and_hides_headers(load, tmp_path):
    experiment = load("target: {headers: {Authorization: Bearer secret-1}, api_key_env: MY_KEY}\nload: {users: 3}")
    text = to_yaml(experiment)

    assert "secret-1" not in text
    assert load(text) == replace(experiment, "target.headers", {"Authorization": "***"})


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("target.headers.X=s", "target.headers.X=***"),
        ("target={url: u, headers: {A: s}}", "target=***"),
        ("target.extra_body.api_key=s", "target.extra_body.api_key=***"),
        ("target.extra_body={password: s}", "target.extra_body=***"),
        ("workload.max_tokens=5", "workload.max_tokens=5"),
        ("target.api_key_env=MINE", "target.api_key_env=MINE"),
        ("target.tokenizer=t.json", "target.tokenizer=t.json"),
    ],
)
def test_what_may_be_secret_is_masked_and_nothing_else(word, shown):
    assert masked_word(word) == shown


def test_secrets_deep_in_the_experiment_are_masked(load):
    text = to_yaml(load("target: {extra_body: {auth: {token: secret-1}, credentials: [secret-2], top_k: 3}}"))

    assert "secret-" not in text
    assert "top_k: 3" in text
