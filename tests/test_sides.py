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

def begun(given):
    one = side_of_worker()
    one.on_run(given)
    one.on_pong(message(sent_ns=worker.time.monotonic_ns(), told_ns=worker.time.monotonic_ns()))
    one.on_window(message(zero_ns=5, window_ns=7))
    return one

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


def test_no_fleet_is_left_of_a_run_that_was_ended_while_it_began(side):
    """The web UI's Stop ends who begins a run, without a word to us; a fleet that stays would note in the next run."""
    told = side("""
environment = SimpleNamespace(events=Events(), process_exit_code=None)
runner = SimpleNamespace(update_state=lambda state: None)
one = master.MasterSide(environment, runner, Namespace(headless=False), None, experiment(), experiment())
def begin():
    one.fleet = fleet_of("a")
    gevent.sleep(60)
one._begin = begin
beginning = gevent.spawn(one.begin)
gevent.sleep(0.01)
watching = one.fleet.watching
beginning.kill()
told["left"] = one.fleet is None, watching.dead
""")

    assert told["left"] == [True, True]


def test_steps_have_the_users_that_the_experiment_says(side):
    """Locust would begin with the number in the form of the web UI, and the report name that of the first step."""
    told = side("""
made = experiment(shape="steps", steps=[(1, 60), (2, 60)])
environment = SimpleNamespace(events=Events(), process_exit_code=None)
one = master.MasterSide(environment, SimpleNamespace(), Namespace(headless=False), None, made, made)
def why(users):
    try:
        one.may_begin(users)
    except TwoclocksError as error:
        return str(error)
told["before"] = why("7"), why("1")
one.folder = SimpleNamespace(meta={"window": {"started_at": 1.0, "ended_at": None}})
told["later"] = why("1")
""")

    assert told["before"] == ["load.shape is steps: enter the users of the first of load.steps, 1", None]
    assert told["later"] == "load.shape is steps: load.steps says how many users there are, and when"


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


def test_a_worker_stays_while_it_has_what_the_master_has_not(side):
    """Longer than Locust would, but not for ever; without further requests."""
    told = side("""
idle = side_of_worker()
told["idle"] = idle._stay(), idle.runner.last_heartbeat_timestamp
one = begun(order(experiment(drain_s=30)))
gevent.killall(one.helpers)
def stays(quiet_s):
    one.runner.last_heartbeat_timestamp = 1.0
    one.heard = worker.time.monotonic() - quiet_s
    one._stay()
    return one.runner.last_heartbeat_timestamp > 1.0, one.sender.may_send.is_set()
told["empty"] = stays(50)
one._keep(b"x\\n")
told["full"] = stays(50), stays(70), stays(620), stays(640)
one.on_ack(message(number=0))
told["heard"] = one.sender.may_send.is_set(), one.held_s > 0
one.outbox.acknowledge(9, 0.0)
one.sender.over.set()
told["drains"] = one.outbox.is_empty, stays(70)
one.is_done = True
told["done"] = stays(70)
""")

    assert told["idle"] == [None, 1.0]
    assert told["empty"] == [False, True]
    assert told["full"] == [[True, True], [True, False], [True, False], [False, False]]
    assert told["heard"] == [True, True]
    assert told["drains"] == [True, [True, True]]
    assert told["done"] == [False, True]


def test_a_worker_with_nothing_to_send_says_so(side):
    """An empty share of load.requests, and an open loop that was dealt before it came."""
    told = side("""
for name, load, late in (("empty", {"requests": 1}, False), ("late", {"shape": "rate", "rate": 1.0}, True),
                         ("some", {"requests": 2}, False)):
    given = order(experiment(**load), late=late)
    given.data |= {"share": 1, "shares": 2}
    one = begun(given)
    told[name] = one.outbox._said
""")

    assert told == {"empty": {"exhausted": True}, "late": {"exhausted": True}, "some": {}}


def test_all_is_sent_only_if_those_who_are_gone_had_sent_theirs(side):
    told = side("""
def run(silent_said):
    one = fleet_of("a", "b", requests=10)
    for name in ("a", "b"):
        ping(one, name)
    one.open_window(0, 0)
    if silent_said:
        frame(one, "b", said={"exhausted": True})
    one.peers["b"].silences.append((0.0, None))
    ended.clear()
    frame(one, "a", said={"exhausted": True})
    with gevent.Timeout(20):
        while not ended:
            gevent.sleep(0.05)
    one.watching.kill()
    return list(ended)
told["sent"], told["unsent"] = run(True), run(False)
told["notes"] = notes
""")

    assert told["sent"] == ["exhausted"]
    assert told["unsent"] == ["alone"]
    assert told["notes"] == ["only workers that are gone had more to send; the run ends"]


def test_who_comes_when_a_number_of_requests_is_dealt_is_sent_away(side):
    told = side("""
one = fleet_of("a", requests=10)
sent.clear()
one.welcome("late")
told["late"] = sent, list(one.peers), notes
""")

    message = "a worker (late) came late and was sent away: load.requests had been dealt to others"
    assert told["late"] == [[["quit", "late"]], ["a"], [message]]


def test_a_later_turn_waits_as_a_first_one_does(side):
    told = side("""
one = begun(order(experiment()))
plan = one.sender.take()
one._hold("test")
told["held"] = one.sender.may_send.is_set()
waits, killed = gevent.spawn(one.sender.take_turn, plan), gevent.spawn(one.sender.take_turn, plan)
gevent.sleep(0.01)
told["waits"] = not waits.ready()
killed.kill()
one.stopping()
told["taken"] = waits.get(timeout=20), one.sender.turns_not_sent
one._hold("test")
told["after"] = one.sender.may_send.is_set()
""")

    assert told == {"held": False, "waits": True, "taken": [False, {"stopped": 2}], "after": True}
