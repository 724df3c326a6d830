"""Intervals: values of requests, run by run -> a figure and how far chance may have moved it. Pure; no files.

How an interval is made:

- One side is drawn `resamples` times. Of a mean, requests are resampled. Of a percentile, its rank is drawn: that of
  the k-th of n resampled values is Beta(k, n + 1 - k), so that no resample is made, however many values there are.
- With three repeats or more, what their figures scatter is added, as a normal: three runs resampled have but ten
  outcomes. With one or two repeats an interval tells how far chance among these requests reaches, and nothing of what
  another run would bring.
- Differences and ratios are taken draw by draw. Paired by prompt, both sides of a draw have the same prompts.
- The middle 95 % of the draws is widened from a normal's to a Student's t with the degrees of freedom by Satterthwaite
  (Biometrics Bulletin 2, 1946), since the scatter of three repeats is itself hardly known.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 8 and 13; Davison and Hinkley, Bootstrap
Methods and their Application (1997), 3.8 on repeats; Woodruff, JASA 47 (1952) on percentiles of values in groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from scipy import stats

from twoclocks.metrics import Floats, Ints

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
STATISTICS: dict[str, Callable[..., Any]] = {
    "mean": np.mean,
    "p50": lambda values, axis=None: np.quantile(values, 0.5, axis=axis),
    "p90": lambda values, axis=None: np.quantile(values, 0.9, axis=axis),
    "p95": lambda values, axis=None: np.quantile(values, 0.95, axis=axis),
    "p99": lambda values, axis=None: np.quantile(values, 0.99, axis=axis),
}
"""Name -> function of (values, axis). A maximum is not among them: another sample's has no bound in this one."""
RESAMPLES, SEED = 2000, 1
LEAST = 5
"""Values of which a mean has an interval; percentiles need more, see `least`."""
REPEATS = 3
"""Repeats from which their scatter is known at all."""
MANY = 1000
"""Units (requests, prompts) above which their resampled mean is drawn as the normal that it then is."""

Prompts = Mapping[str, Floats] | Sequence[Mapping[str, Floats]]
"""Prompt id -> its values; with repeats, one such a run."""
Outcome = Literal["equivalent", "different", "undecided"]


class Interval(msgspec.Struct, frozen=True):
    """A figure with its interval. Unit: that of the values; none for a ratio."""

    estimate: float
    low: float
    high: float
    n: int  # values on the smaller side; of paired intervals, prompts
    level: float = 0.95  # of such intervals, the share that hold the truth
    same: float | None = None  # what no difference would be: 0 of differences, 1 of ratios


class _Drawn(msgspec.Struct, frozen=True):
    """One side, drawn again and again."""

    estimate: float
    draws: Floats  # (resamples,)
    freedom: float  # degrees of freedom of the draws' variance
    n: int


def least(statistic: str, level: float = 0.95) -> int:
    """The number of values below which no interval is given.

    An interval of a percentile ends at values of the sample. Below this number all of them lie on one side of the true
    percentile more often than the interval may miss it on that side: 6 for p50, 36 for p90, 72 for p95, 368 for p99.
    """
    if statistic not in QUANTILES:
        return LEAST
    q = QUANTILES[statistic]
    return max(LEAST, math.ceil(math.log((1 - level) / 2) / math.log(max(q, 1 - q))))


def estimate(
    groups: Sequence[Floats],
    statistic: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    *,
    level: float = 0.95,
    units: Sequence[Ints] | None = None,
) -> Interval | None:
    """The statistic over all values, with its interval; None below `least` values.

    ``groups``: an array of values a repeat (run). ``units``: in the same form, the request that each value is of, where
    a request has many (gaps); requests are then resampled with all their values. NaN is left out.
    """
    side = _draw(groups, statistic, resamples, np.random.default_rng(seed), level, units)
    if side is None:
        return None
    smallest = min(float(np.nanmin(group)) for group in groups if not np.isnan(group).all())
    return _interval(side.estimate, side.draws, side.freedom, side.n, level, least_value=smallest)


