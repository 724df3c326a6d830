"""Samples: runs of one side and a metric's name -> the values of which its figure and its interval are made.

What one observation is differs from metric to metric, and with it what chance may do: a request (latencies), a request
with all its gaps (ITL), a stretch of time (throughput), a request that failed or did not (shares).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from twoclocks import intervals, metrics
from twoclocks.calibration import calibration_of, error_bars
from twoclocks.clocks import CLOCKS
from twoclocks.clocks import METRICS as TOLD
from twoclocks.figures import arrived, shape_of
from twoclocks.intervals import Interval
from twoclocks.levels import wilson
from twoclocks.load import Run
from twoclocks.metrics import Floats, Ints, definition, slo_limits

Unit = Literal["s", "share", "requests/s", "tokens/s"]

LATENCIES: dict[str, tuple[str, str]] = {
    "ttft": ("ttft", definition(metrics.ttft)),
    "tpot": ("tpot", definition(metrics.tpot)),
    "itl_mean": ("itl_mean", f"mean over a request of its gaps; {definition(metrics.chunk_gaps)}"),
    "e2e": ("e2e", definition(metrics.e2e)),
    "e2e_per_token": ("e2e_per_token", definition(metrics.e2e_per_token)),
    "ttft_from_intended": ("ttft_from_intended", "TTFT from intended = first token chunk - intended_at"),
    "latency_from_intended": ("latency_from_intended", "E2E from intended = last token chunk - intended_at"),
    "e2e_from_intended": ("latency_from_intended", "E2E from intended = last token chunk - intended_at"),
}
"""Of the client: metric -> column of Run.requests, definition. One value a request that ended ok; seconds."""
THROUGHPUTS: dict[str, Unit] = {
    "request_throughput": "requests/s", "output_throughput": "tokens/s", "goodput": "requests/s",
}  # fmt: skip
SHARES = ("error_rate", "goodput_share")
METRICS = (*LATENCIES, "itl", *(f"server_{name}" for name in TOLD), *THROUGHPUTS, *SHARES)
BARS = {"ttft_from_intended": "ttft", "latency_from_intended": "e2e", "e2e_from_intended": "e2e"}
"""Metric -> the one whose error bar it has, where the names differ."""
CALIBRATED = ("ttft", "tpot", "itl", "itl_mean", "e2e", *BARS)
"""Metrics that have an error bar where the instrument was calibrated."""
BLOCKS = 40
"""Parts of a measuring window at most, of which the interval of a throughput is made; none is shorter than a request
(its median E2E), so that neighbours say little of each other (batch means: Law, Simulation Modeling and Analysis).
Where requests arrive by a clock none is shorter than two: the tokens of each fall into two neighbours, and no user who
waits for an answer before the next makes up for it."""
PROMPTS = 20
"""Prompts in common from which runs are paired by them: of fewer, little is known of other prompts."""
IN_COMMON = 0.9
"""Share of the requests of each side that have to be of prompts of both."""


@dataclass(frozen=True)
class Sample:
    """What the runs of one side say of a metric."""

    metric: str
    unit: Unit
    definition: str
    values: list[Floats] = field(default_factory=list)  # an array a run
    units: list[Ints] | None = None  # in the same form: the request of each value, where it has many
    prompts: list[list[str]] | None = None  # in the same form, of latencies
    missing: str | None = None  # why there are no values, in words
    seconds: float = 0.0  # measured, all runs together

    @property
    def requests(self) -> int:
        """Independent observations: requests; of a throughput, stretches of time."""
        if self.units is not None:
            return sum(len(np.unique(unit)) for unit in self.units)
        return sum(map(len, self.values))


@dataclass(frozen=True)
class Contrast:
    """One side against the other; None where there are too few values."""

    interval: Interval | None
    paired: bool


def sample(runs: Sequence[Run], metric: str) -> Sample:
    """The values of a metric, one of METRICS, in all runs of a side; with ``missing`` set where it has none."""
    seconds = sum(end - start for start, end in (run.window for run in runs) if end > start)
    if metric in LATENCIES:
        column, meaning = LATENCIES[metric]
        return of_tables([run.ok for run in runs], metric, column, meaning, seconds)
    if metric == "itl":
        gaps = [run.gaps for run in runs]
        meaning = definition(metrics.chunk_gaps)
        units = [gap.request.astype(np.int64) for gap in gaps]
        return _found(Sample(metric, "s", meaning, [gap.seconds for gap in gaps], units, seconds=seconds))
    if metric in THROUGHPUTS:
        return _throughput(runs, metric, seconds)
    if metric in SHARES:
        return _share(runs, metric, seconds)
    return _of_server(runs, metric, seconds)


def of_tables(tables: Sequence[pd.DataFrame], metric: str, column: str, meaning: str, seconds: float = 0.0) -> Sample:
    """The values of a column, in seconds, of requests: a table a run."""
    rows = [table[["prompt_id", column]].dropna(subset=[column]) for table in tables]
    values = [table[column].to_numpy(dtype=np.float64) for table in rows]
    prompts = [[str(prompt) for prompt in table["prompt_id"]] for table in rows]
    return _found(Sample(metric, "s", meaning, values, prompts=prompts, seconds=seconds))


def figure(one: Sample, statistic: str) -> float | None:
    """The bare figure, of however few values."""
    return float(intervals.STATISTICS[statistic](np.concatenate(one.values))) if one.values else None


def measured(one: Sample, statistic: str, level: float = 0.95) -> Interval | None:
    """The figure with its interval; None where there are too few values."""
    if one.unit == "share":
        return _of_share(one)
    return intervals.estimate(one.values, statistic, level=level, units=one.units)


def contrast(
    first: Sample, other: Sample, statistic: str, kind: Literal["difference", "ratio"], level: float = 0.95
) -> Contrast:
    """other - first, or other / first.

    Paired by prompt where both sides are latencies of the same PROMPTS or more.
    """
    if first.unit == "share":
        return Contrast(_of_shares(first, other, kind), paired=False)
    if (pairs := _pairs(first, other)) is not None:
        paired = intervals.paired_difference if kind == "difference" else intervals.paired_ratio
        if (found := paired(*pairs, statistic, level=level)) is not None:
            return Contrast(found, paired=True)
    alone = intervals.difference if kind == "difference" else intervals.ratio
    units = (first.units, other.units) if first.units is not None and other.units is not None else None
    return Contrast(alone(first.values, other.values, statistic, level=level, units=units), paired=False)


def error_bar(runs: Iterable[Run]) -> dict[str, float]:
    """The instrument's error bar of each metric, seconds, the largest of these runs; none where none was calibrated."""
    found: dict[str, float] = {}
    for run in runs:
        if (calibration := calibration_of(run)) is not None:
            for name, bar in error_bars(calibration).items():
                found[name] = max(bar, found.get(name, 0.0))
    return found | {name: found[of] for name, of in BARS.items() if of in found}


