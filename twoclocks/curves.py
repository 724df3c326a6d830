"""Curves: the folder of a sweep or a search -> its summary.json, plots/curves.png and report.html.

Only levels whose run came to its end enter the curves; the others stand in the table, with why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twoclocks import __version__, report, terminal, units
from twoclocks.curves_plot import curves_plot
from twoclocks.errors import RunFolderError, TwoclocksError, plain
from twoclocks.evidence import evidence_of
from twoclocks.levels import wilson
from twoclocks.load import load_run
from twoclocks.metrics import Floats
from twoclocks.run_folder import refuse_links
from twoclocks.run_levels import UNITS, Level, Levels, found_text, read_levels

PLOT = Path("plots") / "curves.png"
RESAMPLES, SEED = 2000, 1
KNEE = {
    "users": "Saturation point N* = highest throughput x mean E2E at the lowest level: where the line that throughput "
    "follows while nobody waits (users / E2E alone) meets its ceiling (Denning and Buzen 1978). Throughput of a level "
    f"by Little's law, users / mean E2E. Interval: the middle 95 % of {RESAMPLES} bootstrap resamples of the requests "
    f"of each level (seed {SEED}); it tells how far chance among these requests reaches, not how far the levels are "
    "apart. Reached only if the interval ends below the highest level.",
    "rate": "Saturation point: between the highest rate at which the server kept up with all that came and the lowest "
    "at which requests piled up (by more than chance explains at 1 %) or could not leave. That it kept up is said of "
    "no level whose window is shorter than twice the time that 95 % of its requests took. The interval is this "
    "bracket; more levels between its ends make it narrower, and longer ones decide more of them.",
}


@dataclass(frozen=True)
class Curves:
    """What was written."""

    summary: dict[str, Any]
    html: Path
    exit_code: int  # 0; 1: a search found no level that meets the SLO; 4: what it rests on is INVALID


def build(folder: Path, progress: Callable[[str], None] = lambda _: None) -> Curves:
    """The report of a sweep or search and of each of its levels. Raises RunFolderError."""
    levels = read_levels(folder)
    rows, e2e = [], {}
    for level in levels.levels:
        row = _row(level)
        if level.status == "finished":
            try:
                row |= _figures(folder / level.folder, progress)
                e2e[level.number] = row.pop("e2e_values")
            except TwoclocksError as error:
                row["error"] = str(error)
        rows.append(row)
    rows.sort(key=lambda row: (row["value"], row["number"]))
    summary = _summary(levels, rows, knee(levels.over, rows, e2e))
    try:
        refuse_links(folder)
        (folder / "plots").mkdir(exist_ok=True)
        report.write_json(folder / "summary.json", summary)
        (folder / "summary.txt").write_text(text(summary), encoding="utf-8")
        progress("drawing the curves")
        curves_plot(summary, folder / PLOT)
        html = folder / "report.html"
        experiment = folder / "experiment.yaml"
        html.write_text(
            report.page(
                "curves.html",
                summary=summary,
                curves=report.picture(folder / PLOT),
                result=result_lines(summary),
                experiment=experiment.read_text(encoding="utf-8") if experiment.exists() else "",
            ),
            encoding="utf-8",
        )
    except OSError as error:
        raise RunFolderError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return Curves(summary, html, _exit_code(levels, rows))


def knee(over: str, rows: Sequence[dict[str, Any]], e2e: dict[int, Floats]) -> dict[str, Any]:
    """The saturation point: value, low, high, reached, definition. Values None where it cannot be told; see KNEE."""
    found: dict[str, Any] = {"value": None, "low": None, "high": None, "reached": False, "unit": UNITS[over]}
    found["definition"] = KNEE[over]
    if over == "rate":
        piled = min((row["value"] for row in rows if row.get("kept_up") is False), default=None)
        kept = [row["value"] for row in rows if row.get("kept_up") and (piled is None or row["value"] < piled)]
        highest = max(kept, default=None)
        return found | {"value": highest, "low": highest, "high": piled, "reached": None not in (highest, piled)}
    told = [(row["value"], e2e[row["number"]]) for row in rows if len(e2e.get(row["number"], ()))]
    if len(told) < 2:
        return found
    value = saturation([users for users, _ in told], [[values.mean()] for _, values in told])[0]
    rng = np.random.default_rng(SEED)
    drawn = saturation([users for users, _ in told], [_resampled_means(values, rng) for _, values in told])
    low, high = (float(end) for end in np.percentile(drawn, (2.5, 97.5)))
    return found | {"value": float(value), "low": low, "high": high, "reached": high < told[-1][0]}


def saturation(users: Sequence[float], mean_e2e: Sequence[Any]) -> Floats:
    """N* = max over levels of (users / mean E2E) x mean E2E of the first level; ``mean_e2e``: (levels, draws)."""
    times = np.asarray(mean_e2e, dtype=np.float64)
    throughput = np.asarray(users, dtype=np.float64)[:, None] / times
    return np.asarray(throughput.max(axis=0) * times[0])


def text(summary: dict[str, Any]) -> str:
    """The result and the table of levels, as the terminal shows them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Levels", title_style="bold", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column(UNITS[summary["over"]], justify="right", no_wrap=True)
    for heading in ("requests/s", "tokens/s", "TTFT p50", "p95", "TPOT p50", "p95", "goodput/s", "good"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in summary["levels"]:
        cells = [units.number(row.get(key), unit) for key, unit in COLUMNS]
        state = (
            row["verdict"] if row["verdict"] and not row["error"] else f"{row['status']}: {plain(row['error'] or '')}"
        )
        table.add_row(f"{row['value']:g}", *cells, share_text(row.get("share")), state)
    return terminal.to_text(Group(*(Text(line) for line in result_lines(summary)), table, Text("Latencies in ms.")))


COLUMNS = (
    ("achieved", "requests/s"), ("tokens_per_s", "tokens/s"), ("ttft_p50", "s"), ("ttft_p95", "s"),
    ("tpot_p50", "s"), ("tpot_p95", "s"), ("goodput", "requests/s"),
)  # fmt: skip


def share_text(share: float | None) -> str:
    """A share of requests, as tables show it."""
    return "–" if share is None else f"{share:.1%}"


def result_lines(summary: dict[str, Any]) -> list[str]:
    """What came of it, a sentence a line."""
    found, point, unit = summary["search"], summary["knee"], UNITS[summary["over"]]
    lines = [found["text"]] if found else []
    if summary["partial"]:
        lines.append(summary["partial"])
    if point["value"] is None or not point["reached"]:
        lines.append(f"Saturation point: {not_bracketed(point, summary['top'], unit)}.")
    elif summary["over"] == "rate":
        lines.append(f"Saturation point: between {point['low']:g} and {point['high']:g} {unit}.")
    else:
        ends = f"95 % interval {point['low']:.3g} .. {point['high']:.3g}"
        lines.append(f"Saturation point: {point['value']:.3g} {unit} ({ends}).")
    return lines


def not_bracketed(point: dict[str, Any], top: float, unit: str) -> str:
    """What is known of a saturation point that lies between no two levels; ``top``: the highest level."""
    if point["value"] is None:
        return "cannot be told from these levels" + (f", but below {point['high']:g} {unit}" if point["high"] else "")
    if point["value"] < top:
        return f"at least {point['value']:g} {unit}; the levels above are too short to say more"
    return f"not reached by these levels, the highest of which is {top:g} {unit}"


def _row(level: Level) -> dict[str, Any]:
    keys = ("number", "value", "folder", "longer", "status", "exit_code", "error", "reset")
    return {key: getattr(level, key) for key in keys} | {"verdict": None, "kept_up": None}


def _figures(folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """What the curves take from one level; e2e_values are those of its requests that ended ok, seconds."""
    summary = report.build(folder, progress).summary
    run = load_run(folder)
    said, figures = evidence_of(run), summary["figures"]
    e2e = run.ok["e2e"].to_numpy(dtype=np.float64)
    has_slo = bool(summary["slo"])
    low, high = wilson(said.good, said.requests) if has_slo and said.requests else (None, None)
    return {
        "verdict": summary["verdict"]["level"],
        "reasons": [reason["reason"] for reason in summary["verdict"]["reasons"]],
        "requests": said.requests,
        **{name: figures[name]["value"] for name in ("failed", "hung_up", "gave_up")},
        "not_sent": run.meta.get("not_sent") or 0,
        "kept_up": said.kept_up,
        "achieved": _finite(figures["request_throughput"]["value"]),
        "tokens_per_s": _finite(figures["output_throughput"]["value"]),
        **{f"{name}_{p}": figures[name][p] for name in ("ttft", "tpot", "e2e") for p in ("p50", "p95", "p99")},
        "goodput": _finite(figures["goodput"]["value"]) if has_slo else None,
        "share": said.good / said.requests if has_slo and said.requests else None,
        "share_low": low,
        "share_high": high,
        "slo_met": summary["slo"]["met"] if has_slo else None,
        "limits": summary["slo"]["limits"] if has_slo else {},
        "e2e_values": e2e[np.isfinite(e2e)],
    }


def _summary(levels: Levels, rows: list[dict[str, Any]], point: dict[str, Any]) -> dict[str, Any]:
    lost = [row for row in rows if row["error"] or row["status"] != "finished"]
    partial = None
    if levels.status != "finished" or lost:
        partial = f"The {levels.kind} is {levels.status}: {len(rows) - len(lost)} levels have figures"
        partial += f", {max(0, len(levels.planned) - len(rows))} not begun" if levels.planned else ""
        partial += f", {len(lost)} failed." if lost else "."
    found = levels.found
    return {
        "twoclocks_version": __version__,
        "kind": levels.kind,
        "name": levels.name,
        "over": levels.over,
        "unit": UNITS[levels.over],
        "status": levels.status,
        "partial": partial,
        "top": max((row["value"] for row in rows), default=0.0),
        "limits": next((row["limits"] for row in rows if row.get("limits")), {}),
        "search": {
            "value": found.value,
            "interval": [found.value, found.failed],
            "runs": sum(probe.runs for probe in levels.probes),
            "why": found.why,
            "text": found_text(found, levels.over),
            "rule": levels.rule,
            "probes": [
                {name: getattr(probe, name) for name in probe.__struct_fields__}
                for probe in sorted(levels.probes, key=lambda probe: probe.value)
            ],
        }
        if found
        else None,
        "knee": point,
        "levels": rows,
    }


def _exit_code(levels: Levels, rows: Sequence[dict[str, Any]]) -> int:
    if levels.found is None:
        return 4 if any(row["verdict"] == "INVALID" for row in rows) else 0
    if levels.found.value is None:
        return 1
    return 4 if any(row["value"] == levels.found.value and row["verdict"] == "INVALID" for row in rows) else 0


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """Means of resamples with replacement, in batches so that many requests need no more memory than few."""
    batch = max(1, 2_000_000 // len(values))
    return np.concatenate(
        [
            values[rng.integers(0, len(values), (min(batch, RESAMPLES - done), len(values)))].mean(axis=1)
            for done in range(0, RESAMPLES, batch)
        ]
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