def difference(
    first: Sequence[Floats],
    other: Sequence[Floats],
    statistic: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    *,
    level: float = 0.95,
    units: tuple[Sequence[Ints], Sequence[Ints]] | None = None,
) -> Interval | None:
    """statistic(other) - statistic(first), each side drawn by itself; None where a side has too few values."""
    sides = _both(first, other, statistic, resamples, seed, level, units)
    return None if sides is None else _minus(*sides, level)


def ratio(
    first: Sequence[Floats],
    other: Sequence[Floats],
    statistic: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    *,
    level: float = 0.95,
    units: tuple[Sequence[Ints], Sequence[Ints]] | None = None,
) -> Interval | None:
    """statistic(other) / statistic(first), likewise; None too where a side is not above zero."""
    sides = _both(first, other, statistic, resamples, seed, level, units)
    return None if sides is None else _over(*sides, level)


def paired_difference(
    first: Prompts,
    other: Prompts,
    statistic: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    *,
    level: float = 0.95,
) -> Interval | None:
    """statistic(other) - statistic(first) over the prompts that both have; None below `least` prompts.

    ``first``, ``other``: prompt id -> its values; with repeats, one such a run. Each draw takes the same prompts on
    both sides, with all their values; so what makes one prompt slower than another cancels out, and the interval speaks
    of other prompts of the kind. What changes from run to run is in it from three repeats on, if given run by run.
    """
    sides = _draw_paired(first, other, statistic, resamples, seed, level)
    return None if sides is None else _minus(*sides, level, paired=True)


def paired_ratio(
    first: Prompts,
    other: Prompts,
    statistic: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    *,
    level: float = 0.95,
) -> Interval | None:
    """statistic(other) / statistic(first), paired likewise; None too where a side is not above zero."""
    sides = _draw_paired(first, other, statistic, resamples, seed, level)
    return None if sides is None else _over(*sides, level, paired=True)


def equivalent(interval: Interval, margin: float) -> Outcome:
    """Two one-sided tests at 5 %: is a difference within +-margin, or a ratio within 1/(1 + margin) .. 1 + margin?

    ``interval``: a difference or ratio at level 0.9 (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987: equivalent at
    5 % where the 90 % interval lies within the margins). Wholly within: equivalent. Wholly beyond one: different. Else
    undecided; a small sample is never equivalent by being small. Raises ValueError for another level or kind.
    """
    if interval.same is None or not math.isclose(interval.level, 0.9):
        raise ValueError("equivalence needs the 90 % interval of a difference or ratio: pass level=0.9 when it is made")
    lowest, highest = (-margin, margin) if interval.same == 0 else (1 / (1 + margin), 1 + margin)
    if lowest <= interval.low and interval.high <= highest:
        return "equivalent"
    return "different" if interval.low > highest or interval.high < lowest else "undecided"


def _both(
    first: Sequence[Floats],
    other: Sequence[Floats],
    statistic: str,
    resamples: int,
    seed: int,
    level: float,
    units: tuple[Sequence[Ints], Sequence[Ints]] | None,
) -> tuple[_Drawn, _Drawn] | None:
    rng = np.random.default_rng(seed)
    of_first, of_other = units or (None, None)
    one = _draw(first, statistic, resamples, rng, level, of_first)
    two = _draw(other, statistic, resamples, rng, level, of_other)
    return None if one is None or two is None else (one, two)