def _found(made: Sample) -> Sample:
    if any(len(values) for values in made.values):
        return made
    return Sample(made.metric, made.unit, made.definition, missing=f"no request has a value of {made.metric}")


def _of_server(runs: Sequence[Run], metric: str, seconds: float) -> Sample:
    """Of one of the server's clocks; what two of them say is not the same quantity, and never put together."""
    name = metric.removeprefix("server_")
    rows = [run.ok[run.ok[metric].notna()] for run in runs]
    pairs = {
        (str(source), str(kind))
        for table in rows
        for source, kind in zip(table["server_source"], table["server_kind"], strict=True)
    }
    meaning = " | ".join(CLOCKS[pair][name].text for pair in sorted(pairs) if name in CLOCKS.get(pair, {}))
    if len(pairs) > 1:
        clocks = " and ".join(" of ".join(pair) for pair in sorted(pairs))
        return Sample(
            metric, "s", meaning, missing=f"{metric} was told by several clocks ({clocks}), whose figures differ"
        )
    return of_tables(rows, metric, metric, meaning, seconds)


def _throughput(runs: Sequence[Run], metric: str, seconds: float) -> Sample:
    found: list[Floats] = []
    count = min(filter(None, map(stretches, runs)), default=None)  # as many of each, so that every run weighs the same
    for run in runs:
        if metric == "output_throughput":
            at, amounts = arrived(run)
        elif metric == "request_throughput":
            at = run.ok["ended_at"].to_numpy(dtype=np.float64)
            amounts = np.ones(len(at))
        elif slo_limits(run.experiment):
            at, amounts = run.judged["sent_at"].fillna(run.judged["intended_at"]).to_numpy(), _good(run)
        else:
            return Sample(metric, THROUGHPUTS[metric], "", missing=f"{run.shown_name} has no SLO, and so no goodput")
        found.append(rates(run, at, amounts, count))
    meaning = definition({"goodput": metrics.goodput}.get(metric) or getattr(metrics, metric))
    return _found(Sample(metric, THROUGHPUTS[metric], meaning, found, seconds=seconds))


