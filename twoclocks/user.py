"""The Locust user that streams: one closed loop of requests, or all that one process sends in an open loop.

Importing this module imports Locust, which monkey-patches the standard library: nothing that analyses may do so.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gevent
import msgspec
from gevent.event import Event
from greenlet import GreenletExit
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from twoclocks.client import FIRST, Attempt, Connection, Origin, send
from twoclocks.endpoint import Endpoint
from twoclocks.errors import plain
from twoclocks.experiment import Experiment
from twoclocks.masks import redact
from twoclocks.prefix_plan import Sent
from twoclocks.reader import connect
from twoclocks.record import LEFT, STOPPED, Record, encode_record, token_span_s
from twoclocks.retries import pause_s
from twoclocks.workload import Plan, repeated

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # a user's pause after a failure, doubled each time, so that it cannot spin


def _set_event() -> Event:
    event = Event()
    event.set()
    return event


class Sender(msgspec.Struct):
    """What users of this process share while a run lasts."""

    experiment: Experiment
    endpoint: Endpoint
    zero_ns: int
    worker: int
    plans: Iterator[Plan]
    sink: Callable[[bytes], None]
    numbers: Iterator[int]  # of users
    on_exhausted: Callable[[], None]  # all that this process was to send has been sent, and has ended
    count_tokens: Callable[[str], int] | None = None
    window_ns: int = 0  # when the measuring window begins
    arrivals: Iterator[float] | None = None  # of an open loop by the clock: seconds since then
    left: int | None = None  # requests that may still be sent; None: no limit; -1: none, and that was told
    in_flight: int = 0  # asks; of them `waiting` are between two attempts, with no request on its way
    waiting: int = 0
    not_sent: int = 0  # requests that were due while load.max_in_flight others were under way
    turns_not_sent: dict[str, int] = msgspec.field(default_factory=dict)  # of sessions that were begun: why -> how many
    sent: Sent = msgspec.field(default_factory=Sent)
    loop: gevent.Greenlet | None = None  # the open loop of this process
    over: Any = msgspec.field(default_factory=Event)  # gevent's Event: what is sent from now on is outside the window
    may_send: Any = msgspec.field(default_factory=_set_event)  # an Event; a worker may have to wait

    def now(self) -> float:
        """Seconds on the run's clock."""
        return (time.monotonic_ns() - self.zero_ns) / 1e9

    def origin(self, user: int) -> Origin:
        """Who a request is sent by, and what its record keeps; made for each, as what is known of the clock changes."""
        keep_text = self.experiment.output_text or self.experiment.workload.sessions == "own"
        return Origin(self.zero_ns, self.worker, user, keep_text, self.count_tokens)

    def take(self) -> Plan | None:
        """The next to send, and the count of those under way; None if there is none. It goes to `ask`."""
        self.may_send.wait()
        if self.over.is_set() or (self.left is not None and self.left <= 0):
            return None
        plan = next(self.plans, None)
        if plan is None:
            self.left = 0
            return None
        self._count()
        return plan

    def _count(self) -> None:
        if self.left is not None:
            self.left -= 1
        self.in_flight += 1

    def following(self, plan: Plan, record: Record) -> Plan | None:
        """The next turn of the conversation; None if there is none, or if it ends with a turn that failed."""
        if plan.then is None:
            return None
        if record.status != "ok":
            why = "left" if record.error_kind in LEFT else "stopped" if self.over.is_set() else "failed"
            self.give_up(plan.later, why)
            return None
        return plan.then(record.output_text or "")

    def due_ns(self, before: Record, plan: Plan) -> int:
        """When a turn is due that follows this record, ns of time.monotonic_ns()."""
        return self.zero_ns + round((before.ended_at + plan.wait_s) * 1e9)

    def take_turn(self, plan: Plan, max_in_flight: float = math.inf) -> bool:
        """As `take`, for a turn that is due now; False: it may not be sent, and it and those after it are counted."""
        try:
            self.may_send.wait()
        except GreenletExit:  # Locust ends this user meanwhile
            self.give_up(1 + plan.later, "stopped")
            raise
        if self.over.is_set() or (self.left is not None and self.left <= 0):
            self.give_up(1 + plan.later, "stopped")
            return False
        if self.in_flight >= max_in_flight:
            self.not_sent += 1
            self.give_up(plan.later, "max_in_flight")
            return False
        self._count()
        return True

    def give_up(self, turns: int, why: str) -> None:
        """Count turns of a session that will not be sent."""
        if turns:
            self.turns_not_sent[why] = self.turns_not_sent.get(why, 0) + turns

    def unsent(self) -> dict[str, Any]:
        """What was due, or would have been, and was not sent; run.json holds the sum over all processes."""
        return {"not_sent": self.not_sent, "turns_not_sent": self.turns_not_sent}

    def ask(
        self, environment: Environment, connection: Connection, plan: Plan, user: int, due_ns: int | None
    ) -> Record:
        """Send a plan that was taken, and again as the experiment's `retries` say; the record of the last attempt.

        Each attempt is kept as soon as it has ended. An ask stays in flight while it waits for the next.
        """
        attempt = FIRST
        try:
            while True:
                record = send(connection, plan, self.origin(user), "measure", due_ns, attempt)
                self.count_sent(plan, record)
                self.sink(self.line(record))
                again = False
                try:
                    pause = pause_s(self.experiment.retries, record, random.random())
                    if pause is not None:
                        due_ns = self.zero_ns + round((record.ended_at + pause) * 1e9)
                        again = self._may_come_again(due_ns)
                except GreenletExit:  # Locust ends this user meanwhile
                    self.give_up(plan.later, "stopped")
                    raise
                finally:
                    fire_request(environment, self.experiment, record, again=again)
                if not again:
                    return record
                attempt = Attempt(record.attempt + 1, record.first_attempt_id or record.request_id)
                plan = repeated(plan)
        finally:
            self.in_flight -= 1
            self.look_for_the_end()

    def _may_come_again(self, due_ns: int) -> bool:
        """Wait until then; whether the run still goes on."""
        self.waiting += 1
        try:
            return not self.over.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        finally:
            self.waiting -= 1

    def count_sent(self, plan: Plan, record: Record) -> None:
        """For the share of the prompts that a prefix cache could know."""
        if record.sent_at is not None:
            sessions = self.experiment.workload.sessions
            answer = record.output_text or "" if sessions == "own" and plan.then is not None else None
            self.sent.add(plan.prompt, answer, session=sessions != "none")

    def line(self, record: Record) -> bytes:
        """Its line of requests.jsonl, without an answer's text that was for the history alone, or a key in the text."""
        if record.output_text is not None:
            shown = redact(record.output_text, self.endpoint.secrets) if self.experiment.output_text else None
            record = msgspec.structs.replace(record, output_text=shown)
        return encode_record(record)

    def look_for_the_end(self) -> None:
        """Tell, once, that nothing is left to send and nothing is under way."""
        if self.left == 0 and not self.in_flight and not self.over.is_set():
            self.left = -1
            self.on_exhausted()


