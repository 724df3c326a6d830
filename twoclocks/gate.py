"""Gate: "ttft.p95 <= +5%" and the runs of two sides -> pass, fail, or not enough data. For continuous integration.

A gate is judged by an interval, never by a bare figure: it passes where all of the interval is within the limit, fails
where all of it is beyond, and else says how much more would decide. Where the instrument's own error bar, added to the
interval, reaches over the limit, nothing is claimed either. An INVALID run judges nothing.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

from twoclocks import intervals, samples, units
from twoclocks.errors import TwoclocksError, plain
from twoclocks.intervals import Interval
from twoclocks.load import Run
from twoclocks.samples import METRICS, SHARES, THROUGHPUTS, Sample
from twoclocks.verdict import verdict

Kind = Literal["absolute", "difference", "ratio"]
Outcome = Literal["pass", "fail", "not enough data", "invalid run"]

DEFINITION = (
    "A gate passes where the whole 95 % interval is within its limit, fails where the whole interval is beyond it, and "
    "else has not enough data. The instrument's own error bar, where it was calibrated, is added to both ends. What "
    "stands on its limit passes by chance in 1 of 40 cases. Several gates are not corrected for their number: all "
    "of them pass by chance no sooner than the hardest one alone (Berger, Technometrics 24, 1982), while each has a "
    "chance of its own to fail."
)
UNKNOWN_ERROR = (
    "The instrument's own error at this load was not measured, so no interval holds it: twoclocks calibrate --like RUN"
)
_TEXT = re.compile(
    r"\s*(?P<metric>[a-z0-9_]+)(?:\.(?P<statistic>[a-z0-9_]+))?\s*(?P<operator><=|>=|<|>)"
    r"\s*(?P<sign>[+\-−]?)\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>%|[a-z/]*)\s*",
    re.IGNORECASE,
)
_EXAMPLE = 'such as "ttft.p95 <= +5%" or "tpot.p99 <= 50 ms"'
_UNITS = {"s": {"ms": 1e-3, "s": 1.0}, "share": {"%": 0.01}, "requests/s": {"": 1.0, "/s": 1.0, "requests/s": 1.0},
          "tokens/s": {"": 1.0, "/s": 1.0, "tokens/s": 1.0}}  # fmt: skip
_MOST_TIMES = 1000
"""Times as much data as there is, above which no advice is given to take that much."""


class Gate(msgspec.Struct, frozen=True):
    """One condition on the other side, of its own or against the first side."""

    text: str
    metric: str
    statistic: str  # "mean" of throughputs and shares
    upper: bool  # is the limit the most, or the least?
    kind: Kind
    limit: float  # seconds, share, per second; of kind ratio, the ratio to the first side

    @property
    def figure(self) -> str:
        """What is judged, as the gate names it."""
        return self.metric if self.metric in (*THROUGHPUTS, *SHARES) else f"{self.metric}.{self.statistic}"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a gate."""

    gate: Gate
    first: str  # the sides' names
    other: str
    unit: str
    definition: str
    first_value: float | None
    value: float | None  # of the other side
    outcome: Outcome
    reason: str  # in words
    remedy: str | None = None
    interval: Interval | None = None  # of what is judged: the value, the difference or the ratio
    error_bar: float | None = None  # in the interval's unit; None where the instrument's error is not known, or none is
    paired: bool = False


def parse(text: str) -> Gate:
    """A gate from its text. Raises TwoclocksError, in one line, naming what is wrong and what there is."""
    shown = f'gate "{plain(text)[:80]}"'
    found = _TEXT.fullmatch(text)
    if found is None:
        raise TwoclocksError(f"{shown}: expected METRIC.STATISTIC, <= or >=, and a limit, {_EXAMPLE}")
    metric, statistic, sign, unit = (
        found[name].lower() if found[name] else "" for name in ("metric", "statistic", "sign", "unit")
    )
    if metric not in METRICS:
        raise TwoclocksError(f"{shown}: there is no metric {metric!r}; there are {', '.join(METRICS)}")
    quantity = unit_of(metric)
    if quantity != "s":
        if statistic not in ("", "mean"):
            raise TwoclocksError(f"{shown}: {metric} is one figure, without a statistic; leave .{statistic} away")
        statistic = "mean"
    elif statistic not in intervals.STATISTICS:
        raise TwoclocksError(
            f"{shown}: {metric} needs a statistic, such as {metric}.p95; there are {', '.join(intervals.STATISTICS)}"
        )
    number = float(found["number"]) * (-1 if sign in ("-", "−") else 1)
    units = _UNITS[quantity]
    kind: Kind = "difference" if sign else "absolute"
    if sign and unit == "%":
        kind, limit = "ratio", 1 + number / 100
    elif sign and quantity == "share":
        raise TwoclocksError(f"{shown}: against the first run {metric} takes a limit in %, such as +5%")
    elif unit in units:
        limit = number * units[unit]
    elif unit == "%":
        raise TwoclocksError(f"{shown}: a limit in % needs a sign, such as +5% or -3%: it is against the first run")
    else:
        raise TwoclocksError(
            f"{shown}: the limit of {metric} is in {' or '.join(filter(None, units))}, or in % with a sign"
        )
    if kind == "ratio" and limit <= 0:
        raise TwoclocksError(f"{shown}: no figure can be less than nothing; a limit above -100% is needed")
    return Gate(" ".join(text.split()), metric, statistic, found["operator"][0] == "<", kind, limit)


