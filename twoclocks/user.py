"""Locust's side: the user that streams, and the events that begin and end a run.

One Locust user is one closed loop of streams. The master, or the only process, owns the run folder, the collectors and
the clock's zero; workers send their finished lines to it. Importing this module is importing Locust, which monkey-patches
the standard library, so nothing that analyses may import it. Nothing is made at import: `--processes` forks afterwards.
"""

import itertools
import logging
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gevent
import msgspec
from greenlet import GreenletExit
from locust import User, constant, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from twoclocks import experiment as experiments
from twoclocks.client import Connection, Endpoint, Origin, make_endpoint, request_headers, send
from twoclocks.collect import Collectors, Job
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment
from twoclocks.record import TOKEN_KINDS, Record, encode_record
from twoclocks.run_folder import RunFolder, first_meta
from twoclocks.target import metrics_urls, resolve
from twoclocks.workload import Plan, load_prompts, plans

DEFAULT_EXPERIMENT = Path(__file__).parent.parent / "configs" / "default.yaml"
FLUSH_S = 0.5  # a killed worker loses at most this much of its finished requests
WORKER_GRACE_S = 15.0  # beyond the drain, for a worker's last lines to arrive
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # a user's pause after a failure, doubled each time, so that it cannot spin

log = logging.getLogger("twoclocks")
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each control request says nothing to a user


class Sender(msgspec.Struct):
    """What users of this process share while a run lasts."""

    experiment: Experiment
    endpoint: Endpoint
    zero_ns: int
    worker: int
    plans: Iterator[Plan]
    sink: Callable[[bytes], None]
    numbers: Iterator[int]  # of users
    stopping: bool = False


class StreamingUser(User):
    """Sends the next prompt when the last answer has ended."""

    wait_time = constant(0)
    sender: ClassVar[Sender]  # of the run that lasts

    def on_start(self) -> None:
        """Take the number and the connection that this user keeps."""
        self.connection = Connection(self.sender.endpoint)
        self.origin = Origin(
            zero_ns=self.sender.zero_ns,
            worker=self.sender.worker,
            user=next(self.sender.numbers),
            keep_text=self.sender.experiment.output_text,
        )
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
    failed = None if record.status == "ok" else RuntimeError(f"{record.error_kind}: {(record.error_message or '')[:120]}")
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
    kinds = [kind for kind, count in record.chunk_kinds for _ in range(count)]
    tokens = [index for index, kind in enumerate(kinds) if kind in TOKEN_KINDS]
    if tokens:
        return sum(record.chunk_us[: tokens[-1] + 1]) / 1e6
    return record.ended_at - (record.intended_at if record.sent_at is None else record.sent_at)


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Our options beside Locust's, and a UI and a master port that listen on this machine only unless told otherwise."""
    parser.add_argument(
        "--experiment",
        metavar="FILE",
        default=str(DEFAULT_EXPERIMENT),
        env_var="TWOCLOCKS_EXPERIMENT",
        include_in_web_ui=False,
        help="experiment file, e.g. configs/demo-vllm.yaml (default: configs/default.yaml)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        include_in_web_ui=False,
        help="change one key of the experiment, e.g. --set load.users=10; may be given several times",
    )
    parser.add_argument(
        "--no-report",
        action="store_true",
        include_in_web_ui=False,
        help="leave the report to a later `twoclocks report RUN`",
    )
    parser.set_defaults(web_host="127.0.0.1", master_bind_host="127.0.0.1")


@events.init.add_listener
def on_init(environment: Environment, runner: Any, **_: Any) -> None:
    """Read the experiment, fill Locust's own options from it, and listen."""
    if isinstance(runner, WorkerRunner):
        WorkerSide(environment, runner)
        return
    options = environment.parsed_options
    assert options is not None
    try:
        experiment = experiments.load_experiment(Path(options.experiment), options.overrides)
        settings = apply_options(experiment, options)
        load_prompts(Path(settings.workload.requests), settings.target.api)  # so that a bad file is told at once
        make_endpoint(settings.target, settings.timeouts)
    except TwoclocksError as error:
        sys.stderr.write(f"twoclocks: {error}\n")
        sys.exit(error.exit_code)
    load = settings.load
    options.num_users, options.spawn_rate = load.users, load.users / max(load.ramp_s, 1.0)
    options.host = environment.host = settings.target.url
    environment.stop_timeout = load.drain_s
    # the measured time begins after the warm-up, so the clock of a headless run is ours; elsewhere this fills the form
    options.run_time = None if options.headless else round(load.duration_s)
    MasterSide(environment, runner, options, experiment, settings)


