"""`twoclocks run` of a study: its servers started, its cells run one after the other, study.json kept up to date.

A cell that has come to its end is not run again by --resume. Which cells there are stands in study.py.
"""

import contextlib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from twoclocks import __version__
from twoclocks.child import (
    INTERRUPTED,
    Child,
    Progress,
    outcome,
    put_aside,
    refuse_another,
    run_command,
    save_json,
)
from twoclocks.errors import ExperimentError, TargetError
from twoclocks.experiment import Experiment, load_experiment
from twoclocks.masks import masked_word
from twoclocks.run_folder import make_folder
from twoclocks.run_levels import LevelRuns
from twoclocks.start import check, served
from twoclocks.study import STUDY_FILE, Cell, Skipped, Study, cells
from twoclocks.target import resolve
from twoclocks.workload import load_workload


class StudyRuns:
    """A study while it is run: its folder, its file, its servers, and the cells that it has."""

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        path: Path,
        overrides: Sequence[str],
        study: Study,
    ) -> None:
        self.folder, self.experiment, self.path, self.overrides, self.study = folder, experiment, path, overrides, study

    @classmethod
    def begun(
        cls, experiment: Experiment, path: Path, overrides: Sequence[str], folder: Path | None = None
    ) -> "StudyRuns":
        """In a new folder. Raises TwoclocksError for what no cell could be run with, before anything is made."""
        study = Study(
            name=experiment.name,
            twoclocks_version=__version__,
            experiment_file=str(path),
            overrides=[masked_word(word) for word in overrides],
            order=experiment.order,
            repeats=experiment.repeats,
            targets=[str(one["name"]) for one in experiment.targets],
            variants=[one.name for one in experiment.variants],
            started_at_unix=time.time(),
        )
        runs = runs_of(experiment, path, overrides)
        study.skipped = missing_targets(experiment, runs)
        absent = {one.target for one in study.skipped}
        study.cells = [cell for cell in cells(experiment) if cell.target not in absent]
        if not study.cells:
            raise TargetError(f"{path}: none of its targets can be had; the first: {study.skipped[0].why}")
        return cls(make_folder(experiment, folder), experiment, path, overrides, study)

    @classmethod
    def resumed(
        cls, folder: Path, stored: Study, experiment: Experiment, path: Path, overrides: Sequence[str]
    ) -> "StudyRuns":
        """Where it was broken off. Raises TwoclocksError if the experiment is another one."""
        refuse_another(folder, experiment)
        runs_of(experiment, path, overrides)
        return cls(folder, experiment, path, overrides, stored)

    def run(self, child: Child, processes: int, progress: Progress) -> int:
        """All cells that have not come to their end; the exit code."""
        study, self.child, self.progress = self.study, child, progress
        study.status = "running"
        for one in study.skipped:
            progress(f"{one.target} is left out: {one.why}")
        absent: set[str] = set()  # targets whose server could not be started
        with contextlib.ExitStack() as servers, contextlib.suppress(KeyboardInterrupt):  # while a server starts
            running: dict[bytes, list[str]] = {}  # what was asked to be started -> Locust's options that lead there
            for cell in study.cells:
                if child.stopped.is_set():
                    break
                if cell.status == "finished" or cell.target in absent:
                    continue
                progress(f"run {cell.number} of {len(study.cells)}: {in_words(cell)}")
                try:
                    self.cell(cell, self.server(servers, running, cell), processes)
                except TargetError as error:
                    absent.add(cell.target)
                    self.absent(cell, error)
                    progress(f"{in_words(cell)}: {error}")
                self.save()
        complete = all(cell.status == "finished" for cell in study.cells)
        study.status = "interrupted" if child.stopped.is_set() else "finished" if complete else "failed"
        study.ended_at_unix = time.time()
        self.save()
        if study.status == "interrupted":
            return INTERRUPTED
        return next((cell.exit_code or 1 for cell in study.cells if cell.status != "finished"), 0)

    def server(self, servers: contextlib.ExitStack, running: dict[bytes, list[str]], cell: Cell) -> list[str]:
        """See that the server of a cell runs, if it is ours to start; the options of Locust that lead a run to it."""
        experiment = self.experiment_of(cell)
        if experiment.target.start is None:
            return []
        asked = msgspec.json.encode([cell.target, experiment.target.start])
        if asked not in running:
            if self.study.order == "in-turn" or not self.experiment.keep_started:
                servers.close()
                running.clear()
            log_path = self.folder / f"{cell.folder}.server.log"
            started = served(experiment, log_path, self.progress, stopped=self.child.stopped)
            _, running[asked] = servers.enter_context(started)
        return running[asked]

    def experiment_of(self, cell: Cell, settings: Sequence[str] = ()) -> Experiment:
        """The experiment of a cell, with further settings."""
        return load_experiment(
            self.path, [*self.overrides, *settings], target=cell.target or None, variant=cell.variant or None
        )

    def cell(self, cell: Cell, more: Sequence[str], processes: int) -> None:
        """Run one, into its folder; what an earlier attempt left there is put aside."""
        place = self.folder / cell.folder
        put_aside(place)
        cell.status, cell.started_at_unix, cell.error = "running", time.time(), None
        self.save()
        name = " ".join(name for name in (cell.target, cell.variant) if name)
        settings = [word for option, word in pairwise(more) if option == "--set"]
        overrides = [*self.overrides, *settings, *([f"name={name}"] if name else [])]
        started = list(more[: more.index("--set")]) if more else []  # --started and its file
        experiment = self.experiment_of(cell, overrides)
        chosen = {"target": cell.target or None, "variant": cell.variant or None}
        command = run_command(
            self.path, overrides, **chosen, processes=processes, api=experiment.target.api, tables=False
        )
        if experiment.load.shape in ("sweep", "search"):
            levels = LevelRuns.begun(experiment, self.path, overrides, place)
            levels.run(self.child, [*command, *started], self.progress)
            cell.exit_code = levels.exit_code()
        else:
            cell.exit_code = self.child.run([*command, *started, "--no-report", "--run-folder", place])
        cell.ended_at_unix = time.time()
        cell.status, cell.error = outcome(place, stopped=self.child.stopped.is_set())

    def absent(self, cell: Cell, error: TargetError) -> None:
        """Its server could not be started, so that there is no run of it, nor of the same target later."""
        for one in self.study.cells:
            if one.target == cell.target and one.number >= cell.number and one.status != "finished":
                one.status, one.error = "failed", str(error)
                one.exit_code, one.ended_at_unix = error.exit_code, time.time()

    def save(self) -> None:
        """Replace study.json. Raises RunFolderError."""
        save_json(self.folder / STUDY_FILE, self.study)