def _draw(
    groups: Sequence[Floats],
    statistic: str,
    resamples: int,
    rng: np.random.Generator,
    level: float,
    units: Sequence[Ints] | None,
) -> _Drawn | None:
    """One side. Every statistic is made of shares or sums of its units (requests), run by run."""
    known = [~np.isnan(group) for group in groups]
    runs = [np.asarray(group, dtype=np.float64)[keep] for group, keep in zip(groups, known, strict=True)]
    runs = [run for run in runs if len(run)]
    values = np.concatenate(runs) if runs else np.empty(0)
    if len(values) < least(statistic, level):
        return None
    if units is not None:
        codes = [_numbered(np.asarray(unit)[keep]) for unit, keep in zip(units, known, strict=True) if keep.any()]
        if sum(int(code.max()) + 1 for code in codes) < LEAST:
            return None
    else:
        codes = [np.arange(len(run)) for run in runs]
    found = float(STATISTICS[statistic](values))
    ends = np.cumsum([len(run) for run in runs])[:-1]
    scored = np.split(_scores(values, statistic, found), ends)
    scores = [_sums(of_run, code) for of_run, code in zip(scored, codes, strict=True)]
    within, between = _variances(scores, statistic)
    of_units = sum(len(counts) for _, counts in scores) - len(runs) if statistic == "mean" else math.inf
    freedom = _satterthwaite((within, of_units), (between, max(1, len(runs) - 1)))
    if statistic == "mean":
        draws = found + _resampled(scores, resamples, rng) + math.sqrt(between) * rng.standard_normal(resamples)
    else:
        draws = _ranked(values, QUANTILES[statistic], within + between, rng.uniform(size=resamples))
    return _Drawn(found, draws, freedom, len(values))


def _draw_paired(
    first: Prompts, other: Prompts, statistic: str, resamples: int, seed: int, level: float
) -> tuple[_Drawn, _Drawn] | None:
    """Both sides, drawn with the same prompts; what repeats scatter is drawn for each side by itself."""
    rng = np.random.default_rng(seed)
    sides = [[side] if isinstance(side, Mapping) else list(side) for side in (first, other)]
    told = [{key for run in side for key, values in run.items() if not np.isnan(values).all()} for side in sides]
    common = told[0] & told[1]
    prompts = [key for key in dict.fromkeys(key for run in sides[0] for key in run) if key in common]
    if len(prompts) < least(statistic, level):
        return None
    columns = [_columns(side, prompts) for side in sides]
    pooled, codes = [values for values, _, _ in columns], [code for _, code, _ in columns]
    found = [float(STATISTICS[statistic](values)) for values in pooled]
    if max(map(len, pooled)) <= MANY:
        weights = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=resamples)
        weights = weights.astype(np.int32)
        draws = [_weighted(values, weights[:, code], statistic) for values, code in zip(pooled, codes, strict=True)]
    else:
        draws = _draw_moved(pooled, codes, statistic, found, resamples, rng)
    scatter = [
        _scattered(values, run, statistic, middle, resamples, rng)
        for (values, _, run), middle in zip(columns, found, strict=True)
    ]
    # as parts of the figures, so that they have a common measure
    parts = [(drawn / (abs(middle) or 1.0)) for drawn, middle in zip(draws, found, strict=True)]
    freedom = _satterthwaite(
        (float((parts[1] - parts[0]).var()), len(prompts) - 1),
        *((float((by / (abs(middle) or 1.0)).var()), max(1, len(side) - 1))
          for by, middle, side in zip(scatter, found, sides, strict=True)),
    )  # fmt: skip
    one, two = (
        _Drawn(middle, drawn + by, freedom, len(prompts))
        for middle, drawn, by in zip(found, draws, scatter, strict=True)
    )
    return one, two


def _columns(side: Sequence[Mapping[str, Floats]], prompts: Sequence[str]) -> tuple[Floats, Ints, Ints]:
    """Values of these prompts, and of each the number of its prompt and of its repeat."""
    known = [
        (prompt, number, values[~np.isnan(values)])
        for number, run in enumerate(side)
        for prompt, key in enumerate(prompts)
        if (values := np.asarray(run.get(key, ()), dtype=np.float64)).size
    ]
    counts = [len(values) for _, _, values in known]
    return (
        np.concatenate([values for _, _, values in known]),
        np.repeat([prompt for prompt, _, _ in known], counts),
        np.repeat([number for _, number, _ in known], counts),
    )


