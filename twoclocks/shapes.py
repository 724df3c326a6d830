"""Shapes: when requests are due in an open loop. Pure: the keys of `load` in, times out.

A closed loop (ramp, steps) has no such times: there a request is due when the answer before it has ended. Times are
seconds since the measuring window began, ascending. The same seed gives the same times on every worker, each of which
takes its share of them.
"""

import bisect
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Load
from twoclocks.prompts import Prompt

OPEN = ("rate", "trace", "batch")
"""Shapes in which requests leave when they are due, whether or not earlier ones have come back."""

Point = tuple[float, float]  # seconds, requests/s


def is_open(load: Load) -> bool:
    """Is this an open loop?"""
    return load.shape in OPEN


def length_s(load: Load) -> float:
    """How long the measuring window is meant to be."""
    return sum(hold for _, hold in load.steps) if load.shape == "steps" else load.duration_s


def first_users(load: Load, processes: int) -> int:
    """Locust users to begin with: in an open loop one a process sends all that is due there."""
    if is_open(load):
        return processes
    return load.steps[0][0] if load.shape == "steps" else load.users


def most_streams(load: Load) -> int | None:
    """How many requests are under way at once at most, as the load says it; None where the server decides that."""
    if load.shape == "batch":
        return load.batch
    return None if is_open(load) else max((users for users, _ in load.steps), default=load.users)


def arrival_times(load: Load, trace: Sequence[float | None] = ()) -> Iterator[float]:
    """When each request is due; ``trace``: the `at` of the prompts, in their order. No clock says when a batch is."""
    if load.shape == "trace":
        begin, end = (0.0, math.inf) if load.trace_window_s == "none" else load.trace_window_s
        kept = (at for at in trace if at is not None and begin <= at < end)
        return _before((load.trace_scale * (at - begin) for at in kept), load.duration_s)
    points = [(0.0, float(load.rate))] if isinstance(load.rate, int | float) else load.rate
    return _before(_at_rate(_unit_arrivals(load), points), load.duration_s)


def share_of(values: Iterable[float], share: int, shares: int) -> Iterator[float]:
    """Every ``shares``-th of them, from number ``share`` on; nothing for one who came after the shares were dealt."""
    return itertools.islice(values, share, None, shares) if share < shares else iter(())


def count_of(total: int, share: int, shares: int) -> int:
    """How many of ``total`` fall to one share."""
    return total // shares + (share < total % shares) if share < shares else 0


def due_within(load: Load, trace: Sequence[float | None], seconds: float, share: int, shares: int) -> int | None:
    """How many requests of a share the clock makes due so far into the window; None where it makes none due."""
    if load.shape not in ("rate", "trace"):
        return None
    times = _before(share_of(arrival_times(load, trace), share, shares), seconds)
    most = None if load.requests == "none" else count_of(load.requests, share, shares)
    return sum(1 for _ in itertools.islice(times, most))


def in_window(prompts: list[Prompt], load: Load) -> list[Prompt]:
    """The prompts of a trace that lie in its window, by time; of any other shape all. Raises ExperimentError."""
    if load.shape != "trace":
        return prompts
    begin, end = (0.0, math.inf) if load.trace_window_s == "none" else load.trace_window_s
    kept = [prompt for prompt in prompts if prompt.at is not None and begin <= prompt.at < end]
    if not kept:
        raise ExperimentError(
            "load.shape trace: no request has an 'at' inside load.trace_window_s; requests/README.md tells how"
        )
    return sorted(kept, key=lambda prompt: prompt.at or 0.0)


class Dealt(TypedDict):
    """What of the load falls to one process: fields of user.Sender."""

    arrivals: Iterator[float] | None
    left: int | None


def dealt(load: Load, prompts: Sequence[Prompt], share: int = 0, shares: int = 1) -> Dealt:
    """Share number ``share`` of ``shares``."""
    times = None
    if load.shape in ("rate", "trace"):
        times = share_of(arrival_times(load, [prompt.at for prompt in prompts]), share, shares)
    return Dealt(arrivals=times, left=None if load.requests == "none" else count_of(load.requests, share, shares))


def _unit_arrivals(load: Load) -> Iterator[float]:
    """Arrivals at one a second: gaps all 1, exponential, or gamma of shape `burstiness` and mean 1 (as in vLLM)."""
    rng, at = random.Random(load.seed), 0.0
    while True:
        if load.arrivals == "constant":
            yield at
            at += 1
        else:
            at += (
                rng.expovariate(1)
                if load.arrivals == "poisson"
                else rng.gammavariate(load.burstiness, 1 / load.burstiness)
            )
            yield at


def _at_rate(unit: Iterable[float], points: Sequence[Point]) -> Iterator[float]:
    """Arrivals at one a second, bent to a rate that runs in straight lines through the points and stays at the last.

    The n-th arrival comes when the integral of the rate has reached the n-th unit arrival, which keeps a Poisson
    process one (Cinlar 1975). Ends where the rate stays zero.
    """
    points = [(0.0, points[0][1]), *points, (math.inf, points[-1][1])]
    totals = [0.0]  # the integral of the rate up to each point
    for (before, low), (after, high) in itertools.pairwise(points[:-1]):
        totals.append(totals[-1] + (after - before) * (low + high) / 2)
    for due in unit:
        index = bisect.bisect_right(totals, due) - 1
        (start, low), (end, high) = points[index], points[index + 1]
        slope = (high - low) / (end - start) if end > start and not math.isinf(end) else 0.0
        left = due - totals[index]
        root = low + math.sqrt(max(0.0, low * low + 2 * slope * left))
        if root == 0 and (left > 0 or math.isinf(end)):
            return  # the rate is zero from here on
        # left = low t + slope t^2 / 2, solved in the form that does not cancel for a small slope
        yield start + (2 * left / root if root else 0.0)


def _before(times: Iterable[float], end: float) -> Iterator[float]:
    return itertools.takewhile(lambda at: at < end, times)
