"""The fleet: the master's side of its workers, on this machine and on others, for one run.

Who takes part, whether each is ready, what has come of each, since when one is silent, and how far its clock is off.
Speaks Locust's messages; knows nothing of run folders.

    worker -> master   twoclocks_hello, _ping, _frame
    master -> worker   twoclocks_run (an Order), _window, _pong, _ack, _stop
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gevent
import msgspec
from locust.runners import STATE_MISSING, STATE_RUNNING

from twoclocks import __version__
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment
from twoclocks.frames import Frame, Inbox
from twoclocks.orders import Order, digest, has_key, shipped
from twoclocks.prefix_plan import Sent
from twoclocks.run_folder import this_clock
from twoclocks.shapes import due_within, is_open

READY_S = 120.0  # for reading large request files
SILENT_S = 4.0
"""Without a word for so long, a worker counts as silent: it speaks twice a second. Locust gives it up at about the same
time, and may itself keep the master from listening for 2 s when a worker comes."""
LOOK_S = 0.5
ASK_AGAIN_S = 2.0

log = logging.getLogger("twoclocks")


class Clock(msgspec.Struct, frozen=True):
    """What a worker says of its clock beside the master's; see offset.Offset."""

    shared: bool
    offset_s: float
    error_s: float
    drift: float
    round_trip_s: float
    exchanges: int


class State(msgspec.Struct, frozen=True):
    """What a worker says of itself while the run goes on."""

    begun: int = 0  # requests
    held_s: float = 0.0  # how long it held requests back
    clock: Clock | None = None


class Done(msgspec.Struct, frozen=True):
    """What a worker says when all of its users have ended."""

    not_sent: int  # see user.Sender.unsent
    turns_not_sent: dict[str, int]
    sent: bytes  # a prefix_plan.Sent as msgpack
    repeated: int  # frames that it sent again


class Ping(msgspec.Struct, frozen=True):
    """A worker asks for the time."""

    sent_ns: int
    host: str
    pid: int
    refusal: str | None
    ready: bool
    has_window: bool
    state: State


class Peer:
    """What the master knows of one worker."""

    def __init__(self, client_id: str, share: int, shares: int, *, late: bool) -> None:
        self.client_id, self.share, self.shares, self.late = client_id, share, shares, late
        self.host: str | None = None
        self.pid: int | None = None
        self.is_ready = self.is_exhausted = False
        self.refusal: str | None = None
        self.inbox = Inbox()
        self.begun = 0  # requests, when it was heard last
        self.heard = time.monotonic()
        self.ready_at: float | None = None  # time.monotonic(), like the next two
        self.done_at: float | None = None
        self.silences: list[tuple[float, float | None]] = []  # from the last word to the next
        self.state = State()  # what it said last of itself
        self.done: Done | None = None
        self.sent = Sent()  # prompts, once it is done

    @property
    def is_silent(self) -> bool:
        """Is it awaited, and nothing has come?"""
        return bool(self.silences) and self.silences[-1][1] is None

    @property
    def name(self) -> str:
        """How messages call it."""
        where = f" ({self.host}, process {self.pid})" if self.host else f" ({self.client_id})"
        return f"worker {self.share}{where}"

    @property
    def lost(self) -> int:
        """Records that it is known to owe: of requests that it had begun when it was heard last."""
        return max(0, self.begun - self.inbox.lines)


