"""A study: the same load on several targets, in several ways, several times, and in which order. Pure.

Each run of it is a cell: one target, one variant, one repeat. `study.json` in the study's folder says which cells there
are and what became of them; the folder of each lies beside it. run_study.py makes them, study_report.py reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from twoclocks.errors import RunFolderError
from twoclocks.experiment import Experiment
from twoclocks.run_folder import beside, file_name

STUDY_FILE = "study.json"


class Cell(msgspec.Struct, kw_only=True):
    """A run of a study, as it stands in study.json."""

    number: int  # in the order in which they are run, from 1
    target: str  # "" if the study has one target only
    variant: str = ""  # "" if the study has none
    repeat: int = 1
    folder: str  # beside study.json
    status: str = "planned"  # planned | running | finished | failed | interrupted
    exit_code: int | None = None
    error: str | None = None
    started_at_unix: float | None = None
    ended_at_unix: float | None = None


class Skipped(msgspec.Struct, frozen=True):
    """A target that was not there."""

    target: str
    why: str


class Study(msgspec.Struct, kw_only=True):
    """study.json."""

    kind: Literal["study"] = "study"
    name: str
    twoclocks_version: str
    experiment_file: str
    overrides: list[str]  # secrets masked
    order: str
    repeats: int
    targets: list[str]
    variants: list[str]
    status: str = "running"  # finished | interrupted | failed
    started_at_unix: float = 0.0
    ended_at_unix: float | None = None
    skipped: list[Skipped] = []
    cells: list[Cell] = []


def cells(experiment: Experiment) -> list[Cell]:
    """All runs of a study, in the order in which they are made.

    in-turn: one target after the other, all that is asked of it at a stretch. abba: every repeat visits all targets,
    every second one the other way round (A B, B A, A B, ...), so that a drift of the machine meets all of them alike.
    Within a visit the variants follow one another, in every second repeat from the last to the first.
    """
    targets = [str(one["name"]) for one in experiment.targets] or [""]
    variants = [one.name for one in experiment.variants] or [""]
    repeats = range(1, experiment.repeats + 1)
    if experiment.order == "in-turn":
        visits = [(target, repeat) for target in targets for repeat in repeats]
    else:
        visits = [(target, repeat) for repeat in repeats for target in _turned(targets, repeat)]
    order = [(target, variant, repeat) for target, repeat in visits for variant in _turned(variants, repeat)]
    return [
        Cell(
            number=number,
            target=target,
            variant=variant,
            repeat=repeat,
            folder=_folder(number, target, variant, f"r{repeat}" if experiment.repeats > 1 else ""),
        )
        for number, (target, variant, repeat) in enumerate(order, 1)
    ]


def _turned(names: list[str], repeat: int) -> list[str]:
    return names if repeat % 2 else names[::-1]


def _folder(number: int, *names: str) -> str:
    words = [file_name(name, 60) for name in names if name]
    return "-".join([f"{number:02d}", *words])


def read_study(folder: Path) -> Study:
    """study.json of a folder. Raises RunFolderError."""
    try:
        study = msgspec.json.decode((folder / STUDY_FILE).read_bytes(), type=Study)
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: holds no {STUDY_FILE}; give the folder of a study") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{folder / STUDY_FILE}: cannot be read: {' '.join(str(error).split())}") from None
    beside(folder / STUDY_FILE, [cell.folder for cell in study.cells])
    return study


def finished(study: Study) -> Sequence[Cell]:
    """The cells that can be read, in the order in which they were run."""
    return [cell for cell in study.cells if cell.status == "finished"]
