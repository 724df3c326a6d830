"""Charts: runs -> what the charts of a report's page draw, as plain lists of numbers. Knows nothing of how it is drawn.

Milliseconds and per cent, as shown. ``templates/charts.js`` draws it. Whatever the size of a run, these are some
hundreds of points a curve.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from twoclocks.errors import plain
from twoclocks.load import Run
from twoclocks.metrics import Floats, slo_limits
from twoclocks.plots import FEW, Side, density, limits, violin_panels
from twoclocks.spread import Curve, curves
from twoclocks.timeline import Line, timeline_of
from twoclocks.wording import LABELS
from twoclocks.worst import chunk_timelines

METRICS = ("ttft", "tpot", "e2e", "itl")
MARKS = (50, 95, 99)
"""Percentiles that are marked on a violin."""


def charts(runs: Sequence[Run], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the page of one run, or of several, draws. ``summaries``: of each run, as summarise made it."""
    return {
        "runs": [plain(run.shown_name) for run in runs],
        "violin": _violins(runs),
        "ecdf": _ecdfs(runs),
        "timeline": [_timeline(run) for run in runs],
        "waterfall": [one for summary in summaries for one in _waterfalls(summary)],
        "answer": {
            f"{number}/{key}": told
            for number, (run, summary) in enumerate(zip(runs, summaries, strict=True))
            for key, told in _answers(run, summary).items()
        },
    }


def _violins(runs: Sequence[Run]) -> list[dict[str, Any]]:
    made = []
    for metric, panel in zip(METRICS, violin_panels(runs), strict=True):
        sides = [side for pair in panel.pairs for side in pair]
        if not any(len(side.values) for side in sides):
            continue
        low, high, log = limits([side.values for side in sides])
        halves = [
            _half(side, number, who, (low, high), log)
            for number, pair in enumerate(panel.pairs)
            for side, who in zip(pair, ("client", "server"), strict=True)
            if len(side.values)
        ]
        names = [f"{plain(run.shown_name)}: " if len(runs) > 1 else "" for run in runs]
        silent = [
            name + side.silence.replace("\n", " ")
            for name, (_, side) in zip(names, panel.pairs, strict=True)
            if not len(side.values) and side.silence
        ]
        made.append(
            {
                "metric": metric,
                "title": panel.title,
                "log": log,
                "low": _ms(low),
                "high": _ms(high),
                "halves": halves,
                "silent": silent,
            }
        )
    return made


def _half(side: Side, run: int, who: str, ends: tuple[float, float], log: bool) -> dict[str, Any]:
    """Outline (ms, width of 0 .. 1) and marks; no outline of few values, which stand as points."""
    low, high = ends
    shown = side.values[(side.values >= low) & (side.values <= high)]
    told: dict[str, Any] = {
        "run": run,
        "side": who,
        "n": len(side.values),
        "beyond": len(side.values) - len(shown),
        "worst": _ms(float(side.values.max())),
        "marks": {f"p{p}": _ms(float(np.percentile(side.values, p))) for p in MARKS},
        "outline": [],
        "points": [],
    }
    if len(shown) >= FEW and np.ptp(shown) > 0:
        grid, width = density(shown, log)
        told["outline"] = _pairs(grid * 1e3, width)
    else:
        told["points"] = [_ms(value) for value in shown.tolist()]
    return told


def _ecdfs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    told: list[list[Curve]] = [curves(run) for run in runs]
    for metric in METRICS:
        drawn = [
            {
                "run": number,
                "side": one.side,
                "told_by": ", ".join(one.told_by) if one.told_by else None,
                "points": _pairs(one.seconds * 1e3, one.shares * 100),
            }
            for number, of_run in enumerate(told)
            for one in of_run
            if one.metric == metric
        ]
        slo = {slo_limits(run.experiment).get(metric) for run in runs}
        limit = slo.pop() if len(slo) == 1 else None
        if drawn:
            made.append({"metric": metric, "title": LABELS[metric], "curves": drawn, "slo": limit and _ms(limit)})
    return made


def _timeline(run: Run) -> dict[str, Any]:
    window = [round(end, 3) if np.isfinite(end) else None for end in run.window]
    return {
        "run": plain(run.shown_name),
        "window": window,
        "panels": [
            {
                "title": panel.title,
                "unit": {"s": "ms", "share": "%"}.get(panel.unit, panel.unit),
                "lines": [_line(line, {"s": 1e3, "share": 1e2}.get(panel.unit, 1.0)) for line in panel.lines],
            }
            for panel in timeline_of(run)
        ],
    }


LINE_POINTS = 1200
"""Points of a line at most; of a longer one, the mean of neighbours."""


def _line(line: Line, factor: float) -> dict[str, Any]:
    at, values = line.at, line.values * factor
    if line.look == "steps":
        values = np.append(values, values[-1:])
    if line.look == "area":  # a step only where the count changes, and the last of those at one moment
        last = np.append(np.diff(at) > 0, True)
        at, values = at[last], values[last]
    averaged = 0
    if len(at) > LINE_POINTS:
        averaged = -(-len(at) // LINE_POINTS)
        starts = np.arange(0, len(at), averaged)
        at, values = at[starts], np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    label = line.label + (f" (mean of {averaged} at a time)" if averaged else "")
    return {
        "label": label,
        "side": line.side,
        "look": line.look,
        "dashed": line.dashed,
        "named": line.named,
        "points": _pairs(at, values),
    }


def _waterfalls(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of summary.json, in ms; of those with few of the requests only the table tells."""
    total = sum(one["n"] for one in summary["waterfall"])
    return [
        {
            "run": plain(summary["label"]),
            "n": one["n"],
            "how": one["how"],
            "bars": [
                {"name": bar["name"], "label": plain(bar["label"])} for bar in one["bars"] if bar["name"] != "total"
            ],
            "stacks": [
                stack | {"total": _ms(stack["total"]), "bars": {key: _ms(part) for key, part in stack["bars"].items()}}
                for stack in one["stacks"]
            ],
        }
        for one in summary["waterfall"]
        if one["n"] >= 0.05 * total
    ]


def _answers(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Chunks of the worst requests: tokens that had come by each moment; and the pace of a reader in tokens/s."""
    told = summary["stutter"]
    pace = told["words_per_s"] * told["tokens_per_word"] if told else None
    found = chunk_timelines(run, [row["request_id"] for row in summary["worst"]])
    return {key: {"pace": pace, "points": _pairs(at * 1e3, tokens)} for key, (at, tokens) in found.items()}


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.6g}")


def _pairs(x: Floats, y: Floats) -> list[list[float]]:
    """Pairs in six digits, of which one sees no more; none that is not finite, which JSON does not have."""
    known = np.isfinite(x) & np.isfinite(y)
    return [[float(f"{a:.6g}"), float(f"{b:.6g}")] for a, b in zip(x[known].tolist(), y[known].tolist(), strict=True)]
