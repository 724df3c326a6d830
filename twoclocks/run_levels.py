"""A sweep or a search: Locust as a child process, once for each level.

A level is a run like any other, with a folder of its own; `sweep.json` beside them says which there are. What a level
showed is read from its folder, so that a sweep or search that was broken off goes on where it was.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec

from twoclocks import __version__
from twoclocks.child import INTERRUPTED, Child, Progress, outcome, put_aside, refuse_another, save_json
from twoclocks.errors import RunFolderError
from twoclocks.experiment import Experiment, Target
from twoclocks.fetch import fetch
from twoclocks.levels import RULE, Evidence, Found, Next, Probe, judge, next_probe, sweep_levels
from twoclocks.masks import masked_word
from twoclocks.run_folder import beside, make_folder
from twoclocks.target import MAX_ANSWER_BYTES, control_client
from twoclocks.units import held_against

SWEEP_FILE = "sweep.json"
RESET_S = 30.0


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


def read_levels(folder: Path) -> Levels:
    """sweep.json of a folder. Raises RunFolderError."""
    try:
        levels = msgspec.json.decode((folder / SWEEP_FILE).read_bytes(), type=Levels)
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: holds no {SWEEP_FILE}; give the folder of a sweep or a search") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{folder / SWEEP_FILE}: cannot be read: {' '.join(str(error).split())}") from None
    beside(folder / SWEEP_FILE, [level.folder for level in levels.levels])
    return levels


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
        refuse_another(folder, experiment)
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
        put_aside(folder)
        level.exit_code = self.child.run(
            [*self.locust, "--without-tables", "--no-report", "--run-folder", folder, *self.settings(level)]
        )
        level.ended_at_unix = time.time()
        level.status, level.error = outcome(folder, stopped=self.child.stopped.is_set())
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

    def save(self) -> None:
        """Replace sweep.json. Raises RunFolderError."""
        save_json(self.folder / SWEEP_FILE, self.levels)

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
    share, asked = held_against(probe.share, required)
    interval = f"95 %: {probe.low:.1%} .. {probe.high:.1%}; {asked} asked"
    return f"{probe.value:g}: {probe.judgement}, {share} good of {probe.requests} ({interval})"


def reset_server(target: Target, path: str) -> str:
    """Send the reset call: "done", or why not."""
    try:
        with control_client(target, RESET_S) as client:
            status, _ = fetch(client, path, method="POST", max_bytes=MAX_ANSWER_BYTES, seconds=RESET_S)
    except (httpx.HTTPError, ValueError) as error:
        return f"no answer ({type(error).__name__})"
    return "done" if 200 <= status < 300 else f"status {status}"