def runs_of(experiment: Experiment, path: Path, overrides: Sequence[str]) -> dict[tuple[str, str], Experiment]:
    """The experiment of each target and variant. Raises ExperimentError for the first that cannot be used, or whose
    prompts cannot.
    """
    targets = [str(one["name"]) for one in experiment.targets] or [""]
    variants = [one.name for one in experiment.variants] or [""]
    runs = {
        (target, variant): load_experiment(path, overrides, target=target or None, variant=variant or None)
        for target in targets
        for variant in variants
    }
    # once each: a file of prompts may be large
    for run in {msgspec.json.encode((run.workload, run.target.api)): run for run in runs.values()}.values():
        load_workload(run)
    return runs


def missing_targets(experiment: Experiment, runs: dict[tuple[str, str], Experiment]) -> list[Skipped]:
    """Targets that cannot be had, if `missing: skip` lets a study go on without them; else the first one's TargetError.

    Before anything is started: of a server that is to be started what can be known is found out, any other one is
    asked for its model.
    """
    skipped = []
    for target in dict.fromkeys(name for name, _ in runs):
        settings = next(run.target for (name, _), run in runs.items() if name == target)
        try:
            if settings.start is not None:
                check(settings.start)
            else:
                resolve(settings)
        except (TargetError, ExperimentError) as error:
            if experiment.missing == "stop":
                raise type(error)(f"target {target}: {error}" if target else str(error)) from None
            skipped.append(Skipped(target, str(error)))
    return skipped


def in_words(cell: Cell) -> str:
    """A cell, as a person calls it."""
    return ", ".join([*(name for name in (cell.target, cell.variant) if name), f"repeat {cell.repeat}"])