def apply_options(experiment: Experiment, options: Namespace) -> Experiment:
    """The experiment with Locust's -H, -u, -r, -t and --stop-timeout in their places. Raises ExperimentError."""
    changes: dict[str, Any] = {}
    if options.host:
        changes["target.url"] = options.host
    if options.num_users is not None:
        changes["load.users"] = options.num_users
    if options.spawn_rate is not None:
        changes["load.ramp_s"] = (options.num_users or experiment.load.users) / options.spawn_rate
        if changes["load.ramp_s"] <= 1:
            changes["load.ramp_s"] = 0  # all of them in Locust's first step
    if options.run_time:
        changes["load.duration_s"] = options.run_time
    if float(options.stop_timeout or 0):
        changes["load.drain_s"] = float(options.stop_timeout)
    for key, value in changes.items():
        experiment = experiments.replace(experiment, key, value)
    return experiment


class MasterSide:
    """Begins and ends runs in the process that owns the run folder: Locust's master, or its only process."""

    def __init__(
        self, environment: Environment, runner: Any, options: Namespace, written: Experiment, settings: Experiment
    ) -> None:
        self.environment, self.runner, self.options = environment, runner, options
        self.written = written  # as the file and --set have it
        self.experiment = settings  # as Locust's own options have changed it
        self.folder: RunFolder | None = None
        self.collectors: Collectors | None = None
        self.timer: gevent.Greenlet | None = None
        self.sender: Sender | None = None
        self.zero_ns = 0
        self.model = ""
        self.received: dict[str, int] = {}  # lines of each worker
        self.sent: dict[str, int] = {}  # lines that a worker says it sent, once it is done
        self.shares: dict[str, int] = {}
        self.time_is_up = False
        self.broken: str | None = None
        self.ended: list[Path] = []  # folders of the runs that are over
        environment.events.test_start.add_listener(lambda **_: self.begin())
        environment.events.test_stopping.add_listener(lambda **_: self.stopping())
        environment.events.test_stop.add_listener(lambda **_: self.end())
        environment.events.quitting.add_listener(lambda **_: self.quitting())
        environment.events.quit.add_listener(lambda **_: self.say_where())
        if isinstance(runner, MasterRunner):
            runner.register_message("twoclocks_lines", self.on_lines)
            runner.register_message("twoclocks_done", self.on_done)
            environment.events.worker_connect.add_listener(lambda client_id, **_: self.welcome(client_id))

    # begin

    def begin(self) -> None:
        """Check the target, open the run folder, start the collectors, warm up, and start the clock."""
        try:
            self._begin()
        except TwoclocksError as error:
            sys.stderr.write(f"twoclocks: {error}\n")
            self.environment.process_exit_code = error.exit_code
            if self.options.headless:
                gevent.spawn(self.runner.quit)
            raise GreenletExit from None  # ends the greenlet that was about to spawn users

    def _begin(self) -> None:
        if not self.options.headless:  # the web form may have changed users, rate, host and time
            self.experiment = apply_options(
                self.experiment, Namespace(**vars(self.options) | {"host": self.environment.host})
            )
        experiment = self.experiment
        self.environment.stop_timeout = experiment.load.drain_s
        self.received, self.sent, self.shares = {}, {}, {}
        self.time_is_up, self.broken = False, None
        self.model, version = resolve(experiment.target)
        endpoint = make_endpoint(experiment.target, experiment.timeouts)
        prompts = load_prompts(Path(experiment.workload.requests), experiment.target.api)
        self.folder = RunFolder.create(experiment)
        self.zero_ns = time.monotonic_ns()
        target = experiment.target
        self.folder.write_meta(
            **first_meta(self.zero_ns),
            overrides=_differences(self.written, experiment) | dict(_split(self.options.overrides)),
            labels=experiment.labels,
            target={
                "name": endpoint.target,
                "url": target.url,
                "server": target.server,
                "api": target.api,
                "model": self.model,
                "server_version": version,
            },
            workers=1,
        )
        log.info("run folder: %s", self.folder.path)
        self.collectors = Collectors(self._job())
        for url, error in self.collectors.errors.items():
            if error:
                self.note(f"{url} could not be read ({error}); the server's own totals will be missing")
        self.sender = Sender(
            experiment=experiment,
            endpoint=endpoint,
            zero_ns=self.zero_ns,
            worker=0,
            plans=plans(experiment, prompts, self.model),
            sink=self.keep,
            numbers=itertools.count(),
        )
        StreamingUser.sender = self.sender
        self._warm_up()
        if isinstance(self.runner, MasterRunner):
            clients = [client.id for client in self.runner.clients.all]
            self.folder.write_meta(workers=len(clients))
            for client_id in clients:
                self.welcome(client_id)
        self.folder.write_meta(window={"started_at": self._now(), "ended_at": None})
        log.info("measuring for load.duration_s = %g s", experiment.load.duration_s)
        self.timer = gevent.spawn_later(experiment.load.duration_s, self._time_is_up)
        if self.environment.web_ui is not None:
            # Locust's timer began before the warm-up; the clock that counts is the one above
            self.environment.web_ui._cancel_run_time_timer()

    def _job(self) -> Job:
        experiment, folder = self.experiment, self.folder
        assert folder is not None
        log_setting = experiment.collect.log
        return Job(
            run_folder=str(folder.path),
            zero_ns=self.zero_ns,
            metrics_urls=metrics_urls(experiment.target, experiment.collect.metrics_url),
            interval_s=experiment.collect.metrics_interval_s,
            headers=request_headers(experiment.target),
            tls_verify=experiment.target.tls_verify,
            log_path=None if log_setting == "none" else log_setting.removeprefix("file:"),
        )

    def _warm_up(self) -> None:
        sender = self.sender
        assert sender is not None
        count = self.experiment.warmup.requests
        if not count:
            return
        log.info("warming up with %d requests (not counted; the first may wait for the server to compile)", count)

        def one(user: int) -> Record:
            connection = Connection(sender.endpoint)
            origin = Origin(zero_ns=sender.zero_ns, user=user, keep_text=self.experiment.output_text)
            record = send(connection, next(sender.plans), origin, "warmup")
            connection.close()
            self.keep(encode_record(record))
            return record

        greenlets = [gevent.spawn(one, -1 - index) for index in range(count)]
        try:
            gevent.joinall(greenlets, raise_error=True)
        finally:
            gevent.killall(greenlets)
        records = [greenlet.value for greenlet in greenlets]
        failed = [record for record in records if record.status != "ok"]
        if failed:
            self.note(f"{len(failed)} of {count} warm-up requests failed; the first: {failed[0].error_message}")
        elif self.experiment.target.server == "vllm" and not any(record.server for record in records):
            self.note(
                "vLLM sends no timings with its answers; start it with --enable-per-request-metrics (0.26 or newer) "
                "to have the server's clock for each request"
            )

    # while it runs

    def keep(self, lines: bytes) -> None:
        """Append to requests.jsonl; when that fails the run is over, since nothing it measured could be shown."""
        assert self.folder is not None
        try:
            self.folder.append(lines)
        except TwoclocksError as error:
            if self.broken is None:
                self.broken = str(error)
                log.error("%s; stopping", error)  # noqa: TRY400  one line for the user, no traceback
                gevent.spawn(self._stop_or_quit)

    def note(self, text: str) -> None:
        """Something the user should know, now and in the report."""
        log.warning(text)
        assert self.folder is not None
        self.folder.write_meta(notes=[*self.folder.meta["notes"], text])

    def _now(self) -> float:
        return (time.monotonic_ns() - self.zero_ns) / 1e9

    def _time_is_up(self) -> None:
        self.time_is_up = True
        log.info("time is up; running streams may go on for load.drain_s = %g s", self.experiment.load.drain_s)
        gevent.spawn(self._stop_or_quit)  # not from the timer itself, which stopping ends

    def _stop_or_quit(self) -> None:
        if self.options.headless:
            self.runner.quit()
        else:
            self.runner.stop()

    def welcome(self, client_id: str) -> None:
        """Tell a worker what to send; also one that comes late."""
        if self.folder is None or client_id in self.shares:
            return
        self.shares[client_id] = len(self.shares)
        data = {
            "run": self.folder.path.name,
            "experiment": msgspec.json.encode(self.experiment),
            "model": self.model,
            "zero_ns": self.zero_ns,
            "hostname": socket.gethostname(),
            "share": self.shares[client_id],
            "shares": max(1, len(self.runner.clients.all)),
        }
        self.runner.send_message("twoclocks_run", data, client_id)

    def on_lines(self, msg: Any, **_: Any) -> None:
        """Finished lines of a worker."""
        if self.folder is None or msg.data["run"] != self.folder.path.name:
            return
        lines: bytes = msg.data["lines"]
        self.received[msg.node_id] = self.received.get(msg.node_id, 0) + lines.count(b"\n")
        self.keep(lines)

    def on_done(self, msg: Any, **_: Any) -> None:
        """A worker has drained, and says how many lines it sent."""
        if self.folder is not None and msg.data["run"] == self.folder.path.name:
            self.sent[msg.node_id] = msg.data["lines"]

    # end

    def stopping(self) -> None:
        """The window ends here; what still streams may go on until it is drained."""
        if self.folder is None:
            return
        if self.timer is not None:
            self.timer.kill(block=False)
        if self.sender is not None:
            self.sender.stopping = True
        if self.folder.meta["window"]["ended_at"] is None:
            self.folder.write_meta(window=self.folder.meta["window"] | {"ended_at": self._now()})

    def end(self) -> None:
        """Collect the last lines, close the folder, build the report, set the exit code."""
        folder = self.folder
        if folder is None:
            return
        if isinstance(self.runner, MasterRunner):
            self._await_workers()
        if self.collectors is not None:
            self.collectors.stop()
        folder.write_meta(
            status="finished" if self.time_is_up else "interrupted",
            ended_at=self._now(),
            in_flight=0,
            lost_records=sum(self.sent.values()) - sum(self.received.get(worker, 0) for worker in self.sent),
        )
        folder.close()
        self.folder, self.sender, self.collectors = None, None, None
        self.ended.append(folder.path)
        if self.broken is not None:
            self.environment.process_exit_code = 4
        if not self.options.no_report:
            self._report(folder.path)

    def _await_workers(self) -> None:
        assert self.folder is not None
        workers = set(self.shares) & {client.id for client in self.runner.clients.all}
        for client_id in workers:
            self.runner.send_message("twoclocks_stop", {"run": self.folder.path.name}, client_id)
        deadline = time.monotonic() + self.experiment.load.drain_s + WORKER_GRACE_S
        while not workers <= set(self.sent) and time.monotonic() < deadline:
            gevent.sleep(0.05)
        missing = set(self.shares) - set(self.sent)
        if missing:
            self.note(f"{len(missing)} of {len(self.shares)} workers ended without their last lines: {sorted(missing)}")

    def _report(self, path: Path) -> None:
        """In a process of its own, so that the load generator never imports what draws."""
        log.info("building the report of %s", path)
        process = subprocess.run([sys.executable, "-m", "twoclocks", "report", str(path)], check=False)
        if process.returncode and self.environment.process_exit_code in (None, 0):
            self.environment.process_exit_code = process.returncode

    def quitting(self) -> None:
        """On Ctrl-C and SIGTERM Locust fixes the exit code before it stops the users, so they are stopped here."""
        # to workers we speak ourselves: after Locust's own stop message they are deaf for as long as the drain may last
        stop = partial(self.runner.stop, False) if isinstance(self.runner, MasterRunner) else self.runner.stop
        try:
            stop()
        except KeyboardInterrupt:
            sys.stderr.write("twoclocks: cutting the running streams off\n")
            self.environment.stop_timeout = 0
            stop()

    def say_where(self) -> None:
        """The last line of a headless run."""
        if self.options.headless and self.ended:
            sys.stdout.write(f"run folder: {self.ended[-1]}\n")
            sys.stdout.flush()


