"""A worker's side of a run: what it is told to send, its clock beside the master's, and its records' way there."""

import itertools
import logging
import os
import socket
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust.env import Environment
from locust.exception import RPCError

from twoclocks.endpoint import make_endpoint, token_counter
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment, load_experiment, replace
from twoclocks.frames import HELD_BYTES, Outbox
from twoclocks.offset import KEPT, Exchange, Offset, estimate, same_clock
from twoclocks.orders import Order, ordered
from twoclocks.prompts import Prompt
from twoclocks.reader import reader_name
from twoclocks.run_folder import this_clock
from twoclocks.selfwatch import watch
from twoclocks.shapes import dealt, in_window, is_open
from twoclocks.user import Sender, StreamingUser, load_now
from twoclocks.workload import load_workload, plans

FLUSH_S = 0.5  # a killed worker loses at most this much of its finished requests
BURST, BURST_S = 16, 0.025  # exchanges before the first request, and the time between two of them
ASK_S = 0.5  # between two exchanges from then on
QUIET_S = 60.0
"""Locust's worker quits when its master has said nothing for so long. Ours sends no further requests, and stays for as
long as it has something that the master has not, or streams still end: as long as ..."""
PATIENCE_S = 600.0  # at most, beyond load.drain_s
LAST_WORDS_S = 3.0  # for the master's word that it has the last lines, when this process is told to end
USERS_OF_LATE = 1_000_000  # numbers between the first users of late workers, so that no user's number comes twice

log = logging.getLogger("twoclocks")


