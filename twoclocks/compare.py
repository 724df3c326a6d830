"""Compare: run folders -> one report with all of them side by side, their differences, and how sure these are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import __version__, metrics, terminal
from twoclocks.calibration import calibration_of, error_bars
from twoclocks.clocks import CLOCKS
from twoclocks.errors import RunFolderError, TwoclocksError, plain
from twoclocks.load import Run, load_run
from twoclocks.metrics import Floats, definition
from twoclocks.plots import violins
from twoclocks.report import VIOLIN, Report, page, picture, write_json
from twoclocks.summary import distribution, summarise

ROWS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ttft": ("TTFT", metrics.ttft),
    "tpot": ("TPOT", metrics.tpot),
    "itl_mean": ("mean ITL of a request", metrics.chunk_gaps),
    "e2e": ("E2E", metrics.e2e),
}
"""Metric -> its name and where the client's definition stands; the server's figures of the same name come after it."""
TOTALS = {
    "requests": "Requests",
    "ok": "Ok",
    "failed": "Failed",
    "cancelled": "Cut off at the end",
    "hung_up": "Hung up on, as drawn",
    "gave_up": "Given up for want of a first token",
    "duration": "Test duration",
    "request_throughput": "Requests/s",
    "output_throughput": "Output tokens/s",
}
RESAMPLES, SEED, LEAST = 2000, 1, 5
INTERVAL = (
    f"Difference of p50: this run's median - the first run's. Interval: the middle 95 % of {RESAMPLES} bootstrap "
    f"resamples of the requests of both runs (seed {SEED}); it tells how far chance among these requests reaches, not "
    f"what another day would bring. Not given below {LEAST} requests."
)
_SAME_WORK = ("workload.", "load.", "warmup.", "target.api")
_NOT_COMPARED = ("name", "output", "labels")


def compare(
    folders: Sequence[str | Path], out: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """The comparison of two or more runs, written to ``out`` or to compare-A-vs-B beside the first.

    Raises TwoclocksError for fewer than two runs, RunFolderError for a folder that is none.
    """
    if len(folders) < 2:
        raise TwoclocksError("a comparison needs two run folders or more, such as: twoclocks compare output/A output/B")
    runs = []
    for folder in folders:
        progress(f"reading {folder}")
        runs.append(load_run(folder))
    runs = short_names(runs)
    out = out or runs[0].path.resolve().parent / ("compare-" + "-vs-".join(run.name for run in runs))
    progress("computing the differences")
    summary = differences(runs)
    title = " vs ".join(run.shown_name for run in runs)
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        write_json(out / "summary.json", summary)
        progress("drawing the violins")
        violins(runs, out / VIOLIN, title)
        html = out / "report.html"
        values = {"summary": summary, "title": title, "violin": picture(out / VIOLIN), "totals": TOTALS}
        html.write_text(page("compare.html", **values), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    return Report(summary, html, out / VIOLIN)


def short_names(runs: Sequence[Run]) -> list[Run]:
    """The same runs, called by their experiments where those tell them apart; else by their folders."""
    names = [str(run.experiment.get("name") or "") for run in runs]
    if not all(names) or len(set(names)) < len(names):
        return list(runs)
    return [replace(run, short_name=name) for run, name in zip(runs, names, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, Any]:
    """Every figure of a comparison; the keys are those of its summary.json. Seconds."""
    differing = settings_differ(runs)
    calibrations = [calibration_of(run) for run in runs]
    bars = [error_bars(calibration) if calibration else {} for calibration in calibrations]
    return {
        "twoclocks_version": __version__,
        "runs": [summarise(run) for run in runs],
        "interval_definition": INTERVAL,
        "rows": [row for metric in ROWS for row in _both_sides(runs, bars, metric)],
        "settings_differ": differing,
        "load_differs": [row["key"] for row in differing if row["key"].startswith(_SAME_WORK)],
    }


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


def median_difference(
    first: Floats, other: Floats, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float, float]:
    """(median(other) - median(first), low, high): percentile bootstrap, 95 %, each sample resampled by itself."""
    rng = np.random.default_rng(seed)
    drawn = _resampled_medians(other, resamples, rng) - _resampled_medians(first, resamples, rng)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(other) - np.median(first)), float(low), float(high)


def text(summary: dict[str, Any]) -> str:
    """The comparison as the terminal shows it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Side by side, in ms; Δ p50 is against the first run",
        title_style="bold",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("metric", no_wrap=True)
    table.add_column("run", no_wrap=True)
    for heading in ("n", "mean", "p50", "p99", "Δ p50", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary["rows"]:
        low, high = (terminal.number(row[key], "s") for key in ("low", "high"))
        values = [terminal.number(row[key], "s") for key in ("mean", "p50", "p99", "difference")]
        values.append("–" if row["low"] is None else f"{low} .. {high}")
        if row["verdict"] == "not resolved":
            values[3] += " *"
        table.add_row(row["label"] if row["first"] else "", Text(plain(row["run"])), f"{row['n']:,}", *values)
    lines = [
        Text(f"{run['label']}: {run['verdict']['level']}; {reason['reason']}; {reason['remedy']}.")
        for run in summary["runs"]
        for reason in run["verdict"]["reasons"]
    ]
    lines += [
        Text(f"{run['label']}: {run['partial']}", style="bold yellow") for run in summary["runs"] if run["partial"]
    ]
    if any(row["verdict"] == "not resolved" for row in summary["rows"]):
        lines.append(Text("* smaller than the instrument's own error at this load: not resolved."))
    if summary["load_differs"]:
        keys = ", ".join(summary["load_differs"])
        lines.append(Text(f"The runs did not do the same work: {keys} differ.", style="bold"))
    return terminal.to_text(Group(table, *lines))


def _both_sides(runs: Sequence[Run], bars: Sequence[dict[str, float]], metric: str) -> list[dict[str, Any]]:
    """The client's rows, then the server's: those of each clock apart, since they are different quantities."""
    label, function = ROWS[metric]
    rows = _rows(runs, bars, metric, f"{label}, client", "client", [run.ok for run in runs], definition(function))
    for source, server in sorted({pair for run in runs for pair in run.told_by}):
        clock = CLOCKS[source, server].get(metric)
        if clock is not None:
            told = [run.ok[(run.ok["server_source"] == source) & (run.ok["server_kind"] == server)] for run in runs]
            name = f"{label}, server ({source}, {server})"
            rows += _rows(runs, bars, f"server_{metric}", name, "server", told, clock.text)
    return rows


def _rows(
    runs: Sequence[Run],
    bars: Sequence[dict[str, float]],
    metric: str,
    label: str,
    side: str,
    tables: Sequence[pd.DataFrame],
    meaning: str,
) -> list[dict[str, Any]]:
    """A row a run; of the server's side, a row each run of which it told by this clock."""
    values = [table[metric].dropna().to_numpy(dtype=np.float64) for table in tables]
    if not any(len(one) for one in values):
        return []
    rows: list[dict[str, Any]] = []
    for number, (run, of_run) in enumerate(zip(runs, values, strict=True)):
        if side == "server" and not len(of_run):
            continue
        row: dict[str, Any] = {
            "metric": metric,
            "label": label,
            "side": side,
            "definition": meaning,
            "run": run.shown_name,
            "first": not rows,
            "unit": "s",
        }
        row |= dict.fromkeys(("mean", "p50", "p95", "p99", "difference", "low", "high", "verdict"))
        row |= distribution(of_run)
        if number and len(of_run) and len(values[0]):
            row["difference"] = float(np.median(of_run) - np.median(values[0]))
            unresolved = abs(row["difference"]) <= max(bars[0].get(metric, 0.0), bars[number].get(metric, 0.0))
            row["verdict"] = "not resolved" if unresolved else None
            if min(len(of_run), len(values[0])) >= LEAST:
                _, low, high = median_difference(values[0], of_run)
                verdict = "within chance" if low <= 0 <= high else "slower" if low > 0 else "faster"
                row |= {"low": low, "high": high, "verdict": row["verdict"] or verdict}
        rows.append(row)
    return rows


def _resampled_medians(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Medians of resamples with replacement, in batches so that a long run needs no more memory than a short one."""
    batch = max(1, 2_000_000 // len(values))
    drawn = [
        np.median(values[rng.integers(0, len(values), (min(batch, resamples - done), len(values)))], axis=1)
        for done in range(0, resamples, batch)
    ]
    return np.concatenate(drawn)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"load": {"users": 8}} -> {"load.users": 8}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
