"""What a worker is told, and what it makes of it; what either side makes of a bad one at the other end."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import msgspec
import pytest

from twoclocks import __version__
from twoclocks.endpoint import request_headers
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Collect, Experiment, MixPart, Target, Workload
from twoclocks.locust_options import take_ours
from twoclocks.orders import Order, digest, has_key, ordered, shipped

SECRETS = {"headers": {"X-Key": "secret-1"}, "extra_body": {"api_key": "secret-2", "temperature": 0}}


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n')
    return path


def experiment(requests, **target) -> Experiment:
    return Experiment(
        target=Target(**({"api_key_env": "NO_SUCH_KEY"} | target)),
        workload=Workload(requests=str(requests)),
        collect=Collect(log="command:kubectl logs --token secret-3 pod"),
    )


def order(made, **changes) -> Order:
    fields = {
        "run": "r", "version": __version__, "clock": "c", "experiment": shipped(made), "has_key": has_key(made),
        "digest": digest(made), "model": "m", "salt": "s", "share": 0, "shares": 1, "late": False,
    }  # fmt: skip
    return Order(**fields | changes)


def nobody() -> Experiment:
    raise AssertionError("a worker needs no experiment of its own where nothing is secret")


def test_nothing_secret_travels_and_the_worker_takes_it_from_its_own(requests, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret-4")
    made = experiment(requests, **SECRETS, api_key_env="A_KEY")
    sent = msgspec.json.encode(order(made)).decode()
    received = ordered(msgspec.json.decode(sent, type=Order), lambda: made)

    assert "secret-" not in sent
    assert received.target == made.target
    assert received.workload == made.workload


def test_what_the_master_changed_holds_beside_the_workers_secrets(requests):
    made = experiment(requests, **SECRETS, url="http://127.0.0.1:8000/gateway", stream=False)
    own = experiment(requests, **SECRETS)

    assert ordered(order(made), lambda: own).target == made.target


@pytest.mark.parametrize("secret", [SECRETS, {"api_key_env": "A_KEY"}, {"api_key_file": "key.txt"}])
def test_no_secret_goes_where_the_workers_own_experiment_does_not_say(requests, monkeypatch, tmp_path, secret):
    (tmp_path / "key.txt").write_text("secret-5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_KEY", "secret-4")
    made = experiment(requests, **secret, url="http://10.0.0.1:8000")
    with pytest.raises(ExperimentError, match="its key and headers are for http://") as raised:
        ordered(order(made, has_key=False), lambda: experiment(requests, **secret))

    assert "secret-" not in str(raised.value)
    assert ordered(order(made), lambda: made).target == made.target


def test_an_order_names_no_variable_and_no_file(requests, monkeypatch, tmp_path):
    """Whose value would go out: the worker's own experiment names them."""
    monkeypatch.setenv("AWS_SECRET", "secret-6")
    (tmp_path / "id_rsa").write_text("secret-7")
    for named in ({"api_key_env": "AWS_SECRET"}, {"api_key_file": str(tmp_path / "id_rsa")}):
        made = experiment(requests, **named)
        received = ordered(order(made, has_key=False), lambda: experiment(requests))

        assert request_headers(received.target) == {}


def test_a_worker_needs_no_experiment_where_nothing_is_secret(requests):
    made = experiment(requests)

    assert ordered(order(made), nobody).target == made.target


@pytest.mark.parametrize(
    ("own", "changes", "told"),
    [
        (SECRETS, {"version": "0.0.1"}, f"it has twoclocks {__version__}, the master 0.0.1; install the same on both"),
        ({}, {}, "target.headers.X-Key: its value may be secret and does not travel; start the worker with the same"),
        (SECRETS, {"has_key": True}, "NO_SUCH_KEY is not set in its environment, as it is in the master's; set it"),
        (SECRETS, {"digest": "0" * 64}, "prompts.jsonl: is not the file that the master has (SHA-256 "),
    ],
)
def test_what_differs_is_told_in_a_line(requests, own, changes, told):
    made = experiment(requests, **SECRETS)
    with pytest.raises(ExperimentError) as raised:
        ordered(order(made, **changes), lambda: experiment(requests, **own))

    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "secret-" not in str(raised.value)


def test_the_digest_is_of_each_file_and_of_their_order(tmp_path):
    files = []
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
        files.append(MixPart(requests=str(tmp_path / name)))

    def of(*parts):
        return digest(Experiment(workload=Workload(mix=list(parts))))

    assert of(files[0], files[1]) == of(files[2], files[1])
    assert len({of(files[0], files[1]), of(files[1], files[0]), of(files[0])}) == 3
    with pytest.raises(ExperimentError, match="gone: request file cannot be read"):
        of(MixPart(requests=str(tmp_path / "gone")))


def test_locust_does_not_send_our_options_to_workers():
    options = Namespace(
        overrides=["target.headers.X=secret-1"], run_folder=Path("x"), started=Path("y"), experiment="e"
    )
    ours = take_ours(options)

    assert (ours.overrides, ours.run_folder, ours.started) == (["target.headers.X=secret-1"], Path("x"), Path("y"))
    assert vars(options) == {"overrides": [], "run_folder": None, "started": None, "experiment": "e"}