class WorkerSide:
    """Sends the finished lines of this worker to the master, in small batches."""

    def __init__(self, environment: Environment, runner: Any) -> None:
        self.environment, self.runner = environment, runner
        self.run: str | None = None
        self.lines: list[bytes] = []
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
        if data["hostname"] != socket.gethostname():
            log.warning("worker on another host than the master: its times use this host's clock zero, unsynchronised")
        prompts = load_prompts(Path(experiment.workload.requests), experiment.target.api)
        self.run, self.lines, self.count = data["run"], [], 0
        StreamingUser.sender = Sender(
            experiment=experiment,
            endpoint=make_endpoint(experiment.target, experiment.timeouts),
            zero_ns=data["zero_ns"],
            worker=data["share"],
            plans=plans(experiment, prompts, data["model"], share=data["share"], shares=data["shares"]),
            sink=self.lines.append,
            numbers=itertools.count(data["share"], data["shares"]),
        )

    def on_stop(self, msg: Any, **_: Any) -> None:
        """The master ends the run and waits for our last lines."""
        if msg.data["run"] == self.run:
            self.runner.stop()
            self.done()

    def stopping(self) -> None:
        """What is sent from now on is outside the window."""
        if self.run is not None:
            StreamingUser.sender.stopping = True

    def done(self) -> None:
        """All users have ended: send what is left, and how much it was in all."""
        if self.run is not None:
            self.flush()
            self.runner.send_message("twoclocks_done", {"run": self.run, "lines": self.count})

    def flush(self) -> None:
        """Send the lines that have come since the last time."""
        if self.lines:
            lines = b"".join(self.lines)
            self.count += len(self.lines)
            self.lines.clear()
            self.runner.send_message("twoclocks_lines", {"run": self.run, "lines": lines})

    def _flush_for_ever(self) -> None:
        while True:
            gevent.sleep(FLUSH_S)
            self.flush()


def _differences(before: Experiment, after: Experiment) -> dict[str, Any]:
    """Dotted keys whose value changed, with the new value."""
    old, new = _flat(msgspec.to_builtins(before)), _flat(msgspec.to_builtins(after))
    return {key: value for key, value in new.items() if old.get(key) != value and "headers" not in key}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _split(overrides: list[str]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        key, _, value = override.partition("=")
        yield key, "***" if "headers" in key else value