class WorkerSide:
    """Takes part in the master's runs, one after the other."""

    def __init__(self, environment: Environment, runner: Any) -> None:
        self.environment, self.runner = environment, runner
        self.own = Namespace(**vars(environment.parsed_options))  # the master's take their place when users are spawned
        self.order: Order | None = None
        self.sender: Sender | None = None
        self.outbox = Outbox("")
        self.exchanges: deque[Exchange] = deque(maxlen=KEPT)
        self.exchanged = 0
        self.offset: Offset | None = None
        self.worst_s = 0.0  # the largest error of the offset so far
        self.shares_clock = False
        self.window: tuple[int, int] | None = None  # zero and begin of the window, ns of the master's clock
        self.refusal: str | None = None
        self.is_ending = self.is_done = False
        self.full_since: float | None = None
        self.held_s = 0.0  # how long requests were held back, since the master did not take the records
        self.heard = time.monotonic()  # the master, last
        self.helpers: list[gevent.Greenlet] = []
        for name in ("run", "window", "pong", "ack", "stop"):  # of the two that last others are heard meanwhile
            is_long = name in ("run", "stop")
            runner.register_message(f"twoclocks_{name}", getattr(self, f"on_{name}"), concurrent=is_long)
        environment.events.heartbeat_received.add_listener(lambda **_: self._hear())
        environment.events.test_stopping.add_listener(lambda **_: self.stopping())
        environment.events.test_stop.add_listener(lambda **_: self.done())
        environment.events.quitting.add_listener(lambda **_: self.leave())
        gevent.spawn(self._flush_for_ever)
        # Locust itself has greeted the master before we could listen
        runner.send_message("twoclocks_hello")

    # before the window

    def on_run(self, msg: Any, **_: Any) -> None:
        """The master begins a run: read what it takes, and ask for the time. Users wait until the window is known."""
        order = msgspec.convert(msg.data, Order)
        if self.order is not None and order.run == self.order.run:
            return  # it was told twice
        gevent.killall(self.helpers)
        self.order = order
        self.sender, self.window, self.offset, self.refusal = None, None, None, None
        self.is_ending = self.is_done = False
        self.full_since, self.held_s, self.worst_s, self.exchanged = None, 0.0, 0.0, 0
        self.outbox = Outbox(order.run)
        self.exchanges.clear()
        self.shares_clock = order.clock == this_clock()
        StreamingUser.has_sender.clear()
        # in a thread, since Locust's master gives a worker up that says nothing for 3 s
        read = gevent.get_hub().threadpool.apply(self._read, (order,))
        if self.order is not order:
            return  # another run began meanwhile
        try:
            if isinstance(read, TwoclocksError):
                raise read
            self.sender = self._sender(order, *read)
            StreamingUser.send_for(self.sender)
        except TwoclocksError as error:
            self.refusal = str(error)
            sys.stderr.write(f"twoclocks: this worker cannot take part: {error}\n")
        self.helpers = [gevent.spawn(self._ask_for_ever)]

    def _read(self, order: Order) -> tuple[Experiment, list[Prompt], Callable[[str], int] | None] | TwoclocksError:
        """What takes time for large files. An error is returned: gevent would print one that a thread raises."""
        try:
            experiment = ordered(order, self._own_experiment)
            prompts = in_window(load_workload(experiment), experiment.load)
            return experiment, prompts, token_counter(experiment.target.tokenizer)
        except TwoclocksError as error:
            return error

    def _own_experiment(self) -> Experiment:
        own = self.own
        made = load_experiment(Path(own.experiment), own.overrides, target=own.target, variant=own.variant)
        return replace(made, "target.url", own.host) if own.host else made

    def _sender(
        self, order: Order, experiment: Experiment, prompts: list[Prompt], counter: Callable[[str], int] | None
    ) -> Sender:
        share, shares = order.share, order.shares
        deal = dealt(experiment.load, prompts, share, shares)
        if order.late and is_open(experiment.load):
            deal["arrivals"], deal["left"] = None, 0  # all that is due was dealt before it came
        sender = Sender(
            experiment=experiment,
            endpoint=make_endpoint(experiment.target, experiment.timeouts),
            zero_ns=0,
            worker=share,
            plans=plans(experiment, prompts, order.model, share=share, shares=shares, salt=order.salt),
            sink=self._keep,
            count_tokens=counter,
            numbers=itertools.count(share * USERS_OF_LATE) if order.late else itertools.count(share, shares),
            on_exhausted=self._exhausted,
            **deal,
        )
        sender.may_send.clear()
        return sender

    def on_window(self, msg: Any, **_: Any) -> None:
        """When the run and its window begin: from now on users may send."""
        if not self._is_of_run(msg) or self.sender is None or self.window is not None:
            return
        self.window = msg.data["zero_ns"], msg.data["window_ns"]
        self._set_clock()
        sender = self.sender
        sender.may_send.set()
        sender.look_for_the_end()  # its share may be empty
        reader, load = reader_name(sender.endpoint), partial(load_now, self.runner, sender)
        write = self.outbox.put_self
        self.helpers.append(gevent.spawn(watch, sender.now, sender.worker, os.getpid(), reader, write, load))

    # the clock

    def _ask_for_ever(self) -> None:
        """Ask the master for the time, quickly at first, then for as long as the run lasts, and say what we are at."""
        asked = 0
        while not (self.is_done and self.outbox.is_empty):
            self._ask()
            asked += 1
            gevent.sleep(BURST_S if asked <= BURST else ASK_S)

    def _ask(self) -> None:
        ready, told = self.exchanged >= BURST and self.refusal is None, self.window is not None
        who = {"host": socket.gethostname(), "pid": os.getpid(), "refusal": self.refusal}
        now = {"ready": ready, "has_window": told, "state": self._state()}
        self._send("ping", {"sent_ns": time.monotonic_ns(), **who, **now})

    def on_pong(self, msg: Any, **_: Any) -> None:
        """The master's answer."""
        back_ns = time.monotonic_ns()
        if not self._is_of_run(msg):
            return
        one = Exchange(msg.data["sent_ns"] / 1e9, msg.data["told_ns"] / 1e9, back_ns / 1e9)
        self.exchanges.append(one)
        self.exchanged += 1
        self.shares_clock &= same_clock([one])
        self._set_clock()

    def _set_clock(self) -> None:
        """Times of what is sent from now on are the master's, as well as they are known."""
        self.offset = estimate(self.exchanges, time.monotonic_ns() / 1e9)
        if self.window is not None and self.sender is not None:
            self.worst_s = max(self.worst_s, self.offset.error_s)
            ahead_ns = 0 if self.shares_clock else round(self.offset.offset_s * 1e9)
            self.sender.zero_ns, self.sender.window_ns = (moment - ahead_ns for moment in self.window)

    @property
    def _begun(self) -> int:
        return self.outbox.lines + (self.sender.in_flight - self.sender.waiting if self.sender is not None else 0)

    def _state(self) -> dict[str, Any]:
        """What the master should know of this worker, should it be the last that it hears."""
        held_s = self.held_s + (time.monotonic() - self.full_since if self.full_since is not None else 0.0)
        told: dict[str, Any] = {"begun": self._begun, "held_s": round(held_s, 3)}
        if self.offset is not None:
            told["clock"] = {
                "shared": self.shares_clock,
                "offset_s": 0.0 if self.shares_clock else self.offset.offset_s,
                "error_s": 0.0 if self.shares_clock else self.worst_s,
                "drift": 0.0 if self.shares_clock else self.offset.drift,
                "round_trip_s": self.offset.round_trip_s,
                "exchanges": self.exchanged,
            }
        return told

    # records

    def _keep(self, line: bytes) -> None:
        """A finished record. Where the master takes none for long, no further requests may leave."""
        self.outbox.put(line)
        if self.outbox.held_bytes > HELD_BYTES:
            self._hold(f"the master has not taken {self.outbox.held_bytes // 1_000_000} MB of records")

    def _hold(self, why: str) -> None:
        """No further requests until the master takes records."""
        if self.full_since is None and self.sender is not None and not self.sender.over.is_set():
            self.full_since = time.monotonic()
            self.sender.may_send.clear()
            log.warning("%s; requests are held back until it does", why)

    def on_ack(self, msg: Any, **_: Any) -> None:
        """The master has all frames up to a number."""
        if not self._is_of_run(msg):
            return
        self.outbox.acknowledge(msg.data["number"], time.monotonic())
        if self.full_since is not None and self.outbox.held_bytes < HELD_BYTES / 2 and self.sender is not None:
            self.held_s += time.monotonic() - self.full_since
            self.full_since = None
            self.sender.may_send.set()
        self._flush()

    def _flush_for_ever(self) -> None:
        while True:
            gevent.sleep(FLUSH_S)
            self._flush()
            self._stay()

    def _hear(self) -> None:
        self.heard = time.monotonic()

    def _stay(self) -> None:
        """Locust's own patience with a master that says nothing would throw away what is left here.

        While it handles a stop, for as long as the drain lasts, it hears nothing at all.
        """
        if self.sender is None or self.window is None:
            return
        is_draining = self.sender.over.is_set() and not self.is_done
        quiet_s = time.monotonic() - self.heard
        if quiet_s < PATIENCE_S + self.sender.experiment.load.drain_s and (is_draining or not self.outbox.is_empty):
            self.runner.last_heartbeat_timestamp = time.time()
        if quiet_s > QUIET_S:
            self._hold(f"the master has said nothing for {quiet_s:.0f} s and taken no records")

    def _flush(self) -> None:
        for frame in self.outbox.due(time.monotonic()):
            if not self._send("frame", msgspec.structs.asdict(frame) | {"begun": self._begun}):
                return  # it counts as under way, and will go again

    def _send(self, what: str, data: dict[str, Any]) -> bool:
        """To the master; False if the connection took nothing."""
        try:
            self.runner.send_message(f"twoclocks_{what}", {"run": self.outbox.run} | data)
        except RPCError:
            return False
        return True

    def _is_of_run(self, msg: Any) -> bool:
        return self.order is not None and bool(msg.data["run"] == self.order.run)

    # end

    def _exhausted(self) -> None:
        self.outbox.say(exhausted=True)

    def on_stop(self, msg: Any, **_: Any) -> None:
        """The master ends the run and waits for our last lines."""
        if self._is_of_run(msg) and not self.is_ending:
            self.runner.stop()
            self.done()

    def stopping(self) -> None:
        """What is sent from now on is outside the window."""
        if self.sender is None:  # users still wait for it: there is nothing to drain
            self.environment.stop_timeout = 0
        else:
            self.sender.over.set()
            self.sender.may_send.set()  # who waits for it sees that it is over

    def done(self) -> None:
        """All users have ended: send what is left, and how much it was in all."""
        sender = self.sender
        if sender is None or self.is_ending:
            return
        self.is_ending = True
        if sender.loop is not None:  # its user may have been taken away, as Locust shared users out anew
            sender.loop.join(sender.experiment.load.drain_s)
            sender.loop.kill()
        self.is_done = True
        gevent.killall(self.helpers[1:])  # who asks for the time goes on: the master is to hear of us while it waits
        self._ask()  # so that the master's last word of our clock and state is the last one
        sent = msgspec.msgpack.encode(sender.sent)
        self.outbox.say(done=sender.unsent() | {"sent": sent, "repeated": self.outbox.repeated})
        self._flush()
        # All users have ended: after its stop message Locust would be deaf, and unknown to the master, for so long.
        self.runner.environment.stop_timeout = 0

    def leave(self) -> None:
        """This process is told to end: let what streams come to its end, and the master have it."""
        if self.sender is None or self.window is None:
            return
        if not self.is_ending:
            self.runner.stop()
            self.done()
        if not len(self.runner.greenlet):  # Locust has ended who listens
            gevent.spawn(self.runner.worker)
        deadline = time.monotonic() + LAST_WORDS_S
        while not self.outbox.is_empty and time.monotonic() < deadline:
            gevent.sleep(0.02)