HELD = """
import json, sys
from argparse import Namespace
from types import SimpleNamespace
import gevent
from locust.event import Events
from twoclocks import worker
from twoclocks.experiment import Experiment, Load, Target, Workload
from twoclocks.orders import Order, digest, shipped
from twoclocks import __version__
from twoclocks.run_folder import this_clock
from twoclocks.user import StreamingUser

worker.HELD_BYTES = 10_000
sent = []
runner = SimpleNamespace(
    register_message=lambda *a, **k: None, stop=lambda: None, user_count=0, environment=None,
    send_message=lambda name, data=None: sent.append((name, data)),
)
environment = SimpleNamespace(parsed_options=Namespace(), events=Events(), stop_timeout=0)
runner.environment = environment
side = worker.WorkerSide(environment, runner)
made = Experiment(workload=Workload(requests=sys.argv[1]), load=Load(users=1))
order = Order(run="r", version=__version__, clock=this_clock(), experiment=shipped(made), has_key=False,
              digest=digest(made), model="m", salt="s", share=0, shares=1, late=False)
say = lambda data: SimpleNamespace(data={"run": "r"} | data)
import msgspec
side.on_run(say(msgspec.structs.asdict(order)))
gevent.sleep(0.01)
ping = next(data for name, data in sent if name == "twoclocks_ping")
side.on_pong(say({"sent_ns": ping["sent_ns"], "told_ns": ping["sent_ns"] + 1}))
waits = side.sender.may_send.is_set()
side.on_window(say({"zero_ns": 5, "window_ns": 7}))
told = [waits, side.sender.may_send.is_set()]
for _ in range(11):
    side._keep(b"x" * 999 + b"\\n")
side._flush()
told.append(side.sender.may_send.is_set())
taker = gevent.spawn(side.sender.take)
gevent.sleep(0.05)
told.append(taker.dead)
frames = [data for name, data in sent if name == "twoclocks_frame"]
side.on_ack(say({"number": frames[-1]["number"]}))
gevent.sleep(0.05)
told += [side.sender.may_send.is_set(), taker.dead, taker.value is not None, side.held_s >= 0.05]
told += [side.sender.zero_ns, side.sender.window_ns, b"".join(one["lines"] for one in frames).count(b"\\n")]
print(json.dumps(told))
"""


def test_a_worker_whose_records_are_not_taken_holds_its_requests_back_until_they_are(requests):
    done = subprocess.run([sys.executable, "-c", HELD, str(requests)], capture_output=True, text=True, check=False)
    waits, may, full, went_on, again, goes_on, has_plan, told, zero, window, lines = json.loads(done.stdout or "[]")

    assert (waits, may) == (False, True), done.stderr
    assert (full, went_on) == (False, False)
    assert (again, goes_on, has_plan, told) == (True, True, True, True)
    assert (zero, window, lines) == (5, 7, 11)  # on the master's own clock
    assert "the master has not taken 0 MB of records" in done.stderr


HOSTILE = """
import json, sys
from types import SimpleNamespace
from twoclocks.experiment import Experiment, Workload
from twoclocks.fleet import Fleet

client = SimpleNamespace(id="w", state="ready")
runner = SimpleNamespace(clients=SimpleNamespace(all=[client]), send_message=lambda *a: None, state="running")
kept = []
made = Experiment(workload=Workload(requests=sys.argv[1]))
nothing = lambda *a: None
calls = {"keep": kept.append, "note": nothing, "on_exhausted": nothing, "on_alone": nothing}
fleet = Fleet(runner, "r", made, model="m", salt="s", **calls)
good = {"run": "r", "number": 1, "lines": b"a\\n", "self_lines": b"", "said": {}, "begun": 1}
words = [None, 7, {}, {"run": "r"}, good | {"number": "x"}, good | {"lines": 3}, good | {"said": {"done": {}}},
         good | {"said": {"done": {"not_sent": 0, "turns_not_sent": {}, "repeated": 0, "sent": b"\\xc1"}}}]
refused = 0
for data in words:
    for hear in (fleet.on_frame, fleet.on_ping):
        for name in ("w", "stranger"):
            try:
                hear(SimpleNamespace(node_id=name, data=data))
            except Exception as error:
                refused += 1
before = len(kept), fleet.peers["w"].done, list(fleet.peers)
fleet.on_frame(SimpleNamespace(node_id="stranger", data=good))
fleet.on_frame(SimpleNamespace(node_id="w", data=good))
fleet.on_frame(SimpleNamespace(node_id="w", data=good))
print(json.dumps([refused, before, len(kept), fleet.peers["w"].inbox.repeated]))
"""


def test_what_no_worker_says_changes_nothing_at_the_master(requests):
    done = subprocess.run([sys.executable, "-c", HOSTILE, str(requests)], capture_output=True, text=True, check=False)

    assert done.stdout, done.stderr
    refused, before, kept, repeated = json.loads(done.stdout)
    assert refused > 8
    assert before == [0, None, ["w"]]
    assert (kept, repeated) == (1, 1)
