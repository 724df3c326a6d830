"""A worker's side of a run: its finished lines go to the master in small batches."""

import itertools
import logging
import os
from functools import partial
from typing import Any

import gevent
import msgspec
from locust.env import Environment

from twoclocks.endpoint import make_endpoint, token_counter
from twoclocks.experiment import Experiment
from twoclocks.reader import reader_name
from twoclocks.run_folder import this_clock
from twoclocks.selfwatch import watch
from twoclocks.shapes import dealt, in_window
from twoclocks.user import Sender, StreamingUser, load_now
from twoclocks.workload import load_workload, plans

FLUSH_S = 0.5  # a killed worker loses at most this much of its finished requests

log = logging.getLogger("twoclocks")


class WorkerSide:
    """Sends the finished lines of this worker to the master, in small batches."""

    def __init__(self, environment: Environment, runner: Any) -> None:
        self.environment, self.runner = environment, runner
        self.run: str | None = None
        self.lines: list[bytes] = []
        self.self_lines: list[bytes] = []
        self.watch: gevent.Greenlet | None = None
        self.count = 0
        runner.register_message("twoclocks_run", self.on_run)
        runner.register_message("twoclocks_stop", self.on_stop, concurrent=True)
        environment.events.test_stopping.add_listener(lambda **_: self.stopping())
        environment.events.test_stop.add_listener(lambda **_: self.done())
        gevent.spawn(self._flush_for_ever)

    def on_run(self, msg: Any, **_: Any) -> None:
        """What the master says before it spawns users here."""
        data = msg.data
        experiment = msgspec.json.decode(data["experiment"], type=Experiment)
        if data["clock"] != this_clock():
            log.error("this worker has another clock than the master; workers on other hosts are not supported yet")
            self.runner.quit()
            return
        prompts = in_window(load_workload(experiment), experiment.load)
        self.run, self.lines, self.self_lines, self.count = data["run"], [], [], 0
        endpoint = make_endpoint(experiment.target, experiment.timeouts)
        reader = reader_name(endpoint)
        share, shares = data["share"], data["shares"]
        StreamingUser.sender = Sender(
            experiment=experiment,
            endpoint=endpoint,
            zero_ns=data["zero_ns"],
            worker=share,
            plans=plans(experiment, prompts, data["model"], share=share, shares=shares, salt=data["salt"]),
            sink=self.lines.append,
            count_tokens=token_counter(experiment.target.tokenizer),
            numbers=itertools.count(share, shares),
            on_exhausted=lambda: self.runner.send_message("twoclocks_exhausted", {"run": self.run}),
            window_ns=data["window_ns"],
            **dealt(experiment.load, prompts, share, shares),
        )
        load = partial(load_now, self.runner, StreamingUser.sender)
        self.watch = gevent.spawn(watch, data["zero_ns"], share, os.getpid(), reader, self.self_lines.append, load)

    def on_stop(self, msg: Any, **_: Any) -> None:
        """The master ends the run and waits for our last lines."""
        if msg.data["run"] == self.run:
            self.runner.stop()
            self.done()

    def stopping(self) -> None:
        """What is sent from now on is outside the window."""
        if self.run is not None:
            StreamingUser.sender.over.set()

    def done(self) -> None:
        """All users have ended: send what is left, and how much it was in all."""
        if self.run is not None:
            if self.watch is not None:
                self.watch.kill()
            self.flush()
            sender = StreamingUser.sender
            sent = msgspec.msgpack.encode(sender.sent)
            data = {"run": self.run, "lines": self.count, "unsent": sender.unsent(), "sent": sent}
            self.runner.send_message("twoclocks_done", data)
            # All users have ended: after its stop message Locust would be deaf, and unknown to the master, for so long.
            self.runner.environment.stop_timeout = 0

    def flush(self) -> None:
        """Send the lines that have come since the last time."""
        if self.lines or self.self_lines:
            data = {"run": self.run, "lines": b"".join(self.lines), "self": b"".join(self.self_lines)}
            self.count += len(self.lines)
            self.lines.clear()
            self.self_lines.clear()
            self.runner.send_message("twoclocks_lines", data)

    def _flush_for_ever(self) -> None:
        while True:
            gevent.sleep(FLUSH_S)
            self.flush()
