"""Compare: run folders -> one report with all of them side by side, their differences, and how sure these are."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import __version__, foreign, gate, headline, intervals, junit, metrics, rosetta, rosetta_text, samples
from twoclocks.charts import charts
from twoclocks.clocks import CLOCKS
from twoclocks.compare_text import DIFFERENCES, OTHERS, interval, percent
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.load import Run, load_run
from twoclocks.metrics import definition, distribution, slo_limits
from twoclocks.plots import violins
from twoclocks.report import VIOLIN, Report, complete, page, picture, write_json
from twoclocks.samples import Sample
from twoclocks.study import STUDY_FILE, finished, read_study
from twoclocks.summary import clean
from twoclocks.verdict import verdict
from twoclocks.wording import TOTALS

ROWS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ttft": ("TTFT", metrics.ttft),
    "tpot": ("TPOT", metrics.tpot),
    "itl_mean": ("mean ITL of a request", metrics.chunk_gaps),
    "e2e": ("E2E", metrics.e2e),
}
"""Metric -> its name and where the client's definition stands; the server's figures of the same name come after it."""
INTERVAL = (
    "Difference: this side's figure - the first side's. Interval: 95 %, by bootstrap "
    f"({intervals.RESAMPLES} draws, seed {intervals.SEED}). Where both sides sent the same {samples.PROMPTS} prompts "
    "or more it is paired: both are drawn with the same prompts, so that what makes one prompt slower than another "
    "cancels out. Difference and interval are then of the prompts that both answered, while the figures side by side "
    "are of all requests. Of one or two runs a side an interval tells how far chance among these requests reaches, not "
    f"what another day would bring; from {intervals.REPEATS} repeats a side on, what runs scatter is in it. Requests "
    "that queue behind each other are not wholly independent, so that an interval under heavy load is rather too "
    "narrow. None is given of fewer than "
    f"{', '.join(f'{intervals.least(name)} ({name})' for name in DIFFERENCES)} requests."
)
MANY_INTERVALS = (
    "The intervals stand each for itself and are not corrected for their number: with nothing changed at all, about "
    "one in 20 of them leaves out zero by chance. What you set out to find, ask with a --gate."
)
_SAME_WORK = ("workload.", "load.", "warmup.", "target.api")
_NOT_COMPARED = ("name", "output", "labels")


def compare(
    folders: Sequence[str | Path],
    out: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    *,
    versus: Sequence[str | Path] = (),
    gates: Sequence[str] = (),
    junit_file: Path | None = None,
    allow_undecided: bool = False,
) -> Report:
    """The comparison of two or more runs, written to ``out`` or to compare-A-vs-B beside the first.

    With ``versus``, ``folders`` are the repeats of one side and these are those of the other. A study's folder stands
    for its runs: one side a target and variant. A file is the result of another load tester (foreign.read), and is held
    against each run by that tool's definitions. ``gates``: see gate.parse; each is asked of every side but the first.
    Raises TwoclocksError for fewer than two sides or a gate that cannot be read, RunFolderError for what is no run.
    """
    asked = [gate.parse(text) for text in dict.fromkeys(gates)]
    results = [one for path in map(Path, folders) if path.is_file() for one in foreign.read(path)]
    named = _sides([path for path in folders if not Path(path).is_file()], bool(versus))
    named += _sides(versus, bool(versus))
    if len(named) < (2 if asked or not results else 1):
        raise TwoclocksError(
            "a comparison needs two run folders or more, such as: twoclocks compare output/A output/B; or one, and a "
            "result file of another tool, of which no gate can be asked"
        )
    sides = []
    for name, paths in named:
        progress(f"reading {', '.join(map(str, paths))}")
        sides.append(Side(name, [load_run(path) for path in paths]))
    sides = short_names(sides)
    parts = [*(side.folder for side in sides), *(one.tool.split()[0] for one in results)]
    out = out or sides[0].runs[0].path.resolve().parent / ("compare-" + "-vs-".join(dict.fromkeys(parts)))
    progress("computing the differences")
    judged, summary = _judged(asked, sides), _differences(sides)
    summary["gates"] = [gate.as_row(one) for one in judged]
    summary["others"] = [_beside(one, sides) for one in results]
    title = " vs ".join([*(side.name for side in sides), *(one.name for one in results)])
    try:
        if junit_file is not None:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
            junit_file.parent.mkdir(parents=True, exist_ok=True)
            junit_file.write_text(junit.junit(judged, allow_undecided, now), encoding="utf-8")
        (out / "plots").mkdir(parents=True, exist_ok=True)
        write_json(out / "summary.json", summary)
        progress("drawing the violins")
        violins([run for side in sides for run in side.runs], out / VIOLIN, title)
        html = out / "report.html"
        html.write_text(_html(sides, summary, title, picture(out / VIOLIN)), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    return Report(summary, html, out / VIOLIN)


def _html(sides: Sequence["Side"], summary: dict[str, Any], title: str, violin: str) -> str:
    drawn = charts([run for side in sides for run in side.runs], summary["runs"])
    return page(
        "compare.html",
        data=drawn,
        charts=drawn,
        summary=summary,
        headlines=headline.columns(summary["runs"]),
        title=title,
        violin=violin,
        totals=TOTALS,
        percent=percent,
        interval=interval,
        names=DIFFERENCES,
        unknown_error=gate.UNKNOWN_ERROR,
        others_remark=OTHERS,
        headings=rosetta_text.HEADINGS,
    )


@dataclass(frozen=True)
class Side:
    """A run, or several repeats of one."""

    name: str
    runs: list[Run]

    @property
    def folder(self) -> str:
        """A name for a folder."""
        return self.runs[0].name + ("" if len(self.runs) == 1 else f"-and-{len(self.runs) - 1}-more")


def _beside(result: foreign.Result, sides: Sequence[Side]) -> dict[str, Any]:
    """Another tool's result, and every run by that tool's definitions."""
    tool = rosetta.TOOLS[result.tool]
    runs = [run for side in sides for run in side.runs if not run.in_process]
    ours = [(run.shown_name, tool(rosetta.arrivals(run), slo_limits(run.experiment))) for run in runs]
    found: dict[str, Any] = clean(foreign.beside(result, ours))
    return found


def _sides(folders: Sequence[str | Path], together: bool) -> list[tuple[str, list[Path]]]:
    """Name and run folders of each side; of ``together`` one side."""
    found: list[tuple[str, list[Path]]] = []
    for folder in map(Path, folders):
        if (folder / STUDY_FILE).exists():
            found += _of_study(folder)
        else:
            found.append((folder.resolve().name, [folder]))
    if together and found:
        paths = [path for _, of_side in found for path in of_side]
        return [(repeats_name(found[0][0], len(paths)), paths)]
    return found


def _of_study(folder: Path) -> list[tuple[str, list[Path]]]:
    study = read_study(folder)
    cells: dict[tuple[str, str], list[Path]] = {}
    for cell in finished(study):
        cells.setdefault((cell.target, cell.variant), []).append(folder / cell.folder)
    if not cells:
        raise RunFolderError(f"{folder}: this study has no run that finished")
    of_one = len(cells) == 1
    return [
        (repeats_name(folder.resolve().name if of_one else " ".join(filter(None, names)), len(paths)), paths)
        for names, paths in cells.items()
    ]


def repeats_name(name: str, count: int) -> str:
    """How a side is called."""
    return name if count == 1 else f"{name} ({count} repeats)"


def short_names(sides: Sequence[Side]) -> list[Side]:
    """The same sides, called by their experiments where these tell them apart; else by their folders."""
    names = [str(side.runs[0].experiment.get("name") or "") for side in sides]
    if any(len(side.runs) > 1 for side in sides) or not all(names) or len(set(names)) < len(names):
        return list(sides)
    return [
        Side(name, [replace(run, short_name=name) for run in side.runs])
        for name, side in zip(names, sides, strict=True)
    ]


def differences(runs: Sequence[Run]) -> dict[str, Any]:
    """Every figure of a comparison; the keys are those of its summary.json. Seconds."""
    return _differences([Side(run.shown_name, [run]) for run in runs])


def _differences(sides: Sequence[Side]) -> dict[str, Any]:
    runs = [run for side in sides for run in side.runs]
    differing = settings_differ(runs)
    bars = [samples.error_bar(side.runs) for side in sides]
    return {
        "twoclocks_version": __version__,
        "sides": [{"name": side.name, "runs": [run.name for run in side.runs]} for side in sides],
        "runs": [complete(run) for run in runs],
        "gates": [],
        "others": [],
        "gate_definition": gate.DEFINITION,
        "interval_definition": INTERVAL,
        "many_intervals": MANY_INTERVALS,
        "rows": [row for metric in ROWS for row in _both_sides(sides, bars, metric)],
        "settings_differ": differing,
        "load_differs": [row["key"] for row in differing if row["key"].startswith(_SAME_WORK)],
    }


def _judged(gates: Sequence[gate.Gate], sides: Sequence[Side]) -> list[gate.Judged]:
    """Each gate, of every side but the first."""
    if not gates:
        return []
    first, *others = sides
    bars = [samples.error_bar([*first.runs, *other.runs]) for other in others]
    invalid = [[run.shown_name for run in side.runs if verdict(run)["level"] == "INVALID"] for side in sides]
    return [
        gate.judge(one, first.runs, other.runs, names=(first.name, other.name), bars=bar, invalid=[*invalid[0], *bad])
        for one in gates
        for other, bar, bad in zip(others, bars, invalid[1:], strict=True)
    ]


def settings_differ(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings, versions and hosts that are not the same in all runs."""
    told = ("host", "versions", "target")
    flat = [_flat(run.experiment) | _flat({key: run.meta.get(key) for key in told}) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key, "(not set)") for one in flat]
        if any(value != values[0] for value in values) and key.split(".")[0] not in _NOT_COMPARED:
            rows.append({"key": key, "values_shown": [str(value) for value in values]})
    return rows