def stretches(run: Run) -> int:
    """Into how many parts a measuring window is cut: BLOCKS at most, none shorter than a request, or two."""
    start, end = run.window
    longest = max(float(run.ok["e2e"].dropna().median()), 1e-3) if run.ok["e2e"].notna().any() else 1e-3
    longest *= 2 if shape_of(run) in ("rate", "trace") else 1
    return max(1, min(BLOCKS, int((end - start) / longest))) if end > start else 0


def rates(run: Run, at: Floats, amounts: Floats, count: int | None = None) -> Floats:
    """Amounts per second, in equal parts of the measuring window; their mean is that of the whole."""
    start, end = run.window
    if not end > start:
        return np.empty(0)
    count = count or stretches(run)
    return metrics.binned(at, amounts, (start, end), count) * count / (end - start)


def _share(runs: Sequence[Run], metric: str, seconds: float) -> Sample:
    """1 for a request that counts, 0 for one that does not; those that this tool cut off are in no error rate."""
    if metric == "error_rate":
        meaning = (
            "error rate = measured requests that failed / those that ended by themselves; cut-off ones are neither"
        )
        states = [run.measured["status"][run.measured["status"] != "cancelled"] for run in runs]
        failed = [(one != "ok").to_numpy().astype(np.float64) for one in states]
        return _found(Sample(metric, "share", meaning, failed, seconds=seconds))
    if any(not slo_limits(run.experiment) for run in runs):
        return Sample(metric, "share", "", missing="a run has no SLO, and so no goodput")
    meaning = f"share of the requests that an SLO judges that met it. {definition(metrics.meets_slo)}"
    return _found(Sample(metric, "share", meaning, [_good(run) for run in runs], seconds=seconds))


def _good(run: Run) -> Floats:
    """Of each request that the SLO judges, as in summary.json: those hung up on as drawn are not among them."""
    limits, rows = slo_limits(run.experiment), run.judged
    ok = (rows["status"] == "ok").to_numpy()
    return metrics.meets_slo(ok, {name: rows[name].to_numpy(dtype=np.float64) for name in limits}, limits).astype(float)


def _of_share(one: Sample) -> Interval | None:
    """By Wilson, sound even where none failed, of which a resample would know nothing; with the repeats' scatter."""
    values = np.concatenate(one.values) if one.values else np.empty(0)
    if not len(values):
        return None
    low, high = wilson(int(values.sum()), len(values))
    if sum(1 for run in one.values if len(run)) >= intervals.REPEATS:
        found = intervals.estimate(one.values, "mean")
        if found is not None:
            low, high = max(0.0, min(low, found.low)), min(1.0, max(high, found.high))
    return Interval(float(values.mean()), low, high, len(values))


def _of_shares(first: Sample, other: Sample, kind: str) -> Interval | None:
    """By the intervals of both shares (Newcombe, Statistics in Medicine 17, 1998, method 10; ratios in logarithms)."""
    one, two = _of_share(first), _of_share(other)
    if one is None or two is None:
        return None
    n = min(one.n, two.n)
    ends: Callable[[float], float] = float
    if kind == "ratio":
        if min(one.estimate, two.estimate) <= 0:
            return None
        ends = math.log
    a, a_low, a_high = (ends(end) for end in (one.estimate, one.low, one.high))
    b, b_low, b_high = (ends(end) for end in (two.estimate, two.low, two.high))
    middle, below, above = b - a, math.hypot(b - b_low, a_high - a), math.hypot(b_high - b, a - a_low)
    if kind == "ratio":
        return Interval(math.exp(middle), math.exp(middle - below), math.exp(middle + above), n, same=1.0)
    return Interval(middle, middle - below, middle + above, n, same=0.0)


def _pairs(first: Sample, other: Sample) -> tuple[list[dict[str, Floats]], list[dict[str, Floats]]] | None:
    """The values of each run by prompt; None where the sides did not send the same ones."""
    if first.prompts is None or other.prompts is None:
        return None
    sent = [[prompt for run in side for prompt in run] for side in (first.prompts, other.prompts)]
    common = set(sent[0]) & set(sent[1])
    if len(common) < PROMPTS or any(sum(one in common for one in of) < IN_COMMON * len(of) for of in sent):
        return None
    one, two = (
        [_by_prompt(ids, values) for ids, values in zip(prompts, side.values, strict=True)]
        for side, prompts in ((first, first.prompts), (other, other.prompts))
    )
    return one, two


def _by_prompt(prompts: Sequence[str], values: Floats) -> dict[str, Floats]:
    found: dict[str, list[float]] = {}
    for key, value in zip(prompts, values.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return {key: np.array(of_prompt) for key, of_prompt in found.items()}
