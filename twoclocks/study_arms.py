"""Study arms: the folder of a study -> its arms (a target and a variant, all repeats), read once, repeats pooled.

Repeats are pooled as raw requests: no percentile is ever averaged. A cell that cannot be read stays out, with why.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import curves, metrics, report, samples
from twoclocks.calibration import calibration_of, error_bars
from twoclocks.errors import TwoclocksError
from twoclocks.expositions import Scrapes
from twoclocks.figures import arrived
from twoclocks.load import Run, load_run
from twoclocks.metrics import Floats
from twoclocks.run_levels import SWEEP_FILE
from twoclocks.study import Cell, Study

MOST = {"output_throughput": "tokens_per_s", "request_throughput": "achieved"}
"""Throughput -> the column of a sweep's levels that holds it."""


@dataclass(frozen=True)
class Pooled:
    """The requests of all repeats of an arm, as one table; ``repeat`` in it is the place of the run they are from, and
    ``drawn_with`` the same number for requests that an interval takes together.
    """

    shown_name: str
    measured: pd.DataFrame
    gaps: metrics.Gaps  # of the requests that ended ok; their rows are those of ``measured``
    scrapes: list[Scrapes]  # of all repeats
    first_scrapes: list[int]

    @property
    def ok(self) -> pd.DataFrame:
        """The measured requests that ended ok."""
        return self.measured[self.measured["status"] == "ok"]


@dataclass
class Arm:
    """All finished cells of one target and variant, in the order in which they were run."""

    target: str
    variant: str
    name: str  # how tables and figures call it
    cells: list[Cell] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # one a cell; none where the cells are sweeps
    summaries: list[dict[str, Any]] = field(default_factory=list)  # of the same runs
    sweeps: list[dict[str, Any]] = field(default_factory=list)  # summaries of curves, one a cell
    tops: list[dict[str, Floats]] = field(default_factory=list)  # of each sweep: MOST -> blocks of the level with most
    metas: list[dict[str, Any]] = field(default_factory=list)  # run.json of each run, or of each level of the sweeps

    @property
    def error_bars(self) -> dict[str, float]:
        """The instrument's own error, seconds, by metric: the largest of the repeats that have a calibration."""
        found: dict[str, float] = {}
        for calibration in map(calibration_of, self.runs):
            for name, bar in error_bars(calibration).items() if calibration else ():
                found[name] = max(bar, found.get(name, 0.0))
        return found

    @property
    def experiment(self) -> dict[str, Any]:
        """The experiment of its first run; of sweeps, nothing."""
        return self.runs[0].experiment if self.runs else {}


def read_arms(folder: Path, study: Study, progress: Callable[[str], None]) -> tuple[list[Arm], dict[int, str]]:
    """The arms in the order of targets and variants, each cell's own report built; and number of a cell -> why not."""
    arms = {
        (target, variant): Arm(target, variant, arm_name(study, target, variant))
        for target in study.targets or [""]
        for variant in study.variants or [""]
    }
    unreadable: dict[int, str] = {}
    for cell in sorted(study.cells, key=lambda cell: (cell.started_at_unix or 0.0, cell.number)):
        if cell.status != "finished":
            continue
        arm = arms.setdefault((cell.target, cell.variant), Arm(cell.target, cell.variant, cell.target or cell.variant))
        try:
            _read(folder / cell.folder, arm, progress)
            arm.cells.append(cell)
        except TwoclocksError as error:
            unreadable[cell.number] = str(error)
    return list(arms.values()), unreadable


def arm_name(study: Study, target: str, variant: str) -> str:
    """How an arm is called: what tells it from the others of its study."""
    parts = [target if len(study.targets) > 1 or not variant else "", variant]
    return ", ".join(part for part in parts if part) or study.name


def _drawn_with(table: pd.DataFrame, arm: Arm) -> metrics.Ints:
    """What a request shares with others that chance befell with it: its batch; otherwise each is on its own."""
    if (arm.experiment.get("load") or {}).get("shape") != "batch":
        return np.arange(len(table), dtype=np.int64)
    return table.groupby(["worker", "intended_at"]).ngroup().to_numpy().astype(np.int64)


def pooled(arm: Arm) -> Pooled:
    """The requests of all repeats of an arm. Request rows are numbered anew."""
    tables, gaps, before = [], [], 0
    for repeat, run in enumerate(arm.runs):
        table = run.measured.copy()
        place = np.full(len(run.requests), -1, dtype=np.int64)
        place[table.index.to_numpy()] = np.arange(len(table)) + before
        gaps.append(replace_rows(run.gaps, place))
        table["repeat"] = repeat
        table["drawn_with"] = _drawn_with(table, arm) + before
        tables.append(table)
        before += len(table)
    empty = metrics.Gaps(np.array([], dtype=np.int32), np.array([]), np.array([]))
    columns = zip(*((one.request, one.seconds, one.tokens) for one in gaps or [empty]), strict=True)
    return Pooled(
        arm.name,
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(),
        metrics.Gaps(*(np.concatenate(column) for column in columns)),
        [scrapes for run in arm.runs for scrapes in run.scrapes],
        [first for run in arm.runs for first in run.first_scrapes],
    )


def replace_rows(gaps: metrics.Gaps, place: Any) -> metrics.Gaps:
    """The same gaps with the rows of their requests as ``place`` has them."""
    return replace(gaps, request=place[gaps.request].astype(np.int32))


def _read(folder: Path, arm: Arm, progress: Callable[[str], None]) -> None:
    if (folder / SWEEP_FILE).exists():
        sweep = curves.build(folder, progress).summary
        levels = [row["folder"] for row in sweep["levels"] if row.get("achieved") is not None]
        arm.metas += [json.loads((folder / level / "run.json").read_bytes()) for level in levels]  # read before: sound
        arm.tops.append(
            {name: top for name, key in MOST.items() if (top := _top(folder, sweep, name, key)) is not None}
        )
        arm.sweeps.append(sweep)
        return
    summary = report.build(folder, progress).summary
    run = load_run(folder)
    arm.runs.append(run)
    arm.metas.append(run.meta)
    arm.summaries.append(summary)


def blocks(run: Run, count: int | None = None) -> dict[str, Floats]:
    """Output tokens/s, and requests/s that ended ok, in ``count`` parts of the window, else as `samples.stretches`."""
    start, end = run.window
    if not end > start:
        return {}
    ended = run.ok["ended_at"].to_numpy(dtype=np.float64)
    return {
        "output_throughput": samples.rates(run, *arrived(run), count),
        "request_throughput": samples.rates(run, ended, np.ones(len(ended)), count),
    }


def _top(folder: Path, sweep: dict[str, Any], name: str, key: str) -> Floats | None:
    """The blocks of the level with the most of one throughput."""
    told = [row for row in sweep["levels"] if row.get(key) is not None]
    if not told:
        return None
    best = max(told, key=lambda row: row[key])
    return blocks(load_run(folder / best["folder"])).get(name)
