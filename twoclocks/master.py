"""The master's side of a run: its folder, its clock, its collectors, its end.

It lives in Locust's master, or in its only process. Workers send their finished lines here.
"""

import itertools
import logging
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import Event
from greenlet import GreenletExit
from locust.env import Environment
from locust.runners import STATE_SPAWNING, STATE_STOPPED, MasterRunner

from twoclocks.client import send
from twoclocks.collect import Collectors, Job
from twoclocks.endpoint import make_endpoint, request_headers, secrets_of, token_counter
from twoclocks.errors import TwoclocksError, plain
from twoclocks.experiment import Experiment
from twoclocks.export import Exporter, start_exporter
from twoclocks.fleet import Done, Fleet
from twoclocks.frames import Frame
from twoclocks.live import REFRESH_S, LiveView, Moment, is_shown
from twoclocks.locust_options import Ours, apply_options, started, told_overrides
from twoclocks.masks import redact
from twoclocks.prefix_plan import Sent, intended
from twoclocks.prompts import Prompt
from twoclocks.reader import connect, reader_name
from twoclocks.record import Record
from twoclocks.run_folder import RunFolder, first_meta
from twoclocks.selfwatch import watch
from twoclocks.shapes import dealt, in_window, is_open, length_s
from twoclocks.target import metrics_urls, resolve
from twoclocks.user import Sender, StreamingUser, load_now
from twoclocks.warmup import in_words, warm_up
from twoclocks.web_tab import Shown
from twoclocks.workload import load_workload, new_salt, plans

PROGRESS_S = 15.0
OPEN_LEAD_S = 0.25  # between the word to begin and the first request that is due
WORKER_GRACE_S = 15.0  # beyond the drain, for a worker's last lines to arrive

log = logging.getLogger("twoclocks")
for _name in ("httpx", "httpcore"):  # a line for each control request says nothing to a user, but what headers it had
    logging.getLogger(_name).setLevel(logging.WARNING)


