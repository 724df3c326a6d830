"""The Locust user that streams: one user is one closed loop of requests.

Importing this module imports Locust, which monkey-patches the standard library: nothing that analyses may do so.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import gevent
import msgspec
from greenlet import GreenletExit
from locust import User, constant, task
from locust.env import Environment
from locust.exception import StopUser

from twoclocks.client import Origin, send
from twoclocks.endpoint import Endpoint
from twoclocks.errors import plain
from twoclocks.experiment import Experiment
from twoclocks.reader import connect
from twoclocks.record import TOKEN_KINDS, Record, encode_record, expand
from twoclocks.workload import Plan

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # a user's pause after a failure, doubled each time, so that it cannot spin


class Sender(msgspec.Struct):
    """What users of this process share while a run lasts."""

    experiment: Experiment
    endpoint: Endpoint
    zero_ns: int
    worker: int
    plans: Iterator[Plan]
    sink: Callable[[bytes], None]
    numbers: Iterator[int]  # of users
    count_tokens: Callable[[str], int] | None = None
    stopping: bool = False

    def origin(self, user: int) -> Origin:
        """Who a request is sent by, and what its record keeps."""
        return Origin(self.zero_ns, self.worker, user, self.experiment.output_text, self.count_tokens)


class StreamingUser(User):
    """Sends the next prompt when the last answer has ended."""

    wait_time = constant(0)
    sender: ClassVar[Sender]  # of the run that lasts

    def on_start(self) -> None:
        """Take the number and the connection that this user keeps."""
        self.connection = connect(self.sender.endpoint)
        self.origin = self.sender.origin(next(self.sender.numbers))
        self.pause_s = FIRST_PAUSE_S

    def on_stop(self) -> None:
        """Let the server see the end of this user."""
        self.connection.close()

    @task
    def stream(self) -> None:
        """One request, from intention to record."""
        sender = self.sender
        if sender.stopping:  # a user that Locust kills between two tasks may still come here, and must not send
            raise StopUser
        record = send(self.connection, next(sender.plans), self.origin, "measure")
        sender.sink(encode_record(record))
        fire_request(self.environment, sender.experiment, record)
        if record.status == "cancelled":
            raise GreenletExit  # send() turned the kill into a record; the user still has to go
        if record.status == "ok":
            self.pause_s = FIRST_PAUSE_S
        else:
            gevent.sleep(self.pause_s)
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)


def fire_request(environment: Environment, experiment: Experiment, record: Record) -> None:
    """One event of Locust's own statistics: time from send to the last token, in ms, and the tokens as length."""
    message = plain(record.error_message or "")[:120]
    failed = None if record.status == "ok" else RuntimeError(f"{record.error_kind}: {message}")
    environment.events.request.fire(
        request_type="POST",
        name=f"{record.target} {experiment.target.api}",
        response_time=duration_s(record) * 1000,
        response_length=record.output_tokens or 0,
        exception=failed,
        context={},
    )


def duration_s(record: Record) -> float:
    """E2E (last token chunk - sent_at) of a request with tokens; of any other the time until it was given up."""
    tokens = [index for index, kind in enumerate(expand(record.chunk_kinds)) if kind in TOKEN_KINDS]
    if tokens:
        return sum(record.chunk_us[: tokens[-1] + 1]) / 1e6
    return record.ended_at - (record.intended_at if record.sent_at is None else record.sent_at)
