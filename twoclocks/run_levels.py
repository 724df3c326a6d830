"""`twoclocks run`: Locust as a child process, once, or once for each level of a sweep or a search.

A level is a run like any other, with a folder of its own; `sweep.json` beside them says which there are. What a level
showed is read from its folder, so that a sweep or search that was broken off goes on where it was.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from twoclocks import __version__, keeper
from twoclocks.endpoint import request_headers, tls_context
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Experiment, Target, load_experiment, masked_word, to_yaml
from twoclocks.levels import RULE, Evidence, Found, Next, Probe, judge, next_probe, sweep_levels
from twoclocks.run_folder import make_folder, refuse_existing
from twoclocks.target import base_url

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = Path(__file__).parent / "templates" / "load_test.py"
SWEEP_FILE = "sweep.json"
INTERRUPTED = 130

Progress = Callable[[str], None]


class Level(msgspec.Struct, kw_only=True):
    """A run of a sweep or search, as it stands in sweep.json."""

    number: int
    over: str
    value: float
    folder: str  # beside sweep.json
    longer: bool = False  # the repetition of an undecided probe, for twice as long
    status: str = "running"  # finished | failed | interrupted: whether the run came to its proper end
    exit_code: int | None = None
    error: str | None = None
    reset: str | None = None  # what came of the reset call
    started_at_unix: float = 0.0
    ended_at_unix: float | None = None


class Levels(msgspec.Struct, kw_only=True):
    """sweep.json."""

    kind: str  # sweep | search
    name: str
    over: str
    twoclocks_version: str
    experiment_file: str
    overrides: list[str]  # secrets masked
    planned: list[float] = []  # of a sweep
    status: str = "running"  # finished | interrupted | failed
    started_at_unix: float = 0.0
    ended_at_unix: float | None = None
    levels: list[Level] = []
    probes: list[Probe] = []  # of a search: its judgements
    found: Found | None = None
    rule: str = ""


@dataclass
class Child:
    """Passes the signals of this process on to the one that runs; a terminal's Ctrl-C reaches that by no other way."""

    pid: int | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def on_signal(self, number: int, _frame: object) -> None:
        self.stopped.set()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def run(self, argv: Sequence[str | Path]) -> int:
        """Run to its end; its exit code."""
        kept = keeper.start(argv)
        self.pid = kept.pid
        if self.stopped.is_set():  # between two children
            os.kill(kept.pid, signal.SIGINT)
        try:
            return kept.keeper.wait()
        finally:
            self.pid = None
            kept.stop()