def unit_of(metric: str) -> str:
    """s, share, requests/s or tokens/s."""
    return "share" if metric in SHARES else THROUGHPUTS.get(metric, "s")


def judge(
    gate: Gate,
    first: Sequence[Run],
    other: Sequence[Run],
    *,
    names: tuple[str, str] | None = None,
    bars: Mapping[str, float] | None = None,
    invalid: Sequence[str] | None = None,
) -> Judged:
    """A gate on two sides, each of one run or of its repeats.

    ``names``: of the sides. ``bars``: the error bars of all their runs, as `samples.error_bar` tells. ``invalid``: the
    names of runs whose verdict is INVALID. What is not given is found out.
    """
    runs = [*first, *other]
    bars = samples.error_bar(runs) if bars is None else bars
    if invalid is None:
        invalid = [run.shown_name for run in runs if verdict(run)["level"] == "INVALID"]
    sides = (samples.sample(first, gate.metric), samples.sample(other, gate.metric))
    said = Judged(
        gate=gate,
        first=names[0] if names else first[0].shown_name,
        other=names[1] if names else other[0].shown_name,
        unit=sides[1].unit,
        definition=sides[1].definition,
        first_value=samples.figure(sides[0], gate.statistic),
        value=samples.figure(sides[1], gate.statistic),
        outcome="not enough data",
        reason="",
    )

    def ended(reason: str, **fields: Any) -> Judged:
        return msgspec.structs.replace(said, reason=reason, **fields)

    asked = sides[1:] if gate.kind == "absolute" else sides
    if invalid:
        which = ", ".join(plain(name) for name in invalid)
        remedy = "see the verdict's reasons, and run again"
        return ended(f"{which}: INVALID, so its figures judge nothing", outcome="invalid run", remedy=remedy)
    if missing := next((side.missing for side in asked if side.missing), None):
        return ended(missing)
    if gate.metric.startswith("server_") and len({side.definition for side in asked}) > 1:
        return ended("the servers tell it by different clocks, which are different quantities")
    interval, paired = samples.measured(sides[1], gate.statistic), False
    if gate.kind != "absolute":
        found = samples.contrast(*sides, gate.statistic, gate.kind)
        interval, paired = found.interval, found.paired
    if interval is None:
        reason, more = _too_few(gate, asked)
        return ended(reason, remedy=more)
    bar = bars.get(gate.metric)
    if bar is not None and gate.kind == "ratio" and said.first_value:
        bar /= said.first_value
    outcome, reason, more = _decide(gate, interval, bar, asked)
    return ended(reason, outcome=outcome, remedy=more, interval=interval, error_bar=bar, paired=paired)


def exit_code(outcomes: Collection[str], allow_undecided: bool = False) -> int:
    """0: all pass. 1: one failed, or has not enough data (unless that is allowed). 4: an INVALID run."""
    if "invalid run" in outcomes:
        return 4
    return 1 if "fail" in outcomes or ("not enough data" in outcomes and not allow_undecided) else 0


def as_row(judged: Judged) -> dict[str, Any]:
    """As summary.json holds it; what ends in _shown is as tables show it."""
    gate, interval = judged.gate, judged.interval
    row: dict[str, Any] = msgspec.to_builtins(judged)
    del row["gate"]
    return row | {
        "text": gate.text,
        "metric": gate.metric,
        "statistic": gate.statistic,
        "figure": gate.figure,
        "operator": "<=" if gate.upper else ">=",
        "kind": gate.kind,
        "limit": gate.limit,
        "interval": None if interval is None else msgspec.to_builtins(interval),
        "error_unknown": interval is not None and judged.error_bar is None and gate.metric in samples.CALIBRATED,
        "measured_shown": measured_words(judged),
        "interval_shown": interval_words(judged),
    }


def shown(gate: Gate, value: float | None) -> str:
    """A value of what is judged: with its unit; differences with a sign, ratios as their difference in %."""
    if value is None:
        return "–"
    if gate.kind == "ratio":
        return f"{(value - 1) * 100:+,.1f} %"
    return ("+" if gate.kind == "difference" and value > 0 else "") + figure_shown(unit_of(gate.metric), value)


def figure_shown(unit: str, value: float | None) -> str:
    """A figure with its unit."""
    if value is None:
        return "–"
    if unit == "share":  # finer than elsewhere: limits on errors are small
        return f"{value * 100:.3g} %"
    return f"{units.number(value, unit)} {units.shown_unit(unit)}"