def _scattered(
    values: Floats, repeats: Ints, statistic: str, found: float, resamples: int, rng: np.random.Generator
) -> Floats:
    """How far from run to run the statistic scatters, drawn; zeros below REPEATS."""
    sums = [_sums(_scores(values, statistic, found)[repeats == one], repeats[repeats == one]) for one in set(repeats)]
    _, between = _variances(sums, statistic)
    if statistic == "mean" or between == 0:
        return math.sqrt(between) * rng.standard_normal(resamples)
    return _ranked(values, QUANTILES[statistic], between, rng.uniform(size=resamples)) - found


def _weighted(values: Floats, weights: Ints, statistic: str) -> Floats:
    """The statistic of each resample, in which values stand as often as its row of ``weights`` says."""
    if statistic == "mean":
        means: Floats = weights @ values / weights.sum(axis=1)
        return means
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1, dtype=np.int32)
    rank = QUANTILES[statistic] * (reached[:, -1:] - 1)
    lower, upper = ((reached > np.floor(rank) + step).argmax(axis=1) for step in (0, 1))
    upper = np.maximum(lower, upper)  # there is nothing above the last
    share = (rank % 1)[:, 0]
    return np.asarray((1 - share) * values[order][lower] + share * values[order][upper])


def _draw_moved(
    pooled: Sequence[Floats],
    codes: Sequence[Ints],
    statistic: str,
    found: Sequence[float],
    resamples: int,
    rng: np.random.Generator,
) -> list[Floats]:
    """Both sides of many values: their means (of percentiles, their ranks) scatter together as normals do."""
    shares = []
    for values, code, middle in zip(pooled, codes, found, strict=True):
        sums, counts = _sums(_scores(values, statistic, middle), code)
        shares.append(_centred(sums, counts) / counts.sum())
    size = len(shares[0])
    spread = np.stack(shares) @ np.stack(shares).T * size / (size - 1)
    moved = rng.multivariate_normal(np.zeros(2), spread, size=resamples, method="eigh").T
    if statistic == "mean":
        return [middle + by for middle, by in zip(found, moved, strict=True)]
    scatter = np.maximum(np.sqrt(np.diag(spread)), 1e-12)
    chances = stats.norm.cdf(moved / scatter[:, None])
    return [
        _ranked(values, QUANTILES[statistic], float(by) ** 2, chance)
        for values, by, chance in zip(pooled, scatter, chances, strict=True)
    ]


def _scores(values: Floats, statistic: str, found: float) -> Floats:
    """What each value adds to the statistic: to a mean, value - mean; to a percentile's rank, whether it lies below it
    (half, where it is the percentile), less the share that does.
    """
    if statistic == "mean":
        return values - found
    below = (values < found) + 0.5 * (values == found)
    return np.asarray(below - below.mean())


def _sums(scores: Floats, codes: Ints) -> tuple[Floats, Floats]:
    """Of each unit, the sum of the scores of its values, and their number."""
    unit = _numbered(codes)
    sums = np.bincount(unit, weights=scores).astype(np.float64)
    return sums, np.bincount(unit).astype(np.float64)


def _numbered(codes: Ints) -> Ints:
    """The units of values as numbers from 0 on; of millions that stand in order without a sort."""
    steps = np.diff(codes)
    if (steps >= 0).all():
        return np.concatenate([[0], np.cumsum(steps > 0)])[: len(codes)]
    numbered: Ints = np.unique(codes, return_inverse=True)[1]
    return numbered


def _variances(scores: Sequence[tuple[Floats, Floats]], statistic: str) -> tuple[float, float]:
    """Variances of the statistic (of a percentile: of its rank), from units within runs and from run to run.

    From run to run: zero below three runs, where it cannot be told. What chance among the requests adds to the scatter
    of the runs is not taken off, as resampling runs and requests in them does not: a little too wide is honest.
    """
    total = sum(float(counts.sum()) for _, counts in scores)
    within = sum(len(sums) * float(np.var(_centred(sums, counts), ddof=1)) for sums, counts in scores if len(sums) > 1)
    if statistic in QUANTILES:  # values that are alike hide what chance does to a rank
        within = max(within, QUANTILES[statistic] * (1 - QUANTILES[statistic]) * total)
    runs = len(scores)
    between = sum(float(sums.sum()) ** 2 for sums, _ in scores) * runs / (runs - 1) if runs >= REPEATS else 0.0
    return within / total**2, between / total**2