@contextlib.contextmanager
def passing_signals_on() -> Iterator[Child]:
    """While this lasts, SIGINT and SIGTERM go to the child."""
    child = Child()
    before = {number: signal.signal(number, child.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(options: Namespace, progress: Progress) -> int:
    """What the command line of `twoclocks run` asks for; its exit code. Raises TwoclocksError."""
    if options.resume and options.run_folder:
        raise TwoclocksError(f"--run-folder: the folder is that of --resume {options.resume}; leave one of them out")
    if options.run_folder:
        refuse_existing(options.run_folder)
    stored = read_levels(options.resume) if options.resume else None
    path = options.experiment or (Path(stored.experiment_file) if stored else default_experiment())
    overrides = list(options.set) or (stored.overrides if stored else [])
    overrides += [f"target.url={options.url}"] if options.url else []
    overrides += [f"load.users={options.users}"] if options.users else []
    if any(word.endswith("=***") for word in overrides):  # masked in sweep.json
        raise TwoclocksError(f"--resume {options.resume}: was begun with a secret in --set; give the same --set again")
    experiment = load_experiment(path, overrides)
    locust = locust_command(path, overrides, options.processes)
    if experiment.load.shape not in ("sweep", "search"):
        if options.resume:
            raise TwoclocksError(f"--resume: {path} is a single run, which cannot go on; leave --resume out")
        locust += ["--run-folder", options.run_folder] if options.run_folder else []
        locust += ["--no-report"] if options.no_report else []
        with passing_signals_on() as child:
            return child.run(locust)
    plan = (
        LevelRuns.resumed(options.resume, stored, experiment)
        if stored
        else LevelRuns.begun(experiment, path, overrides, options.run_folder)
    )
    with passing_signals_on() as child:
        plan.run(child, locust, progress)
        progress(f"{plan.levels.kind} ended: {plan.folder}")
        code = plan.exit_code()
        if options.no_report:
            return code
        reported = child.run([sys.executable, "-m", "twoclocks", "report", plan.folder])
    return code or reported


def default_experiment() -> Path:
    """configs/default.yaml where there is one; else an empty file, whose keys have their defaults."""
    path = ROOT / "configs" / "default.yaml"
    return path if path.exists() else Path(os.devnull)


def locust_command(path: Path, overrides: Sequence[str], processes: int) -> list[str | Path]:
    """Locust, headless, on the locustfile beside the package, in the current folder, or inside the package."""
    found = [file for file in (ROOT / "load_test.py", Path("load_test.py"), BUNDLED) if file.exists()]
    argv: list[str | Path] = [sys.executable, "-m", "locust", "-f", found[0], "--experiment", path]
    argv += ["--headless", "--only-summary"] + (["--processes", str(processes)] if processes > 1 else [])
    return argv + [word for override in overrides for word in ("--set", override)]


def read_levels(folder: Path) -> Levels:
    """sweep.json of a folder. Raises RunFolderError."""
    try:
        return msgspec.json.decode((folder / SWEEP_FILE).read_bytes(), type=Levels)
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: holds no {SWEEP_FILE}; give the folder of a sweep or a search") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{folder / SWEEP_FILE}: cannot be read: {' '.join(str(error).split())}") from None


class LevelRuns:
    """A sweep or a search while it is run: its folder, its file, and the levels that it has."""

    def __init__(self, folder: Path, experiment: Experiment, levels: Levels) -> None:
        self.folder, self.experiment, self.levels = folder, experiment, levels

    @classmethod
    def begun(
        cls, experiment: Experiment, path: Path, overrides: Sequence[str], folder: Path | None = None
    ) -> "LevelRuns":
        """In a new folder: see make_folder. Raises RunFolderError."""
        folder = make_folder(experiment, folder)
        load = experiment.load
        levels = Levels(
            kind=load.shape,
            name=experiment.name,
            over=load.sweep.over if load.shape == "sweep" else load.search.over,
            twoclocks_version=__version__,
            experiment_file=str(path),
            overrides=[masked_word(word) for word in overrides],
            started_at_unix=time.time(),
            planned=sweep_levels(load.sweep) if load.shape == "sweep" else [],
            rule=RULE if load.shape == "search" else "",
        )
        return cls(folder, experiment, levels)

    @classmethod
    def resumed(cls, folder: Path, stored: Levels, experiment: Experiment) -> "LevelRuns":
        """Where it was broken off. Raises TwoclocksError if the experiment is another one."""
        try:
            same = (folder / "experiment.yaml").read_text(encoding="utf-8") == to_yaml(experiment)
        except OSError as error:
            raise RunFolderError(f"{folder / 'experiment.yaml'}: cannot be read: {error.strerror}") from None
        if not same:
            raise TwoclocksError(
                f"--resume {folder}: was begun with another experiment; give the same file and --set as then"
            )
        return cls(folder, experiment, stored)

    def run(self, child: Child, locust: Sequence[str | Path], progress: Progress) -> None:
        """All levels that have not been run; what came of each is in sweep.json as soon as it has ended."""
        self.levels.status, self.child, self.locust, self.progress = "running", child, locust, progress
        if self.levels.kind == "sweep":
            values = self.levels.planned
            for number, value in enumerate(values, 1):
                if child.stopped.is_set():
                    break
                progress(f"level {number} of {len(values)}: {value:g} {UNITS[self.levels.over]}")
                self.level(number, Next(value))
            complete = all(level.status == "finished" for level in self.levels.levels)
            self.levels.status = "finished" if complete else "failed"
        else:
            self.levels.status = "finished" if self.search() else "failed"
        if child.stopped.is_set():
            self.levels.status = "interrupted"
        self.levels.ended_at_unix = time.time()
        self.save()

    def search(self) -> bool:
        """Probe after probe; False if one could not be run."""
        from twoclocks.evidence import evidence  # reads with pandas, which a single run is not to wait for

        search, probes = self.experiment.load.search, list[Probe]()
        seen: list[Evidence] = []  # at the last value
        for number in range(1, search.probes + 2):
            step = next_probe(search, probes)
            if isinstance(step, Found):
                self.levels.found = step
                self.progress(found_text(step, self.levels.over))
                return True
            if self.child.stopped.is_set():
                return False
            again = ", again and for twice as long" if step.longer else ""
            self.progress(f"probe {number} of at most {search.probes}: {step.value:g} {UNITS[search.over]}{again}")
            level = self.level(number, step)
            if level.status != "finished":
                return False
            seen = [*(seen if step.longer else []), evidence(self.folder / level.folder)]
            probe = judge(step.value, seen, self.experiment.slo.share)
            probes[-1 if step.longer else len(probes) :] = [probe]
            self.levels.probes = probes
            self.progress(probe_text(probe, self.experiment.slo.share))
            self.save()
        raise AssertionError("a search ends within its probes")

    def level(self, number: int, step: Next) -> Level:
        """The level of this number: what there is of it, if it came to its end, else a run."""
        levels, over = self.levels.levels, self.levels.over
        known = next((level for level in levels if level.number == number), None)
        if (
            known is not None
            and known.status == "finished"
            and (known.value, known.longer) == (step.value, step.longer)
        ):
            return known
        plan = self.experiment.load.sweep if self.levels.kind == "sweep" else self.experiment.load.search
        if self.child.stopped.wait(plan.pause_s if any(level.number < number for level in levels) else 0):
            return Level(number=number, over=over, value=step.value, folder="", status="interrupted")
        level = Level(number=number, over=over, value=step.value, folder=f"{number:02d}-{over}-{step.value:g}")
        level.longer, level.started_at_unix = step.longer, time.time()
        self.levels.levels = sorted([*(one for one in levels if one is not known), level], key=lambda one: one.number)
        if plan.reset != "none":
            level.reset = reset_server(self.experiment.target, plan.reset)
            if level.reset != "done":
                self.progress(f"{plan.reset}: {level.reset}; the level is run nevertheless")
        self.save()
        folder = self.folder / level.folder
        _put_aside(folder)
        level.exit_code = self.child.run([*self.locust, "--no-report", "--run-folder", folder, *self.settings(level)])
        level.ended_at_unix = time.time()
        level.status, level.error = self.outcome(folder)
        if level.error:
            self.progress(f"level {level.folder}: {level.error}")
        self.save()
        return level

    def settings(self, level: Level) -> list[str]:
        """What of the experiment is another in a level, as --set has it."""
        load = self.experiment.load
        settings = [f"load.shape={'ramp' if level.over == 'users' else 'rate'}"]
        settings.append(f"load.users={level.value:.0f}" if level.over == "users" else f"load.rate={level.value!r}")
        settings.append(f"load.duration_s={load.duration_s * (2 if level.longer else 1)!r}")
        settings.append(f"load.seed={load.seed + level.number - 1}")  # arrivals of another draw
        settings.append(f"name={level.folder}")
        return [word for setting in settings for word in ("--set", setting)]

    def outcome(self, folder: Path) -> tuple[str, str | None]:
        """What became of the run in this folder: (status of the level, why it is not finished)."""
        if not folder.exists():
            return "failed", "the run could not begin; see above"
        try:
            status = msgspec.json.decode((folder / "run.json").read_bytes())["status"]
        except (OSError, msgspec.MsgspecError, KeyError, TypeError):
            return "failed", "run.json cannot be read"
        if status == "finished":
            return "finished", None
        return ("interrupted" if self.child.stopped.is_set() else "failed"), f"the run is {status}"

    def save(self) -> None:
        """Replace sweep.json. Raises RunFolderError."""
        path = self.folder / SWEEP_FILE
        new = path.with_name(SWEEP_FILE + ".new")
        try:
            new.write_bytes(msgspec.json.format(msgspec.json.encode(self.levels), indent=1) + b"\n")
            new.replace(path)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None

    def exit_code(self) -> int:
        """0; 1: the SLO is not met at the lowest value; of a level that could not be run its own code, or 1."""
        if self.levels.status == "interrupted":
            return INTERRUPTED
        broken = [level.exit_code or 1 for level in self.levels.levels if level.status != "finished"]
        if broken:
            return broken[0]
        return 1 if self.levels.found is not None and self.levels.found.value is None else 0


UNITS = {"users": "users", "rate": "requests/s"}


def found_text(found: Found, over: str) -> str:
    """The result of a search, as one line."""
    unit = UNITS[over]
    if found.value is None:
        return f"no {over} found: {found.why}"
    upper = "no failure above it was seen" if found.failed is None else f"{found.failed:g} failed"
    return f"the SLO is met up to {found.value:g} {unit} ({upper}); {found.why}"


def probe_text(probe: Probe, required: float) -> str:
    """The judgement of a probe, as one line."""
    if probe.share is None or probe.low is None or probe.high is None:
        return f"{probe.value:g}: fail, no request was measured"
    share = (
        f"{probe.share:.1%} good of {probe.requests} (95 %: {probe.low:.1%} .. {probe.high:.1%}; {required:.1%} asked)"
    )
    return f"{probe.value:g}: {probe.judgement}, {share}"


def reset_server(target: Target, path: str) -> str:
    """Send the reset call: "done", or why not."""
    verify = tls_context(target.tls_verify, target.tls_cert)
    try:
        with httpx.Client(headers=request_headers(target), verify=verify, timeout=30) as client:
            response = client.post(base_url(target) + path)
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__})"
    return "done" if response.is_success else f"status {response.status_code}"


def _put_aside(folder: Path) -> None:
    """Keep what an earlier, broken run left where a new one is to stand."""
    number = 1
    while folder.exists():
        aside = folder.with_name(f"{folder.name}-broken-{number}")
        if not aside.exists():
            folder.rename(aside)
        number += 1
