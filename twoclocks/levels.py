"""Levels: which values a sweep or a search tries next, and what a level's requests say of it. Pure; runs nothing.

A search is a function from the probes so far to the next one, so that it can be resumed, and tried without a server.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, LevelRange, Search, Sweep, is_study

Judgement = Literal["pass", "fail", "undecided"]
Z = 1.96
"""Of a two-sided interval of 95 %."""
Z_PILE = 2.33
"""Of a one-sided level of 1 %: a search asks it of a dozen probes, and one false alarm low down ends it there."""

RULE = (
    "A probe passes if the Wilson 95 % interval of its share of good requests lies at or above slo.share, and fails if "
    "it lies below. If slo.share lies inside, the probe is undecided: it is repeated once, for twice as long, where "
    "the probes that are left allow it, and judged by the requests of both; if it is undecided still, the share itself "
    "decides. Over rates, a probe also fails if the server did not keep up: requests piled up by more than chance "
    "explains (at 1 %) while fewer ended than the rate asks for, or some were due and could not leave."
)


class Evidence(msgspec.Struct, frozen=True):
    """What the requests of one run say: counts, and whether they piled up."""

    requests: int  # measured
    good: int  # of them, that met every limit of the SLO
    kept_up: bool | None = None  # of an open loop; None: not asked, or too short to say


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A value that was tried, once or twice, and what came of it."""

    value: float
    judgement: Judgement
    passed: bool
    share: float | None  # of good requests; None: none was measured
    low: float | None = None  # Wilson interval of the share
    high: float | None = None
    requests: int = 0
    runs: int = 1


class Next(msgspec.Struct, frozen=True):
    """What to run."""

    value: float
    longer: bool = False  # a repetition, for twice as long


class Found(msgspec.Struct, frozen=True):
    """Where a search has come to an end."""

    value: float | None  # the highest that passed; None: none did
    failed: float | None  # the lowest that failed; None: none did
    why: str


def one_run_only(experiment: Experiment) -> None:
    """Raises ExperimentError for what is several runs, which Locust alone cannot make."""
    load = experiment.load
    if is_study(experiment):
        names = ", ".join(str(one["name"]) for one in experiment.targets)
        raise ExperimentError(
            "targets, variants, repeats: are a run for each; start it with: twoclocks run EXPERIMENT.yaml"
            + (f", or choose one with --target NAME (there: {names})" if names else "")
        )
    if experiment.target.api == "in-process":
        raise ExperimentError(
            "target.api in-process: runs without Locust; start it with: twoclocks run EXPERIMENT.yaml"
        )
    if load.shape in ("sweep", "search"):
        raise ExperimentError(
            f"load.shape {load.shape}: is a run for each level; start it with: twoclocks run EXPERIMENT.yaml"
        )


def sweep_levels(sweep: Sweep) -> list[float]:
    """The values of a sweep, in the order in which they are run; users rounded to whole ones, doubles left out."""
    levels = sweep.levels
    if isinstance(levels, LevelRange):
        parts = [number / (levels.count - 1) for number in range(levels.count)]
        if levels.scale == "log":
            levels = [levels.first * (levels.to / levels.first) ** part for part in parts]
        else:
            levels = [levels.first + (levels.to - levels.first) * part for part in parts]
        levels = [float(f"{value:.6g}") for value in levels]
    if sweep.over == "users":
        levels = [float(max(1, round(value))) for value in levels]
    return list(dict.fromkeys(levels))


def wilson(good: int, requests: int) -> tuple[float, float]:
    """Wilson score interval, 95 %, of the share good / requests (Wilson 1927): sound for few requests and near 1."""
    share, z2 = good / requests, Z * Z
    centre = (share + z2 / (2 * requests)) / (1 + z2 / requests)
    half = Z / (1 + z2 / requests) * math.sqrt(share * (1 - share) / requests + z2 / (4 * requests**2))
    # at either end the two are alike, but for what rounding leaves
    return max(0.0, centre - half) if good else 0.0, min(1.0, centre + half) if good < requests else 1.0


def keeps_up(arrived: int, ended: int, variance: float) -> bool:
    """Did a server finish what came in a stretch of time? ``variance``: of the number in flight at one instant.

    arrived - ended is the number in flight at the end minus that at the beginning. In a stable system the two are as
    good as independent, so that chance gives it a variance of twice ``variance``. More than all but 1 % of that is
    piling up.
    """
    return arrived - ended <= 1 + Z_PILE * math.sqrt(2 * max(variance, 0.0))


def judge(value: float, evidence: Sequence[Evidence], share: float) -> Probe:
    """The judgement of all runs at one value. See RULE."""
    requests, good = sum(one.requests for one in evidence), sum(one.good for one in evidence)
    if not requests:
        return Probe(value=value, judgement="fail", passed=False, share=None, runs=len(evidence))
    low, high = wilson(good, requests)
    if evidence[-1].kept_up is False:  # the longest of them tells best
        judgement: Judgement = "fail"
    else:
        judgement = "pass" if low >= share else "fail" if high < share else "undecided"
    passed = judgement == "pass" or (judgement == "undecided" and good / requests >= share)
    return Probe(
        value=value,
        judgement=judgement,
        passed=passed,
        share=good / requests,
        low=low,
        high=high,
        requests=requests,
        runs=len(evidence),
    )


def bracket(probes: Sequence[Probe]) -> tuple[float | None, float | None]:
    """(highest that passed below the lowest that failed, lowest that failed)."""
    failed = min((probe.value for probe in probes if not probe.passed), default=None)
    passed = [probe.value for probe in probes if probe.passed and (failed is None or probe.value < failed)]
    return max(passed, default=None), failed


def next_probe(search: Search, probes: Sequence[Probe]) -> Next | Found:
    """What to try after these probes, or what was found.

    Doubling from ``low`` until a probe fails or ``high`` has passed, then halving the bracket by its geometric mean
    until its ends are within ``tolerance`` of each other; users are whole, and end with neighbours.
    """
    low = round(search.low) if search.over == "users" else search.low
    if not probes:
        return Next(low)
    left = search.probes - sum(probe.runs for probe in probes)
    passed, failed = bracket(probes)
    last = probes[-1]
    if last.judgement == "undecided" and last.runs == 1 and left > _needed(search, passed or low, failed):
        return Next(last.value, longer=True)
    if passed is None:
        return Found(None, failed, f"the SLO is not met at load.search.low = {low:g}; nothing above it was tried")
    if failed is None and search.high != "none" and passed >= search.high:
        return Found(passed, None, f"the SLO is still met at load.search.high = {search.high:g}")
    if failed is not None and _close(search, passed, failed):
        return Found(passed, failed, "the interval is as narrow as was asked")
    if left <= 0:
        return Found(passed, failed, f"the {search.probes} probes of load.search.probes are used up")
    if failed is None:
        return Next(2 * passed if search.high == "none" else min(2 * passed, search.high))
    middle = math.sqrt(passed * failed)
    if search.over == "users":
        return Next(float(min(max(round(middle), passed + 1), failed - 1)))
    return Next(float(f"{middle:.6g}"))


def _close(search: Search, passed: float, failed: float) -> bool:
    return failed <= passed * (1 + search.tolerance) or (search.over == "users" and failed - passed <= 1)


def _needed(search: Search, passed: float, failed: float | None) -> int:
    """Probes to the end of the search, as far as can be known: while nothing failed, the next one may."""
    wide = failed / passed if failed is not None else 2.0
    halvings = math.ceil(math.log2(max(1.0, math.log(wide) / math.log1p(search.tolerance))))
    return halvings + (failed is None)
