"""Master's and worker's side without a network: each with a runner that only notes what it is told to say.

They run in processes of their own, since importing Locust patches the standard library.
"""

import json
import subprocess
import sys

import pytest

COMMON = """
import json, os, sys
from argparse import Namespace
from types import SimpleNamespace
import gevent, msgspec
from locust.event import Events
from twoclocks import __version__, fleet, master, worker
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment, Load, Target, Workload
from twoclocks.orders import Order, digest, shipped
from twoclocks.run_folder import this_clock

told, sent, notes, kept, ended = {}, [], [], [], []

def experiment(**load):
    return Experiment(workload=Workload(requests=sys.argv[1]), load=Load(**load))

def message(**data):
    return SimpleNamespace(node_id="a", data={"run": "r"} | data)

def side_of_worker():
    runner = SimpleNamespace(
        register_message=lambda *a, **k: None, stop=lambda: None, user_count=0, last_heartbeat_timestamp=1.0,
        send_message=lambda name, data=None: sent.append((name, data)), greenlet=[1],
    )
    runner.environment = SimpleNamespace(parsed_options=Namespace(), events=Events(), stop_timeout=9)
    return worker.WorkerSide(runner.environment, runner)

def order(made, late=False, shares=1, run="r"):
    given = Order(run=run, version=__version__, clock=this_clock(), experiment=shipped(made), has_key=False,
                  digest=digest(made), model="m", salt="s", share=0, shares=shares, late=late)
    return SimpleNamespace(data=msgspec.structs.asdict(given))

def fleet_of(*names, keep=kept.append, **load):
    clients = [SimpleNamespace(id=name, state="ready") for name in names]
    runner = SimpleNamespace(
        clients=SimpleNamespace(all=clients), state="running", target_user_count=1, spawn_rate=1,
        send_message=lambda name, data, to: sent.append((name, to)), start=lambda *a: None,
    )
    return fleet.Fleet(
        runner, "r", experiment(**load), model="m", salt="s", keep=keep, note=notes.append,
        on_exhausted=lambda: ended.append("exhausted"), on_alone=lambda: ended.append("alone"),
    )

def ping(who, name, refusal=None, ready=True):
    who.on_ping(SimpleNamespace(node_id=name, data={
        "run": "r", "sent_ns": 1, "host": "h", "pid": 1, "refusal": refusal, "ready": ready, "has_window": True,
        "state": {},
    }))

def frame(who, name, number=1, said={}, lines=b""):
    who.on_frame(SimpleNamespace(node_id=name, data={
        "run": "r", "number": number, "lines": lines, "self_lines": b"", "said": said, "begun": 0,
    }))

DONE = {"done": {"not_sent": 0, "turns_not_sent": {}, "repeated": 0, "sent": msgspec.msgpack.encode(fleet.Sent())}}
"""


@pytest.fixture
def side(tmp_path):
    """Runs a script after COMMON; what it leaves in ``told``."""
    requests = tmp_path / "prompts.jsonl"
    requests.write_text('{"id": "a", "prompt": "x"}\n')

    def run(script):
        words = [sys.executable, "-c", f"{COMMON}\n{script}\nprint(json.dumps(told))", str(requests)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_worker_that_reads_hears_and_speaks_meanwhile(side):
    """The reading waits, as a thread does, for a word that only the event loop's next turn can say."""
    told = side("""
ours, theirs = os.pipe()
def slow(made):
    os.read(ours, 1)
    return worker_load(made)
worker_load, worker.load_workload = worker.load_workload, slow
gevent.spawn_later(0.05, os.write, theirs, b"x")
one = side_of_worker()
one.on_run(order(experiment()))
told["is_ready"] = one.sender is not None and one.refusal is None

first = gevent.spawn(one.on_run, order(experiment(), run="first"))
gevent.sleep(0.01)
second = gevent.spawn(one.on_run, order(experiment(), run="second"))
os.write(theirs, b"xx")
gevent.joinall([first, second], raise_error=True)
told["run"] = one.outbox.run, one.sender is not None, len(one.helpers)
""")

    assert told["is_ready"]
    assert told["run"] == ["second", True, 1]


def test_a_stop_before_the_run_folder_ends_the_beginning(side):
    told = side("""
state = []
runner = SimpleNamespace(update_state=state.append, quit=lambda: state.append("quit"))
environment = SimpleNamespace(events=Events(), process_exit_code=None)
one = master.MasterSide(environment, runner, Namespace(headless=True), None, experiment(), experiment())
one._begin = lambda: gevent.sleep(60)
beginning = gevent.spawn(one.begin)
gevent.sleep(0.01)
one.stopping()
told["dead"] = beginning.dead
gevent.sleep(0.01)
told["left"] = one.beginning is None, one.refused, environment.process_exit_code, state
""")

    assert told["dead"]
    assert told["left"] == [True, "the run was stopped before it began", 2, ["spawning", "stopped", "quit"]]


@pytest.mark.parametrize("how", ["clients.all.pop()", "clients.all[-1].state = 'missing'"])
def test_a_worker_that_goes_before_it_is_ready_is_not_waited_for(side, how):
    told = side(f"""
two = fleet_of("a", "b")
ping(two, "a")
gevent.spawn_later(0.05, lambda: exec({"two.runner." + how!r}))
try:
    with gevent.Timeout(20):
        two.await_ready()
except TwoclocksError as error:
    told["why"] = str(error)
""")

    assert told["why"] == "worker 1 (b) was gone before the run began; look at its output"


def test_who_came_late_and_did_not_get_ready_is_not_missing(side):
    told = side("""
one = fleet_of("a")
ping(one, "a")
one.welcome("refused")
ping(one, "refused", refusal="no")
one.welcome("kept")
one.welcome("reads")
told["shares"] = [peer.share for peer in one.peers.values()]
ping(one, "kept")
for name in ("a", "kept"):
    frame(one, name, said=DONE)
with gevent.Timeout(20):
    one.await_done(60)
told["missing"] = [peer.client_id for peer in one.missing]
told["rows"] = [row["worker"] for row in one.told(0, (0.0, 1.0), [])]
""")

    assert told == {"shares": [0, 2, 3], "missing": [], "rows": [0, 2]}


def test_a_frame_that_could_not_be_kept_is_taken_when_it_comes_again(side):
    told = side("""
def broken(frame):
    raise AssertionError("no folder yet")
one = fleet_of("a", keep=broken)
for keep in (broken, kept.append):
    one.keep = keep
    try:
        frame(one, "a", said=DONE, lines=b"x\\n")
    except AssertionError:
        told["before"] = one.peers["a"].inbox.number
told["after"] = one.peers["a"].inbox.number, len(kept), one.peers["a"].done is not None
""")

    assert told == {"before": 0, "after": [1, 1, True]}
