"""Buckets: what a histogram gained -> its mean, its percentiles as intervals, and its shape where it has one.

Pure functions over arrays; knows no server. The client's samples are counted into a server's buckets here too, so that
the two can be held against each other without interpolating.
"""

import math
from dataclasses import dataclass

import numpy as np

from twoclocks.metrics import Floats

OCCUPIED = 5
"""A density is drawn from at least this many buckets with something in them ..."""
LARGEST_SHARE = 0.5
"""... of which none holds more than this share: else its shape is that of the buckets."""


@dataclass(frozen=True)
class Interval:
    """A percentile read from buckets: surely inside (lower, upper); estimate is None where a guess would mislead."""

    lower: float
    estimate: float | None
    upper: float


@dataclass(frozen=True)
class Distribution:
    """What a histogram gained between two scrapes."""

    count: float
    sum: float
    bounds: Floats  # upper bounds of the buckets, the last one infinite; empty where there are no buckets to trust
    counts: Floats  # observations inside each bucket
    names: tuple[str, ...] = ()  # under which it was read
    definition: str = ""  # of those names: start, stop and weight
    beside: str = ""  # the client's figure of the same quantity, if it has one
    since_restart: bool = False  # counted from the first scrape after a restart on: a lower bound, not the whole window
    caveats: tuple[str, ...] = ()  # what else is not as it should be, a plain sentence each
    mean_error: float = 0.0  # the mean is known to within this, where a server rounds its counters

    @property
    def mean(self) -> float:
        """Sum / count, exact; NaN without observations."""
        return self.sum / self.count if self.count else math.nan

    def percentile(self, p: float) -> Interval | None:
        """The bucket of rank p x count (p in 0..1), and the linear interpolation inside it.

        No estimate in the first bucket, which reaches from 0 and is often far wider than what lies in it (vLLM's queue
        and prefill: 0-0.3 s), nor in the last, which has no end. None without observations.
        """
        cumulative = np.cumsum(self.counts)
        if not len(cumulative) or cumulative[-1] <= 0:
            return None
        rank = p * float(cumulative[-1])
        index = int(np.searchsorted(cumulative, rank))
        while self.counts[index] == 0:  # rank on the edge of an empty bucket
            index += 1
        upper = float(self.bounds[index])
        lower = min(0.0, upper) if index == 0 else float(self.bounds[index - 1])
        if lower == upper:  # a bucket of zeros, such as the first one of SGLang's queue time
            return Interval(lower, lower, upper)
        if index == 0 or math.isinf(upper):
            return Interval(lower, None, upper)
        below = float(cumulative[index] - self.counts[index])
        return Interval(lower, lower + (rank - below) / float(self.counts[index]) * (upper - lower), upper)


@dataclass(frozen=True)
class StepDensity:
    """The shares of all observations that lie in each finite bucket."""

    edges: Floats  # seconds, one more than shares; from 0
    shares: Floats
    beyond: float  # share above the last finite bound
    n: float

    @property
    def density(self) -> Floats:
        """Share / width of the bucket, 1/s: an area is a share."""
        return np.asarray(self.shares / np.diff(self.edges))


@dataclass(frozen=True)
class Reason:
    """Why a distribution is not drawn as a density."""

    text: str


def step_density(gained: Distribution) -> StepDensity | Reason:
    """The buckets as a density, where they are many and even enough to have a shape of their own (OCCUPIED,
    LARGEST_SHARE).
    """
    if not gained.count:
        return Reason("no observation")
    total = float(gained.counts.sum()) if len(gained.counts) else 0.0
    if total <= 0:
        return Reason("no buckets: " + ("; ".join(gained.caveats) or "only a sum and a count are told"))
    occupied = int((gained.counts > 0).sum())
    if occupied < OCCUPIED:
        holding = "1 bucket holds" if occupied == 1 else f"{occupied} buckets hold"
        return Reason(f"only {holding} anything: too few for a shape")
    largest = int(np.argmax(gained.counts))
    share = float(gained.counts[largest]) / total
    if share > LARGEST_SHARE:
        lower, upper = _edges(gained.bounds)[largest : largest + 2]
        reach = f"{lower * 1e3:g} .. {upper * 1e3:g} ms" if math.isfinite(upper) else f"> {lower * 1e3:g} ms"
        return Reason(f"one bucket ({reach}) holds {share:.0%}: the shape would be the bucket's")
    return as_density(gained.counts, gained.bounds)


def as_density(counts: Floats, bounds: Floats) -> StepDensity:
    """Counts of buckets, of a server or as `binned` gives them, as a density, whether it has a shape or not."""
    finite, total = np.isfinite(bounds), max(float(counts.sum()), 1.0)
    return StepDensity(
        edges=_edges(bounds[finite]),
        shares=counts[finite] / total,
        beyond=float(counts[~finite].sum()) / total,
        n=float(counts.sum()),
    )


def binned(values: Floats, bounds: Floats) -> Floats:
    """How many values lie in each bucket (bound before, bound], as a server would have counted them; NaN nowhere."""
    known = values[~np.isnan(values)]
    inside = np.searchsorted(bounds, known, side="left")
    return np.bincount(inside[inside < len(bounds)], minlength=len(bounds)).astype(np.float64)


def _edges(bounds: Floats) -> Floats:
    """Edges of the buckets: a time is not below 0, where the first one begins."""
    return np.concatenate([[min(0.0, float(bounds[0]))], bounds])