def _both_sides(sides: Sequence[Side], bars: Sequence[dict[str, float]], metric: str) -> list[dict[str, Any]]:
    """The client's rows, then the server's: those of each clock apart, since they are different quantities."""
    label, function = ROWS[metric]
    of_client = [[run.ok for run in side.runs] for side in sides]
    rows = _rows(sides, bars, metric, f"{label}, client", "client", of_client, definition(function))
    for source, server in sorted({pair for side in sides for run in side.runs for pair in run.told_by}):
        clock = CLOCKS[source, server].get(metric)
        if clock is not None:
            told = [
                [run.ok[(run.ok["server_source"] == source) & (run.ok["server_kind"] == server)] for run in side.runs]
                for side in sides
            ]
            name = f"{label}, server ({source}, {server})"
            rows += _rows(sides, bars, f"server_{metric}", name, "server", told, clock.text)
    return rows


def _rows(
    sides: Sequence[Side],
    bars: Sequence[dict[str, float]],
    metric: str,
    label: str,
    of: str,
    tables: Sequence[Sequence[pd.DataFrame]],
    meaning: str,
) -> list[dict[str, Any]]:
    """A row a side; of the server's, a row each side of which it told by this clock."""
    told = [samples.of_tables(of_side, metric, metric, meaning) for of_side in tables]
    if all(one.missing for one in told):
        return []
    rows: list[dict[str, Any]] = []
    for number, (side, one) in enumerate(zip(sides, told, strict=True)):
        if of == "server" and one.missing:
            continue
        row: dict[str, Any] = {
            "metric": metric,
            "label": label,
            "side": of,
            "definition": meaning,
            "run": side.name,
            "first": not rows,
            "unit": "s",
        }
        row |= distribution(np.concatenate(one.values) if one.values else np.empty(0))
        row["differences"] = []
        if number and not one.missing and not told[0].missing:
            bar = max(bars[0].get(metric, 0.0), bars[number].get(metric, 0.0))
            row["differences"] = [_difference(told[0], one, statistic, bar) for statistic in DIFFERENCES]
        of_p50: dict[str, Any] = next((found for found in row["differences"] if found["statistic"] == "p50"), {})
        row |= {key: of_p50.get(key) for key in ("difference", "low", "high", "verdict")}
        rows.append(row)
    return rows