def measured_words(judged: Judged) -> str:
    """The figure of both sides, or of the one that is judged."""
    value = figure_shown(judged.unit, judged.value)
    return value if judged.gate.kind == "absolute" else f"{figure_shown(judged.unit, judged.first_value)} → {value}"


def interval_words(judged: Judged) -> str:
    """What is judged, with its interval."""
    one = judged.interval
    if one is None:
        return "–"
    ends = f"{shown(judged.gate, one.low)} .. {shown(judged.gate, one.high)}"
    paired = ", paired by prompt" if judged.paired else ""
    return (
        f"{ends}{paired}" if judged.gate.kind == "absolute" else f"{shown(judged.gate, one.estimate)} ({ends}{paired})"
    )


def _decide(
    gate: Gate, interval: Interval, bar: float | None, sides: Sequence[Sample]
) -> tuple[Outcome, str, str | None]:
    limit = shown(gate, gate.limit)
    plain_outcome = _outcome(gate, interval.low, interval.high)
    outcome = _outcome(gate, interval.low - (bar or 0.0), interval.high + (bar or 0.0))
    if outcome == "pass":
        return outcome, f"all of the interval is within {limit}", None
    if outcome == "fail":
        return outcome, f"all of the interval is beyond {limit}", None
    if plain_outcome != "not enough data":
        reason = f"the limit {limit} lies within the instrument's own error ({shown_width(gate, bar)}) of the interval"
        return outcome, reason, _remedy(gate, interval, bar or 0.0, sides)
    return outcome, f"the interval holds the limit {limit}", _remedy(gate, interval, bar or 0.0, sides)


def _outcome(gate: Gate, low: float, high: float) -> Outcome:
    within, beyond = (high <= gate.limit, low > gate.limit) if gate.upper else (low >= gate.limit, high < gate.limit)
    return "pass" if within else "fail" if beyond else "not enough data"


def shown_width(gate: Gate, width: float | None) -> str:
    """A width in the unit of what is judged."""
    return f"{(width or 0) * 100:.2g} %" if gate.kind == "ratio" else figure_shown(unit_of(gate.metric), width)


def _remedy(gate: Gate, interval: Interval, bar: float, sides: Sequence[Sample]) -> str:
    """About how much more would decide, if the figure stays where it is: a width falls as 1 / sqrt(n)."""
    distance = abs(gate.limit - interval.estimate)
    half = interval.high - interval.estimate if gate.limit >= interval.estimate else interval.estimate - interval.low
    if bar and distance <= bar:
        return (
            "no number of requests tells these apart: the instrument's own error is larger; choose a limit further "
            "off, or make that error smaller (more processes, twoclocks calibrate)"
        )
    times = (half / (distance - bar)) if distance > bar else math.inf
    if gate.metric not in SHARES or interval.estimate not in (0, 1):  # where none failed, the width falls as 1 / n
        times = times**2
    if times > _MOST_TIMES:
        return "the figure lies on the limit: no sensible number of requests decides; choose a limit further off"
    return f"if it stays so, about {_round_up(times):g} times as much would decide: {_more(times, sides)}"


def _more(times: float, sides: Sequence[Sample]) -> str:
    runs, requests = max(len(side.values) for side in sides), min(side.requests for side in sides)
    a_side = " a side" if len(sides) > 1 else ""
    if min(len(side.values) for side in sides) >= intervals.REPEATS:
        return f"{math.ceil(runs * times):,} repeats{a_side} in place of {runs}"
    if sides[0].metric in THROUGHPUTS:
        seconds = min(side.seconds for side in sides)
        return f"{_round_up(seconds * times):,.0f} s{a_side} in place of {seconds:,.0f} s"
    return f"{_round_up(requests * times):,.0f} requests{a_side} in place of {requests:,}"


def _round_up(value: float) -> float:
    """To two digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / step) * step


def _too_few(gate: Gate, sides: Sequence[Sample]) -> tuple[str, str | None]:
    needed, count = intervals.least(gate.statistic), min(side.requests for side in sides)
    if gate.metric in SHARES:
        return "a share of none has no ratio", "give an absolute limit, such as error_rate <= 0.1%"
    what = "stretches of time, each as long as a request or two," if gate.metric in THROUGHPUTS else "requests"
    if any(side.units is not None for side in sides):  # of a request with many values neither may be too few
        gaps = min(sum(map(len, side.values)) for side in sides)
        needed, count, what = (needed, gaps, "gaps") if gaps < needed else (intervals.LEAST, count, what)
    if count >= needed:
        return "a figure that is not above zero has no ratio", "give an absolute limit"
    more = "measure for longer" if gate.metric in THROUGHPUTS else f"measure until {needed} or more have ended"
    return f"{count:,} {what} are too few for an interval of {gate.figure}: it takes {needed}", more