class MasterSide:
    """Begins and ends runs in the process that owns the run folder: Locust's master, or its only process."""

    def __init__(
        self,
        environment: Environment,
        runner: Any,
        options: Namespace,
        ours: Ours,
        written: Experiment,
        settings: Experiment,
    ) -> None:
        self.environment, self.runner, self.options, self.ours = environment, runner, options, ours
        self.written = written  # as the file and --set have it
        self.experiment = settings  # as Locust's own options have changed it
        self.folder: RunFolder | None = None
        self.collectors: Collectors | None = None
        self.exporter: Exporter | None = None
        self.timer: gevent.Greenlet | None = None
        self.watch: gevent.Greenlet | None = None
        self.beginning: gevent.Greenlet | None = None  # who is in begin(), if anyone
        self.ending: Event | None = None  # while somebody is in end()
        self.progress: gevent.Greenlet | None = None
        self.stepping: gevent.Greenlet | None = None
        self.live: LiveView | None = None  # where somebody looks at a headless run
        self.drawing: gevent.Greenlet | None = None
        self.sender: Sender | None = None
        self.zero_ns = 0
        self.model = self.salt = ""
        self.users = 0  # of a ramp, as was asked for last
        self.kept = 0  # lines for requests.jsonl, whether or not the disk took them
        self.fleet: Fleet | None = None  # the workers of the run, where there are any
        self.prompts: list[Prompt] = []
        self.sent_warmup = Sent()  # prompts
        self.time_is_up = False
        self.broken: str | None = None
        self.refused: str | None = None  # why the last run that was asked for could not begin
        self.ended: list[Path] = []  # folders of the runs that are over
        environment.events.test_start.add_listener(lambda **_: self.begin())
        environment.events.test_stopping.add_listener(lambda **_: self.stopping())
        environment.events.test_stop.add_listener(lambda **_: self.end())
        environment.events.spawning_complete.add_listener(lambda **_: self.spawned())
        environment.events.quitting.add_listener(lambda **_: self.quitting())
        environment.events.quit.add_listener(lambda **_: self.leave())
        if isinstance(runner, MasterRunner):
            runner.register_message("twoclocks_ping", self.on_ping)
            runner.register_message("twoclocks_frame", self.on_frame)
            runner.register_message("twoclocks_hello", self.on_hello)

    # begin

    def may_begin(self, users: str) -> None:
        """Whether a form of the web UI, with so many users, can be had now: Locust would end who is about to begin
        a run, and begin one while another drains. Raises TwoclocksError.
        """
        load = self.experiment.load
        if self.beginning is not None:
            raise TwoclocksError("a run is beginning: its users can be changed once it measures")
        if self.folder is not None and self.folder.meta["window"]["ended_at"] is not None:
            raise TwoclocksError(f"the run before drains still, for load.drain_s = {load.drain_s:g} s at most")
        if load.shape == "steps" and self.folder is not None:
            raise TwoclocksError("load.shape is steps: load.steps says how many users there are, and when")
        if load.shape == "steps" and users != str(load.steps[0][0]):
            raise TwoclocksError(f"load.shape is steps: enter the users of the first of load.steps, {load.steps[0][0]}")

    def begin(self) -> None:
        """Check the target, open the run folder, start the collectors, warm up, and start the clock."""
        self.runner.update_state(STATE_SPAWNING)  # else Locust would not hear a stop before the first user
        self.beginning = gevent.getcurrent()
        try:
            self._begin()
        except TwoclocksError as error:
            self._give_up(str(error), error.exit_code)
        except Exception as error:
            log.debug("the run could not begin", exc_info=True)
            self._give_up(f"the run could not begin: {type(error).__name__}: {plain(error)}", TwoclocksError.exit_code)
        finally:
            self.beginning = None
            if self.folder is None and self.fleet is not None:  # it would tell the next run what becomes of its workers
                self.fleet.watching.kill()
                self.fleet = None

    def _give_up(self, why: str, exit_code: int) -> None:
        if self.options.headless:
            sys.stderr.write(f"twoclocks: {plain(why)}\n")
        else:  # so that Locust's page has it too, among its logs
            log.error(plain(why))
        self.refused = why
        self.environment.process_exit_code = exit_code
        if self.folder is not None:
            self.note(why)
            self.stopping()
            self.end()
        self.runner.update_state(STATE_STOPPED)
        if self.options.headless:
            if not self.ended:  # Locust's tables of nothing would hide the line above
                logging.getLogger("locust.stats_logger").disabled = True
            gevent.spawn(self.runner.quit)
        raise GreenletExit from None  # ends the greenlet that was about to spawn users

    def _begin(self) -> None:
        if self.environment.web_ui is not None:
            # Locust's timer runs from before the warm-up; the clock that counts is ours
            self.environment.web_ui._cancel_run_time_timer()
        if not self.options.headless:  # the web form may have changed users, rate, host and time
            self.experiment = apply_options(
                self.experiment, Namespace(**vars(self.options) | {"host": self.environment.host})
            )
        experiment = self.experiment
        self.environment.stop_timeout = experiment.load.drain_s
        self.kept = 0
        self.time_is_up, self.broken, self.refused = False, None, None
        self.users = experiment.load.users
        if self.exporter is not None:  # of the run before, which may still await a last scrape
            self.exporter.close()
            self.exporter = None
        self.model, version = resolve(experiment.target)
        endpoint = make_endpoint(experiment.target, experiment.timeouts)
        prompts = self.prompts = in_window(load_workload(experiment), experiment.load)
        self.salt = new_salt()
        if isinstance(self.runner, MasterRunner):
            self.fleet = self._gather()
            self.fleet.await_ready()  # so that a worker that cannot take part is told before any load is sent
        self.folder = RunFolder.create(experiment, self.ours.run_folder)
        model = redact(self.model, endpoint.secrets)  # as it is shown; requests name it as the server did
        self.zero_ns = time.monotonic_ns()
        target = experiment.target
        self.folder.write_meta(
            **first_meta(self.zero_ns),
            overrides=told_overrides(self.written, experiment, self.ours.overrides),
            labels=experiment.labels,
            reader=reader_name(endpoint),
            target={
                "name": endpoint.target,
                "url": target.url,
                "server": target.server,
                "api": target.api,
                "model": model,
                "server_version": redact(version, endpoint.secrets),
            }
            | started(self.ours.started),
            workers=1,
        )
        log.info("run folder: %s", self.folder.path)
        self.exporter = start_exporter(experiment, self.folder, self.note, otel=self.options.otel)
        if not target.stream:
            self.note("target.stream is false: an answer comes whole, so that its TTFT is its E2E and it has no TPOT")
        self.collectors = Collectors(self._job())
        for url, error in self.collectors.errors.items():
            if error:
                self.note(f"{url} could not be read ({error}); the server's own totals will be missing")
        for text in self.collectors.notes:
            self.note(text)
        self.sender = Sender(
            experiment=experiment,
            endpoint=endpoint,
            zero_ns=self.zero_ns,
            worker=0,
            plans=plans(experiment, prompts, self.model, salt=self.salt),
            sink=self.keep,
            count_tokens=token_counter(experiment.target.tokenizer),
            numbers=itertools.count(),
            on_exhausted=self._all_sent,
            **dealt(experiment.load, prompts),
        )
        StreamingUser.send_for(self.sender)
        if self.options.headless and is_shown():
            title = f"twoclocks: {experiment.name}, {endpoint.target} at {target.url}, {model}"
            self.live = LiveView(title, experiment.load, self.folder.path / "server_samples.jsonl")
            self.drawing = gevent.spawn(self._draw, self.live)
        if not isinstance(self.runner, MasterRunner):  # there the workers send, and watch themselves
            reader = reader_name(self.sender.endpoint)
            load = partial(load_now, self.runner, self.sender)
            self.watch = gevent.spawn(watch, self._now, 0, os.getpid(), reader, self.keep_self, load)
        self._warm_up()
        self.sent_warmup, self.sender.sent = self.sender.sent, Sent()
        if experiment.load.shape == "trace":  # each time has a prompt of its own
            self.sender.plans = plans(experiment, prompts, self.model, salt=self.salt)
        self.collectors.scrape()  # so that the server's totals of the window begin after the warm-up
        lead_s = 0.0
        if is_open(experiment.load):  # the schedule begins with the window, which users must not be late for
            lead_s = OPEN_LEAD_S * (4 if isinstance(self.runner, MasterRunner) else 1)
        self.sender.window_ns = time.monotonic_ns() + round(lead_s * 1e9)
        if self.fleet is not None:
            self.fleet.open_window(self.zero_ns, self.sender.window_ns)
            workers = len(self.fleet.peers)
            self.folder.write_meta(workers=workers)
            if is_open(experiment.load) and self.runner.target_user_count != workers:
                gevent.spawn(self.runner.start, workers, workers)  # one user sends all that is due in a worker
        started_at = (self.sender.window_ns - self.zero_ns) / 1e9
        self.folder.write_meta(window={"started_at": started_at, "ended_at": None})
        length = length_s(experiment.load)
        log.info("measuring for %g s", length)
        self.timer = gevent.spawn_later(lead_s + length, self._time_is_up)
        if experiment.load.shape == "steps":
            self.stepping = gevent.spawn(self._step, experiment.load.steps)
        if self.options.headless and self.live is None:
            self.progress = gevent.spawn(self._show_progress)

    def _job(self) -> Job:
        target, collect, folder = self.experiment.target, self.experiment.collect, self.folder
        assert folder is not None
        return Job(
            run_folder=str(folder.path),
            zero_ns=self.zero_ns,
            metrics_urls=metrics_urls(target, collect.metrics_url),
            stage_urls=[
                (stage.name, url) for stage in target.stages for url in metrics_urls(target, stage.metrics_url)
            ],
            interval_s=collect.metrics_interval_s,
            headers=request_headers(target),
            secrets=list(secrets_of(target)),
            target_url=target.url,
            tls_verify=target.tls_verify,
            tls_cert=target.tls_cert,
            otlp_host=collect.otlp_host,
            otlp_port=None if collect.otlp_port == "none" else collect.otlp_port,
            otlp_grpc_port=None if collect.otlp_grpc_port == "none" else collect.otlp_grpc_port,
            otlp_tail_s=collect.otlp_tail_s,
            services={stage.service: stage.name for stage in target.stages if stage.service is not None},
            log=collect.log,
            gpu=collect.gpu,
            process=None if collect.process == "none" else collect.process,
        )

    def _warm_up(self) -> None:
        sender, settings = self.sender, self.experiment.warmup
        assert sender is not None
        if not settings.requests:
            return
        log.info("warming up with %s (not counted; the first may wait for the server to compile)", in_words(settings))

        def one(user: int) -> Record:
            connection = connect(sender.endpoint)
            origin = sender.origin(user)
            plan = next(sender.plans)
            record = send(connection, plan, origin, "warmup")
            connection.close()
            sender.count_sent(plan, record)
            self.keep(sender.line(record))
            return record

        def one_round(count: int) -> list[Record]:
            greenlets = [gevent.spawn(one, -1 - index) for index in range(count)]
            try:
                gevent.joinall(greenlets, raise_error=True)
            finally:
                gevent.killall(greenlets)
            return [greenlet.value for greenlet in greenlets]

        done = warm_up(settings, one_round)
        self._tell(warmup=msgspec.to_builtins(done))
        if done.stable is False:
            self.note(
                f"the warm-up ended after {done.requests} requests and {done.seconds:.1f} s although TTFT had not "
                "settled yet; the beginning of the measuring window may still be slower than the rest"
            )
        if done.failed:
            self.note(f"{done.failed} of {done.requests} warm-up requests failed; the first: {done.first_failure}")
        elif self.experiment.target.server == "vllm" and not done.tells:
            port = self.experiment.collect.otlp_port
            spans = "" if port == "none" else f" or --otlp-traces-endpoint http://THIS_HOST:{port}/v1/traces"
            self.note(
                "vLLM sends no timings with its answers; to have its clock for each request, start it with "
                f"--enable-per-request-metrics (0.26 or newer){spans}"
            )

    # while it runs

    def keep(self, lines: bytes, name: str = "requests.jsonl") -> None:
        """Append finished lines; when that fails the run is over, since nothing it measured could be shown."""
        assert self.folder is not None
        try:
            self.folder.append(lines, name)
        except TwoclocksError as error:
            self._break(error)
        self.kept += lines.count(b"\n") if name == "requests.jsonl" else 0
        if self.live is not None:
            self.live.figures.add(lines, name)

    def keep_self(self, lines: bytes) -> None:
        """Append to self_samples.jsonl."""
        self.keep(lines, "self_samples.jsonl")

    def note(self, text: str) -> None:
        """Something the user should know, now and in the report."""
        log.warning(plain(text))
        if self.folder is not None:
            self._tell(notes=[*self.folder.meta["notes"], text])

    def spawned(self) -> None:
        """All users are there; others than before, where the web UI was asked for them while the run goes on."""
        before, self.users = self.users, self.runner.target_user_count
        if self.folder is not None and self.experiment.load.shape == "ramp" and self.users != before:
            self.note(
                f"the users were changed while the run went on: {self.users:,} from {self._now():.0f} s on, "
                f"{before:,} before; its figures are of both"
            )

    def _tell(self, **changes: Any) -> None:
        """Change run.json; when that fails the run is over, as in keep()."""
        assert self.folder is not None
        try:
            self.folder.write_meta(**changes)
        except TwoclocksError as error:
            self._break(error)

    def _break(self, error: TwoclocksError) -> None:
        if self.broken is None:
            self.broken = str(error)
            log.error("%s; stopping", error)
            gevent.spawn(self._stop_or_quit)

    def _now(self) -> float:
        return (time.monotonic_ns() - self.zero_ns) / 1e9

    def shown(self) -> Shown:
        """What the web UI's tab shows: the run that goes on, or the last one."""
        newest = self.folder.path if self.folder is not None else self.ended[-1] if self.ended else None
        return newest, self._now(), self.refused

    def _show_progress(self) -> None:
        """A line now and then, for those who keep Locust's tables away with --only-summary."""
        started_at = self._now()
        while True:
            gevent.sleep(PROGRESS_S)
            total = self.environment.stats.total
            log.info(
                "%.0f s of %g s: %d users, %d requests ended, %d of them failed",
                self._now() - started_at,
                length_s(self.experiment.load),
                self.runner.user_count,
                total.num_requests,
                total.num_failures,
            )

    def _draw(self, live: LiveView) -> None:
        while self.folder is not None and self.sender is not None:
            window = self.folder.meta["window"]
            flying = None if isinstance(self.runner, MasterRunner) else self.sender.in_flight
            live.refresh(Moment(self._now(), window["started_at"], window["ended_at"], self.runner.user_count, flying))
            gevent.sleep(REFRESH_S)

    def _hide(self) -> None:
        """From now on the terminal is as it was."""
        if self.drawing is not None:
            self.drawing.kill()
        if self.live is not None:
            self.live.stop()
        self.live, self.drawing = None, None

    def _time_is_up(self) -> None:
        self.time_is_up = True
        log.info("time is up; running streams may go on for load.drain_s = %g s", self.experiment.load.drain_s)
        gevent.spawn(self._stop_or_quit)  # not from the timer itself, which stopping ends

    def _stop_or_quit(self) -> None:
        if self.options.headless:
            self.runner.quit()
            return
        self.runner.stop()
        web_ui, options = self.environment.web_ui, self.options
        if web_ui is not None and options.autostart and options.autoquit != -1:  # by Locust's own clock, if it had one
            gevent.sleep(options.autoquit)
            self.runner.quit()
            web_ui.stop()

    def _gather(self) -> Fleet:
        """The workers that are there, each told what this run is."""
        run = new_salt()
        return Fleet(
            self.runner,
            run,
            self.experiment,
            model=self.model,
            salt=self.salt,
            keep=self._keep_frame,
            note=self.note,
            on_exhausted=self._all_sent,
            on_alone=lambda: gevent.spawn(self._stop_or_quit),  # who looks after the workers is ended with them
        )

    def on_hello(self, msg: Any, **_: Any) -> None:
        """A worker has come, and listens; where a run is under way it takes part."""
        if self.fleet is not None:
            self.fleet.welcome(msg.node_id)

    def on_ping(self, msg: Any, **_: Any) -> None:
        """A worker asks for the time."""
        if self.fleet is not None:
            self.fleet.on_ping(msg)

    def on_frame(self, msg: Any, **_: Any) -> None:
        """Lines of a worker."""
        if self.fleet is not None:
            self.fleet.on_frame(msg)

    def _keep_frame(self, frame: Frame) -> None:
        if frame.lines:  # before there is a folder, a worker may already have something to say
            self.keep(frame.lines)
        if frame.self_lines:
            self.keep_self(frame.self_lines)

    def _all_sent(self) -> None:
        if not self.time_is_up:
            self.time_is_up = True
            log.info("all requests have been sent and have ended")
            gevent.spawn(self._stop_or_quit)

    def _step(self, steps: Sequence[tuple[int, float]]) -> None:
        """The levels of users, one after the other; when each began stands in run.json."""
        levels: list[dict[str, float]] = []
        for number, (users, hold_s) in enumerate(steps):
            if number:  # Locust has begun with the first
                self.runner.start(users, users)
            levels.append({"users": users, "started_at": self._now()})
            self._tell(levels=levels)
            log.info("%d users for %g s", users, hold_s)
            gevent.sleep(hold_s)

    # end

    def stopping(self) -> None:
        """The window ends here; what still streams may go on until it is drained."""
        if self.folder is None:
            if self.beginning is not None and self.beginning is not gevent.getcurrent():
                self.beginning.kill(TwoclocksError(self._why_stopped()))  # which ends in _give_up
            return
        for greenlet in (self.timer, self.progress, self.stepping):
            if greenlet is not None:
                greenlet.kill(block=False)
        if self.sender is not None:
            self.sender.over.set()
        if self.fleet is not None:
            self.fleet.is_ending = True  # from now on workers are done one after the other
        if self.folder.meta["window"]["ended_at"] is None:
            self._tell(window=self.folder.meta["window"] | {"ended_at": self._now()})
        if self.beginning is not None and self.beginning is not gevent.getcurrent():
            self.beginning.kill()  # a warm-up that goes on would begin a window after the end

    def _why_stopped(self) -> str:
        """Before there is a run folder."""
        if isinstance(self.runner, MasterRunner) and not self.runner.worker_count:
            return "all workers were gone before the run began; look at their output"
        return "the run was stopped before it began"

    def end(self) -> None:
        """End the run. Who comes while another is at it waits: a Ctrl-C in the drain after the time was up."""
        while self.ending is not None:
            self.ending.wait()
        if self.folder is None:
            return
        self.ending = Event()
        try:
            self._end(self.folder)
        finally:
            self.ending.set()
            self.ending = None

    def _end(self, folder: RunFolder) -> None:
        """Collect the last lines, close the folder, build the report, set the exit code."""
        if self.fleet is not None:
            self.fleet.await_done(self.experiment.load.drain_s + WORKER_GRACE_S)
        fleet, self.fleet = self.fleet, None
        self._hide()
        if self.watch is not None:
            self.watch.kill()
        if self.collectors is not None:
            for text in self.collectors.stop(self.kept):
                self.note(text)
            self._tell(foreign_spans=self.collectors.foreign_spans)
        if fleet is not None:
            window = folder.meta["window"]
            trace = [prompt.at for prompt in self.prompts]
            self._tell(
                workers=len(fleet.peers),
                fleet=list(fleet.told(self.zero_ns, (window["started_at"], window["ended_at"]), trace)),
            )
        missing = len(fleet.missing) if fleet is not None else 0
        done = [(peer.done, peer.sent) for peer in fleet.peers.values() if peer.done] if fleet is not None else []
        unsent: list[Done | Sender] = [*(told for told, _ in done), *([self.sender] if self.sender is not None else [])]
        turns = sum((Counter(told.turns_not_sent) for told in unsent), Counter[str]())
        self._tell(
            prefix_intended=None if missing else self._intended([sent for _, sent in done]),
            not_sent=sum(told.not_sent for told in unsent),
            turns_not_sent=dict(turns) if self.experiment.workload.sessions != "none" else None,
            status="finished" if self.time_is_up else "interrupted",
            ended_at=self._now(),
            in_flight=None if missing else 0,
            missing_workers=missing,
            lost_records=sum(peer.lost for peer in fleet.peers.values()) if fleet is not None else 0,
            unwritten_records=folder.unwritten["requests.jsonl"],
            wall_clock_set_s=round(time.time() - folder.meta["started_at_unix"] - self._now(), 3),
        )
        if self.exporter is not None and (missing_figures := self.exporter.finish()):
            self.note(missing_figures)
        folder.close()
        self.folder, self.sender, self.collectors, self.watch = None, None, None, None
        self.ended.append(folder.path)
        if self.broken is not None:
            self.environment.process_exit_code = 4
            log.error("what was written is kept; once there is room: twoclocks report %s", folder.path)
        elif not self.options.no_report:
            self._report(folder.path)
        if fleet is not None and fleet.was_alone and self.options.headless:
            gevent.spawn(self.runner.quit)  # Locust ends the run when the last worker is gone, but not itself

    def _intended(self, of_workers: list[Sent]) -> dict[str, Any] | None:
        """What a perfect prefix cache could have answered; None where nothing of the workload was sent."""
        if self.sender is None or {"messages", "prompt", "inputs"} & self.experiment.target.extra_body.keys():
            return None
        salt = self.experiment.workload.salt
        told = intended(self.prompts, [*of_workers, self.sender.sent], self.sent_warmup, salt)
        return msgspec.structs.asdict(told) if told.characters else None

    def _report(self, path: Path) -> None:
        """In a process of its own, so that the load generator never imports what draws."""
        log.info("building the report of %s", path)
        process = subprocess.run([sys.executable, "-m", "twoclocks", "report", str(path)], check=False)
        if process.returncode and self.environment.process_exit_code in (None, 0):
            self.environment.process_exit_code = process.returncode

    def quitting(self) -> None:
        """On Ctrl-C and SIGTERM Locust fixes the exit code before it stops the users, so they are stopped here."""
        if self.folder is not None and self.folder.meta["window"]["ended_at"] is None:
            log.info("stopping; running streams may go on for load.drain_s = %g s, Ctrl-C again cuts them off",
                     self.experiment.load.drain_s)  # fmt: skip
        # to workers we speak ourselves: after Locust's own stop message they are deaf for as long as the drain may last
        stop = partial(self.runner.stop, False) if isinstance(self.runner, MasterRunner) else self.runner.stop
        try:
            stop()
            self.end()  # Locust's stop does nothing where one is under way
        except KeyboardInterrupt:
            sys.stderr.write("twoclocks: cutting the running streams off\n")
            self.environment.stop_timeout = 0
            stop()
            self.end()

    def leave(self) -> None:
        """Let Prometheus see the end, and say where everything is: the last line of a headless run."""
        if self.exporter is not None:
            self.exporter.wait()
        if self.options.headless and self.ended:
            sys.stdout.write(f"run folder: {self.ended[-1]}\n")
            sys.stdout.flush()