def _difference(first: Sample, other: Sample, statistic: str, bar: float) -> dict[str, Any]:
    """One figure of two sides: its difference and ratio, each with its interval where there are enough requests."""
    one, two = samples.figure(first, statistic) or 0.0, samples.figure(other, statistic) or 0.0
    found = samples.contrast(first, other, statistic, "difference")
    as_ratio = samples.contrast(first, other, statistic, "ratio").interval
    row: dict[str, Any] = {
        "statistic": statistic,
        "difference": two - one,
        "low": None,
        "high": None,
        "ratio": two / one if one > 0 else None,
        "ratio_low": None,
        "ratio_high": None,
        "paired": found.paired,
        "verdict": None,
    }
    if found.interval is not None:
        low, high = found.interval.low, found.interval.high
        row |= {"difference": found.interval.estimate, "low": low, "high": high}
        row["verdict"] = "within chance" if low <= 0 <= high else "slower" if low > 0 else "faster"
    if as_ratio is not None:
        row |= {"ratio": as_ratio.estimate, "ratio_low": as_ratio.low, "ratio_high": as_ratio.high}
    if bar > 0 and abs(row["difference"]) <= bar:  # without a calibration nothing is known of such an error
        row["verdict"] = "not resolved"
    return row


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"load": {"users": 8}} -> {"load.users": 8}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