class Fleet:
    """The workers of one run. Raises ExperimentError if a request file cannot be read."""

    def __init__(
        self,
        runner: Any,
        run: str,
        experiment: Experiment,
        *,
        model: str,
        salt: str,
        keep: Callable[[Frame], None],
        note: Callable[[str], None],
        on_exhausted: Callable[[], None],
        on_alone: Callable[[], Any],
    ) -> None:
        self.runner, self.run, self.experiment = runner, run, experiment
        self.keep, self.note, self.on_exhausted, self.on_alone = keep, note, on_exhausted, on_alone
        self.common: dict[str, Any] = {
            "run": run,
            "version": __version__,
            "clock": this_clock(),
            "experiment": shipped(experiment),
            "has_key": has_key(experiment),
            "digest": digest(experiment),
            "model": model,
            "salt": salt,
        }
        self.peers: dict[str, Peer] = {}
        self.numbers = itertools.count()  # of shares; that of a worker which was refused is not used again
        self.window: dict[str, Any] | None = None  # what workers are told of it, once it is known
        self.is_ending = False
        self.was_alone = False  # had all workers gone before the end?
        present = [client.id for client in runner.clients.all if client.state != STATE_MISSING]
        for client_id in present:
            self._order(Peer(client_id, next(self.numbers), len(present), late=False))
        self.watching = gevent.spawn(self._watch)

    # before the window

    def welcome(self, client_id: str) -> None:
        """A worker that listens from now on. Who comes once the shares are dealt has one beside them."""
        if (peer := self.peers.get(client_id)) is None:
            if self.experiment.load.requests != "none":
                self.note(f"a worker ({client_id}) came late and was sent away: load.requests had been dealt to others")
                self.runner.send_message("quit", None, client_id)
                return
            number = next(self.numbers)
            peer = Peer(client_id, number, number + 1, late=True)
            peer.is_exhausted = is_open(self.experiment.load)  # nothing was dealt to it
        self._order(peer)

    def _order(self, peer: Peer) -> None:
        self.peers[peer.client_id] = peer
        order = Order(**self.common, share=peer.share, shares=peer.shares, late=peer.late)
        self._send(peer, "run", msgspec.structs.asdict(order))

    def _send(self, peer: Peer, what: str, data: dict[str, Any]) -> None:
        self.runner.send_message(f"twoclocks_{what}", {"run": self.run} | data, peer.client_id)

    def await_ready(self) -> None:
        """Until all have read their request files and asked for the time. Raises TwoclocksError for who cannot."""
        deadline = time.monotonic() + READY_S
        while waiting := [peer for peer in self.peers.values() if not peer.is_ready and not peer.late]:
            refused = [peer for peer in waiting if peer.refusal is not None]
            if refused:
                raise TwoclocksError(f"{refused[0].name} cannot take part: {refused[0].refusal}")
            there = {client.id for client in self.runner.clients.all if client.state != STATE_MISSING}
            if gone := [peer for peer in waiting if peer.client_id not in there]:
                raise TwoclocksError(f"{gone[0].name} was gone before the run began; look at its output")
            if time.monotonic() > deadline:
                raise TwoclocksError(
                    f"{waiting[0].name} did not get ready within {READY_S:g} s; look at its output, or end it"
                )
            gevent.sleep(0.02)

    def open_window(self, zero_ns: int, window_ns: int) -> None:
        """Tell all when the run and its window begin, on the master's clock."""
        self.window = {"zero_ns": zero_ns, "window_ns": window_ns}
        for peer in self.peers.values():
            if peer.is_ready:
                self._send(peer, "window", self.window)

    # messages

    def hear(self, msg: Any) -> Peer | None:
        """Who it is that says something of this run; None if nobody who takes part in it.

        Whoever reaches the port can say anything. What is not as a worker says it ends in Locust's log, and no further.
        """
        peer = self.peers.get(msg.node_id)
        if peer is None or not isinstance(msg.data, dict) or msg.data.get("run") != self.run:
            return None
        now = time.monotonic()
        if peer.is_silent:
            since = peer.silences[-1][0]
            peer.silences[-1] = (since, now)
            self.note(f"{peer.name} is heard again after {now - since:.1f} s")
            if not is_open(self.experiment.load) and self.runner.state == STATE_RUNNING:
                # Locust adds it to its plan, but does not carry that out where it has moved users before
                gevent.spawn(self.runner.start, self.runner.target_user_count, self.runner.spawn_rate)
        peer.heard = now
        return peer

    def on_ping(self, msg: Any) -> None:
        """A worker asks for the time, and says what it is at: also that it is ready, or why it cannot take part."""
        told_ns = time.monotonic_ns()
        if (peer := self.hear(msg)) is None:
            return
        ping = msgspec.convert(msg.data, Ping)
        self._send(peer, "pong", {"sent_ns": ping.sent_ns, "told_ns": told_ns})
        peer.host, peer.pid, peer.refusal, peer.state = ping.host, ping.pid, ping.refusal, ping.state
        if peer.late and peer.refusal is not None:
            self.note(f"{peer.name} came late and cannot take part: {peer.refusal}")
            del self.peers[peer.client_id]
            self.runner.send_message("quit", None, peer.client_id)
            return
        peer.begun = max(peer.begun, ping.state.begun)
        if ping.ready and not peer.is_ready:
            peer.is_ready, peer.ready_at = True, time.monotonic()
        if peer.is_ready and self.window is not None and not ping.has_window:
            self._send(peer, "window", self.window)

    def on_frame(self, msg: Any) -> None:
        """Lines of a worker. The answer says up to which frame all have come."""
        peer = self.hear(msg)
        if peer is None:
            return
        frame = msgspec.convert(msg.data, Frame)
        done = msgspec.convert(frame.said["done"], Done) if "done" in frame.said else None
        sent = msgspec.msgpack.decode(done.sent, type=Sent) if done is not None else Sent()
        peer.begun = max(peer.begun, frame.begun)
        if is_next := peer.inbox.is_next(frame):
            self.keep(frame)  # before it counts: what could not be kept comes again
        peer.inbox.take(frame)
        if is_next:
            peer.is_exhausted |= "exhausted" in frame.said
            if done is not None:
                peer.done, peer.sent, peer.done_at = done, sent, time.monotonic()
            self._look_for_the_end()
        self._send(peer, "ack", {"number": peer.inbox.number})

    # while it runs

    def _watch(self) -> None:
        """Look who is silent. After a look that came late itself, what has come meanwhile is read first."""
        while True:
            due = time.monotonic() + LOOK_S
            gevent.sleep(LOOK_S)
            now = time.monotonic()
            if now - due > LOOK_S:
                continue
            for peer in list(self.peers.values()):
                if peer.is_ready and peer.done is None and not peer.is_silent and now - peer.heard > SILENT_S:
                    peer.silences.append((peer.heard, None))
                    self.note(
                        f"{peer.name} has said nothing for {now - peer.heard:.1f} s: it has ended or stands still, or "
                        f"the network does; {peer.lost} requests that it had begun have no record yet"
                    )
            if self.window is not None and not self.is_ending:
                self._look_for_the_end()
                peers = self._taking_part()
                gone = [peer for peer in peers if peer.is_silent or peer.done is not None]
                unsent = any(not peer.is_exhausted for peer in gone)
                if unsent and all(peer in gone or peer.is_exhausted for peer in peers):
                    left = (
                        "no worker is left"
                        if len(gone) == len(peers)
                        else "only workers that are gone had more to send"
                    )
                    self.note(f"{left}; the run ends")
                    self.on_alone()
                    return

    def _look_for_the_end(self) -> None:
        if all(peer.is_exhausted for peer in self._taking_part()):
            self.on_exhausted()

    # end

    def await_done(self, patience_s: float) -> None:
        """Ask all for their last lines, and wait; for who is silent not any longer."""
        self.is_ending = True
        left = [peer for peer in self.peers.values() if peer.done is not None]
        deadline, ask_at = time.monotonic() + patience_s, 0.0
        while (now := time.monotonic()) < deadline:
            awaited = [peer for peer in self.peers.values() if peer.done is None and peer.is_ready]
            if now >= ask_at:
                ask_at = now + ASK_AGAIN_S
                for peer in awaited:
                    self._send(peer, "stop", {})
            if all(peer.is_silent for peer in awaited):
                break
            gevent.sleep(0.05)
        self.watching.kill()
        self.peers = {peer.client_id: peer for peer in self._taking_part()}
        self.was_alone = all(peer in left or peer.done is None for peer in self.peers.values())
        if missing := self.missing:
            names = ", ".join(peer.name for peer in missing)
            self.note(f"{len(missing)} of {len(self.peers)} workers ended without their last lines: {names}")

    def _taking_part(self) -> list[Peer]:
        """All but who came late and has not got ready yet."""
        return [peer for peer in self.peers.values() if peer.is_ready or not peer.late]

    @property
    def missing(self) -> list[Peer]:
        """Who took part and did not send its last lines."""
        return [peer for peer in self.peers.values() if peer.done is None]

    def told(
        self, zero_ns: int, window: tuple[float | None, float | None], trace: Sequence[float | None]
    ) -> Iterator[dict[str, Any]]:
        """A row of run.json for each worker; times on the run's clock, in seconds. ``trace``: those of the prompts."""

        def at(moment: float | None) -> float | None:
            return None if moment is None else round(moment - zero_ns / 1e9, 3)

        began, ended = window
        length = ended - began if began is not None and ended is not None else 0.0
        shares = sum(not peer.late for peer in self.peers.values())
        for peer in self.peers.values():
            unsent = None
            if peer.done is None and not peer.late:
                due = due_within(self.experiment.load, trace, length, peer.share, shares)
                unsent = None if due is None else max(0, due - peer.begun)
            yield {
                "worker": peer.share,
                "host": peer.host,
                "pid": peer.pid,
                "late": peer.late,
                "joined_at": at(peer.ready_at) if peer.late else None,
                "heard_until": at(peer.heard),
                "done_at": at(peer.done_at),
                "begun": peer.begun,
                "records": peer.inbox.lines,
                "lost": peer.lost,
                "due_not_sent": unsent,
                "silences": [[at(since), at(until)] for since, until in peer.silences],
                "held_s": peer.state.held_s,
                "frames": peer.inbox.number,
                "frames_repeated": peer.done.repeated if peer.done is not None else None,
                "clock": None if peer.state.clock is None else msgspec.structs.asdict(peer.state.clock),
            }
