from pathlib import Path

import pytest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, load_experiment, replace, to_yaml
from twoclocks.masks import masked_word

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


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("cancel_share: 2", "workload.cancel_share"),
        ("cancel_after_s: 0", "workload.cancel_after_s"),
        ("cancel_after_s: [3, 1]", r"expected seconds or \[low, high\], found \[3.0, 1.0\]"),
        ("cancel_after_s: [3]", r"expected seconds or \[low, high\], found \[3.0\]"),
        ("cancel_share: 0.1, cancel_after_s: 600", "not before timeouts.total_s = 600; raise that"),
        ("patience_s: 120", "not before timeouts.first_token_s = 120; raise that"),
    ],
)
def test_users_who_cannot_leave_in_time_are_refused(load, keys, words):
    with pytest.raises(ExperimentError, match=words):
        load(f"workload: {{{keys}}}")


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


def test_where_text_is_wanted_a_number_is_text(load):
    text = (
        "labels: {build: '${BUILD}'}\ntarget: {start: {kind: vllm, model: m, flags: [--max-model-len, '${LEN:-2048}']}}"
    )
    settings = ("name=0123", "labels.commit=12e4567", "labels.day=2026-11-21", "labels.on=true", "target.headers.X=5")
    experiment = load(text, *settings, BUILD="1.10")

    assert experiment.name == "0123"
    assert experiment.labels == {"build": "1.10", "commit": "12e4567", "day": "2026-11-21", "on": "true"}
    assert experiment.target.headers == {"X": "5"}
    assert experiment.target.start.flags == ["--max-model-len", "2048"]
    assert load("", "target.name=null", "target.tls_verify=false", "collect.process=7").target.tls_verify is False


def test_an_empty_variable_takes_the_default_as_in_a_shell(load):
    assert load("load: {users: '${USERS:-3}'}\nname: a${NAME:-b}", USERS="", NAME="").load.users == 3
    assert load("name: a${NAME:-b}", NAME="").name == "ab"
    assert load("name: a${NAME}", NAME="").name == "a"
    with pytest.raises(ExperimentError, match=r"load\.users: expected `int`, found nothing"):
        load("load: {users: '${USERS}'}", USERS="")


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
        (
            "target: {start: {kind: vlm}}",
            (),
            "start.kind: expected vllm | transformers | pytorch | command, found 'vlm'",
        ),
        ("target: {start: {model: m}}", (), "target.start: object missing required field `kind`"),
        ("target: {start: {kind: vllm, modle: m}}", (), "unknown key 'target.start.modle'; known here: kind, model, "),
        ("target: {stages: [{name: a}, {nme: b}]}", (), "unknown key 'target.stages[1].nme'; known here: name, "),
        ("load: {sweep: {levels: {form: 1}}}", (), "unknown key 'load.sweep.levels.form'; known here: from, to"),
        ("load: {sweep: {levels: {from: 1, to: 2, count: 2, scale: x}}}", (), "scale: expected linear | log, found"),
        ("target: {start: {kind: vllm}}", (), "target.start.model: vllm needs one"),
        ("target: {start: {kind: vllm, model: m, command: [x]}}", (), "start.command: is for kind command"),
        ("target: {start: {kind: transformers, model: m}}", (), "write target.server: transformers"),
        ("target: {url: 'http://far:80', start: {kind: vllm, model: m}}", (), "names another (http://far:80)"),
        ("target: {start: {kind: command}}", (), "start.command: expected its words"),
        ("target: {start: {kind: command, command: [x]}}", (), "does not say on which port"),
        ("target: {start: {kind: command, command: [x, {port}]}}", (), 'write "{port}"'),
        ("target: {start: {kind: command, command: ['{model}'], port: 80}}", (), "the command has a {model}"),
        ("target: {start: {kind: vllm, model: m, port: 70000}}", (), "target.start.port: expected `int` <= 65535"),
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


def test_secrets_of_a_started_server_are_masked_and_its_other_words_are_not(load):
    experiment = load("""
        target:
          start:
            kind: command
            model: m
            command: [env, HF_TOKEN=secret-1, serve, --port, "{port}", --api-key, secret-2, --hf-token=secret-3]
            flags: [--return-tokens-as-token-ids, --max-num-batched-tokens, "512"]
            env: {HUGGING_FACE_HUB_TOKEN: secret-4, AWS_SECRET_ACCESS_KEY: secret-5, OMP_NUM_THREADS: "1"}
        """)
    text = to_yaml(experiment)

    assert "secret-" not in text
    start = load(text).target.start
    assert start.command == ["env", "HF_TOKEN=***", "serve", "--port", "{port}", "--api-key", "***", "--hf-token=***"]
    assert start.flags == experiment.target.start.flags
    assert start.env["OMP_NUM_THREADS"] == "1"