def _centred(sums: Floats, counts: Floats) -> Floats:
    return sums - counts * float(sums.sum() / counts.sum())


def _resampled(scores: Sequence[tuple[Floats, Floats]], resamples: int, rng: np.random.Generator) -> Floats:
    """What resampling the units within each run adds to the mean; (resamples,)."""
    total = sum(float(counts.sum()) for _, counts in scores)
    moved = np.zeros(resamples)
    for sums, counts in scores:
        centred, size = _centred(sums, counts), len(sums)
        if size > MANY:
            moved += rng.normal(0, math.sqrt(size) * centred.std(ddof=1), resamples)
        elif size > 1:
            # a resample scatters as the sample itself does, which is (size - 1) / size of the truth
            drawn = centred[rng.integers(0, size, (resamples, size))].sum(axis=1)
            moved += drawn * math.sqrt(size / (size - 1))
    return moved / total


def _ranked(values: Floats, q: float, variance: float, chances: Floats) -> Floats:
    """A percentile, drawn by its rank: a Beta of mean q and of this variance, which for n values alone is that of the
    resampled one; ``chances`` are uniform.
    """
    size = max(q * (1 - q) / variance - 1, 1.0)
    ranks = stats.beta.ppf(chances, q * size, (1 - q) * size)
    return np.asarray(np.quantile(values, ranks, method="hazen"))


def _minus(first: _Drawn, other: _Drawn, level: float, paired: bool = False) -> Interval:
    drawn, freedom, n = other.draws - first.draws, _freedom(first, other, paired), min(first.n, other.n)
    return _interval(other.estimate - first.estimate, drawn, freedom, n, level, same=0.0)


def _over(first: _Drawn, other: _Drawn, level: float, paired: bool = False) -> Interval | None:
    """In logarithms, where a ratio's scatter is even, so that B / A says what A / B says."""
    if first.estimate <= 0 or other.estimate <= 0:
        return None
    one, two = (
        msgspec.structs.replace(
            side,
            estimate=math.log(side.estimate),
            draws=np.log(np.maximum(side.draws, side.estimate * 1e-3)),  # a mean's draws may fall below zero
        )
        for side in (first, other)
    )
    logs = _minus(one, two, level, paired)
    estimate, low, high = (math.exp(end) for end in (logs.estimate, logs.low, logs.high))
    return Interval(estimate, low, high, logs.n, level, same=1.0)


def _freedom(first: _Drawn, other: _Drawn, paired: bool) -> float:
    if paired:
        return min(first.freedom, other.freedom)
    return _satterthwaite(*((float(side.draws.var()), side.freedom) for side in (first, other)))


def _satterthwaite(*parts: tuple[float, float]) -> float:
    """Degrees of freedom of a sum of variances, each with its own."""
    scatter = sum(variance**2 / freedom for variance, freedom in parts)
    return sum(variance for variance, _ in parts) ** 2 / scatter if scatter > 0 else math.inf


def _interval(
    estimate: float, draws: Floats, freedom: float, n: int, level: float, same: float | None = None,
    least_value: float = -math.inf,
) -> Interval:  # fmt: skip
    tail = (1 - level) / 2
    widened = float(stats.t.ppf(1 - tail, freedom) / stats.norm.ppf(1 - tail)) if freedom < 1e6 else 1.0
    low, high = (float(end) for end in np.quantile(draws, (tail, 1 - tail)))
    below = estimate - widened * (estimate - low)
    low, high = min(low, below), max(high, estimate + widened * (high - estimate))
    if low < 0 <= least_value:  # no interval says of a duration that it may be negative
        low = 0.0
    return Interval(estimate, low, high, n, level, same)
