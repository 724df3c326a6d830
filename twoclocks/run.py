"""`twoclocks run`: one run, the levels of a sweep or a search, or the cells of a study."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from twoclocks.child import Child, Progress, alone_in, default_experiment, passing_signals_on, run_command
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment, is_study, load_experiment
from twoclocks.hosts import agree, agreed_hosts, somebody_is_there
from twoclocks.run_folder import free_folder, refuse_existing
from twoclocks.run_levels import SWEEP_FILE, LevelRuns, Levels, read_levels
from twoclocks.run_study import StudyRuns
from twoclocks.start import Plan, check, served
from twoclocks.study import STUDY_FILE, Study, read_study


def run(options: Namespace, progress: Progress) -> int:
    """What the command line asks for; its exit code. Raises TwoclocksError."""
    if options.resume and options.run_folder:
        raise TwoclocksError(f"--run-folder: the folder is that of --resume {options.resume}; leave one of them out")
    if options.run_folder:
        refuse_existing(options.run_folder)
    stored = _stored(options.resume) if options.resume else None
    path = options.experiment or (Path(stored.experiment_file) if stored else default_experiment())
    overrides = list(options.set) or (stored.overrides if stored else [])
    overrides += [] if options.url is None else [f"target.url={options.url}"]
    overrides += [] if options.users is None else [f"load.users={options.users}"]
    if any(word.endswith("=***") for word in overrides):  # masked in what is stored
        raise TwoclocksError(f"--resume {options.resume}: was begun with a secret in --set; give the same --set again")
    experiment = load_experiment(path, overrides, target=options.target, variant=options.variant)
    if options.url is not None and experiment.target.start is not None:
        raise TwoclocksError(
            "--url: target.start starts a server of its own; leave --url out, or --set target.start=null"
        )
    for url in _urls(experiment):  # where nobody is there, the runs say it
        agree(url, agreed_hosts(), yes=options.yes, interactive=somebody_is_there(), say=lambda _: None)
    server = None  # checked while Ctrl-C still ends this process at once
    if experiment.target.start is not None and not is_study(experiment):
        server = check(experiment.target.start)
    with passing_signals_on() as child:
        if is_study(experiment):
            return _study(options, experiment, path, overrides, stored, child, progress)
        if experiment.load.shape in ("sweep", "search"):
            return _levels(options, experiment, path, overrides, stored, child, progress, server)
        if options.resume:
            raise TwoclocksError(f"--resume: {path} is a single run, which cannot go on; leave --resume out")
        return _single(options, experiment, path, overrides, child, progress, server)


def _urls(experiment: Experiment) -> set[str]:
    """Where all of its runs send load."""
    named = [one.get("url") for one in experiment.targets]
    named += [one.set.get("target.url") for one in experiment.variants]
    return {experiment.target.url, *(url for url in named if isinstance(url, str))}


def _stored(folder: Path) -> Study | Levels:
    """What is to be gone on with. Raises RunFolderError."""
    if (folder / STUDY_FILE).exists() and not (folder / SWEEP_FILE).exists():
        return read_study(folder)
    return read_levels(folder)


def _command(options: Namespace, experiment: Experiment, path: Path, overrides: list[str]) -> list[str | Path]:
    chosen = {"target": options.target, "variant": options.variant}
    return run_command(path, overrides, **chosen, processes=options.processes, api=experiment.target.api)


def _single(
    options: Namespace,
    experiment: Experiment,
    path: Path,
    overrides: list[str],
    child: Child,
    progress: Progress,
    server: Plan | None,
) -> int:
    folder = options.run_folder or (free_folder(experiment) if server else None)  # the server's log stands beside it
    command = _command(options, experiment, path, overrides)
    command += ["--run-folder", folder] if folder else []
    command += ["--no-report"] if options.no_report else []
    with served(experiment, Path(f"{folder}.server.log"), progress, plan=server, stopped=child.stopped) as (_, more):
        return child.run([*command, *more])


def _levels(
    options: Namespace,
    experiment: Experiment,
    path: Path,
    overrides: list[str],
    stored: Study | Levels | None,
    child: Child,
    progress: Progress,
    server: Plan | None,
) -> int:
    if isinstance(stored, Study):
        raise TwoclocksError(f"--resume {options.resume}: is a study; leave --target and --variant out")
    plan = (
        LevelRuns.resumed(options.resume, stored, experiment)
        if stored
        else LevelRuns.begun(experiment, path, overrides, options.run_folder)
    )
    log = plan.folder / f"server-{1 + len(list(plan.folder.glob('server-*.log')))}.log"  # --resume starts another one
    with alone_in(plan.folder):
        plan.save()  # so that --resume goes on also where the server does not come up
        try:
            with served(experiment, log, progress, plan=server, stopped=child.stopped) as (there, more):
                plan.experiment = there
                plan.run(child, [*_command(options, experiment, path, overrides), *more], progress)
        except (KeyboardInterrupt, TwoclocksError) as error:
            plan.levels.status = "interrupted" if child.stopped.is_set() else "failed"
            plan.save()
            if isinstance(error, TwoclocksError):
                raise
    progress(f"{plan.levels.kind} ended: {plan.folder}")
    return _reported(options, plan.folder, child, plan.exit_code(), progress)


def _study(
    options: Namespace,
    experiment: Experiment,
    path: Path,
    overrides: list[str],
    stored: Study | Levels | None,
    child: Child,
    progress: Progress,
) -> int:
    if isinstance(stored, Levels):
        raise TwoclocksError(f"--resume {options.resume}: is no study; give the experiment that it was begun with")
    plan = (
        StudyRuns.resumed(options.resume, stored, experiment, path, overrides)
        if stored
        else StudyRuns.begun(experiment, path, overrides, options.run_folder)
    )
    with alone_in(plan.folder):
        code = plan.run(child, options.processes, progress)
    progress(f"study ended: {plan.folder}")
    return _reported(options, plan.folder, child, code, progress)


def _reported(options: Namespace, folder: Path, child: Child, code: int, progress: Progress) -> int:
    """Build the report, unless it is left for later; the exit code of all."""
    if child.stopped.is_set():
        words = ["twoclocks", "run", "--resume", str(folder)]
        for name in ("target", "variant"):
            words += [f"--{name}", chosen] if (chosen := getattr(options, name)) else []
        words += ["--processes", str(options.processes)] if options.processes != 1 else []
        progress(
            f"interrupted; what was measured is kept: `{shlex.join(['twoclocks', 'report', str(folder)])}` shows it, "
            f"`{shlex.join(words)}` goes on"
        )
        return code
    if options.no_report:
        return code
    reported = child.run([sys.executable, "-m", "twoclocks", "report", folder])
    return code or reported