def load_now(runner: Any, sender: Sender) -> tuple[int, int, int]:
    """What this process is at: users, requests in flight, requests not sent so far."""
    return runner.user_count, sender.in_flight - sender.waiting, sender.not_sent


class StreamingUser(User):
    """Sends the next prompt when the last answer has ended; in an open loop it sees to all requests of its process."""

    sender: ClassVar[Sender]  # of the run that lasts
    has_sender: ClassVar[Event] = Event()  # a worker that comes late may be told of users before it is told of the run
    connection: Connection | None = None
    turn: Plan | None = None  # the next one of the conversation that this user is in
    due_ns: int | None = None  # and when it is due

    def on_start(self) -> None:
        """Take the number and the connection that this user keeps."""
        self.has_sender.wait()
        self.connection = connect(self.sender.endpoint)
        self.number = next(self.sender.numbers)
        self.pause_s = FIRST_PAUSE_S
        self.sender.may_send.wait()

    def on_stop(self) -> None:
        """Let the server see the end of this user, and count what it leaves unsaid."""
        if self.connection is not None:
            self.connection.close()
        if self.turn is not None:
            self.sender.give_up(1 + self.turn.later, "stopped")

    @classmethod
    def send_for(cls, sender: Sender) -> None:
        """From now on users of this process take their requests from there."""
        cls.sender = sender
        cls.has_sender.set()

    def wait_time(self) -> float:
        """Seconds until the next task: between two turns the rest of the think time, in which Locust may end a user."""
        return 0.0 if self.due_ns is None else max(0.0, (self.due_ns - time.monotonic_ns()) / 1e9)

    @task
    def stream(self) -> None:
        """One request, from intention to record."""
        sender = self.sender
        if sender.arrivals is not None or sender.experiment.load.shape == "batch":
            self._see_to_the_open_loop()
            raise StopUser
        plan, due_ns = self.turn, self.due_ns
        self.turn = self.due_ns = None
        if plan is None:
            plan = sender.take()  # a user that Locust kills between two tasks may still come here, and gets none
        elif not sender.take_turn(plan):
            plan = None
        if plan is None:
            raise StopUser
        assert self.connection is not None
        record = sender.ask(self.environment, self.connection, plan, self.number, due_ns)
        self.turn = sender.following(plan, record)
        if self.turn is not None:
            self.due_ns = sender.due_ns(record, self.turn)
        if record.error_kind == STOPPED:
            raise GreenletExit  # send() turned the kill into a record; the user still has to go
        if record.status == "ok" or record.error_kind in LEFT:
            self.pause_s = FIRST_PAUSE_S
        else:
            gevent.sleep(self.pause_s)
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)

    def _see_to_the_open_loop(self) -> None:
        """The first user of a process does. Its loop outlives it where Locust moves users to other workers: what is due
        here was dealt once, and stays here.
        """
        sender = self.sender
        if sender.loop is not None:
            return
        sender.loop = gevent.spawn(OpenLoop(self.environment, sender, self.number).run)
        try:
            sender.loop.get()
        except GreenletExit:
            if sender.over.is_set():  # at the end of the drain; each request still becomes a record
                sender.loop.kill()
            raise


class OpenLoop:
    """Requests that leave when they are due, each in a greenlet of its own, on connections that they share."""

    def __init__(self, environment: Environment, sender: Sender, user: int) -> None:
        self.environment, self.sender, self.user = environment, sender, user
        self.load = sender.experiment.load
        self.idle: list[Connection] = []
        self.running: set[gevent.Greenlet] = set()

    def run(self) -> None:
        """Until all is sent and has ended, or the run stops and has drained."""
        try:
            if self.sender.arrivals is None:
                self._batches()
            else:
                self._by_the_clock(self.sender.arrivals)
                if self.load.shape == "rate" and self.load.requests == "none":
                    # A window that closed with the last answer would hold more requests than its length makes due.
                    self.sender.over.wait()
            gevent.joinall(list(self.running))
        finally:
            gevent.killall(list(self.running))  # at the end of the drain; each still becomes a record
            for connection in self.idle:
                connection.close()
        if not self.sender.over.is_set():
            self.sender.left = 0
            self.sender.look_for_the_end()

    def _by_the_clock(self, arrivals: Iterator[float]) -> None:
        sender = self.sender
        for at in arrivals:
            due_ns = sender.window_ns + round(at * 1e9)
            wait_ns = due_ns - time.monotonic_ns()
            if wait_ns > 0:
                sender.over.wait(wait_ns / 1e9)
            if sender.over.is_set():
                return
            if sender.in_flight >= self.load.max_in_flight:
                sender.not_sent += 1
                left_out = next(sender.plans, None)  # a trace's later requests keep their own prompts
                sender.give_up(left_out.later if left_out else 0, "max_in_flight")
            elif not self._start(due_ns):
                return

    def _batches(self) -> None:
        sender, left = self.sender, self.load.batches
        while left == "none" or left > 0:
            due_ns = max(sender.window_ns, time.monotonic_ns())
            sender.over.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            for _ in range(self.load.batch):
                if not self._start(due_ns):
                    return
            gevent.joinall(list(self.running))
            left = left if left == "none" else left - 1
            if left:
                sender.over.wait(self.load.batch_pause_s)

    def _start(self, due_ns: int) -> bool:
        plan = self.sender.take()
        if plan is None:
            return False
        greenlet = gevent.spawn(self._one, plan, due_ns)
        self.running.add(greenlet)
        greenlet.rawlink(self.running.discard)
        return True

    def _one(self, plan: Plan, due_ns: int) -> None:
        """A request, and the later turns of the conversation that it begins."""
        sender = self.sender
        while True:
            connection = self.idle.pop() if self.idle else connect(sender.endpoint)
            record = sender.ask(self.environment, connection, plan, self.user, due_ns)
            self.idle.append(connection)
            turn = sender.following(plan, record)
            if turn is None:
                return
            plan, due_ns = turn, sender.due_ns(record, turn)
            sender.over.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            if not sender.take_turn(plan, self.load.max_in_flight):
                return


def fire_request(environment: Environment, experiment: Experiment, record: Record, *, again: bool) -> None:
    """One event of Locust's own statistics: time from send to the last token, in ms, and the tokens as length.

    Requests that their user left, and attempts after which another was made, stand in rows of their own, and are no
    failures.
    """
    message = plain(record.error_message or "")[:120]
    left = record.error_kind in LEFT
    where = " in mid-stream" if record.status == "truncated" else ""
    failed = None if record.status == "ok" or left or again else RuntimeError(f"{record.error_kind}{where}: {message}")
    environment.events.request.fire(
        request_type="POST",
        name=f"{record.target} {experiment.target.api}" + (f", {record.error_kind}" if left else ", retried" * again),
        response_time=duration_s(record) * 1000,
        response_length=record.output_tokens or 0,
        exception=failed,
        context={},
    )


def duration_s(record: Record) -> float:
    """E2E (last token chunk - sent_at) of a request with tokens; of any other the time until it was given up."""
    span = token_span_s(record.chunk_us, record.chunk_kinds)
    if span is not None:
        return span[1]
    return record.ended_at - (record.intended_at if record.sent_at is None else record.sent_at)
