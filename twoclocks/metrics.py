"""Metrics: arrays of chunk arrivals -> latencies, throughput, goodput. Each definition stands here once, as a formula.

Pure functions over numpy arrays; no files, no DataFrames. Seconds everywhere. The first paragraph of a docstring is
what reports show as the definition (`definition`), so a figure and its meaning cannot drift apart.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.int32]
Bools = NDArray[np.bool_]

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Every chunk of every request, as parallel arrays in arrival order inside a request."""

    request: Rows  # row number of the chunk's request, ascending
    at: Floats  # arrival on the run's clock
    tokens: Floats  # NaN where unknown
    kind: NDArray[np.int8]  # index into record.KINDS
    is_token: Bools  # content, reasoning or tool: what a reader sees
    choice: NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Gaps between successive token chunks of one choice of one request, as parallel arrays."""

    request: Rows
    seconds: Floats
    tokens: Floats  # of the later chunk; NaN where unknown


def definition(function: Callable[..., Any]) -> str:
    """The first paragraph of a metric's docstring, on one line."""
    return " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split())


def distribution(values: Floats) -> dict[str, Any]:
    """n, mean, p50, p95, p99, min, max of the values that are known. Percentiles interpolate linearly."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"n": 0} | dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "min", "max"))
    quantiles = {f"p{p}": float(q) for p, q in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)}
    extremes = {"min": float(known.min()), "max": float(known.max())}
    return {"n": len(known), "mean": float(known.mean()), **quantiles, **extremes}


def first_event(chunks: Chunks, sent_at: Floats) -> Floats:
    """First event = first chunk of any kind (role-only and empty ones too) - sent_at."""
    return _first(chunks.request, chunks.at, len(sent_at)) - sent_at


def ttft(chunks: Chunks, sent_at: Floats) -> Floats:
    """TTFT = first chunk with content, reasoning or a tool call - sent_at (connecting is not in it).

    One value a request; NaN for a request that never got a token.
    """
    return _first(chunks.request[chunks.is_token], chunks.at[chunks.is_token], len(sent_at)) - sent_at


def e2e(chunks: Chunks, sent_at: Floats) -> Floats:
    """E2E = last token chunk - sent_at."""
    return last_token_at(chunks, len(sent_at)) - sent_at


def last_token_at(chunks: Chunks, requests: int) -> Floats:
    """Arrival of the last token chunk of each request; NaN where there is none."""
    last = np.full(requests, np.nan)
    last[chunks.request[chunks.is_token]] = chunks.at[chunks.is_token]  # later ones overwrite: arrival order
    return last


def e2e_per_token(e2e: Floats, output_tokens: Floats) -> Floats:
    """E2E per token = E2E / output tokens (the normalised latency of the vLLM paper)."""
    return _ratio(e2e, output_tokens)


def stream_throughput(e2e: Floats, output_tokens: Floats) -> Floats:
    """Token throughput of one request = output tokens / E2E."""
    return _ratio(output_tokens, e2e)


def chunk_gaps(chunks: Chunks) -> Gaps:
    """ITL as chunk gap = arrival of a token chunk - arrival of the token chunk before it in the same choice;
    each gap counts once, however many tokens the chunk carried.
    """
    request, at, tokens, new_stream = _streams(chunks)
    inside = ~new_stream[1:]
    return Gaps(request[1:][inside], np.diff(at)[inside], tokens[1:][inside])


def per_token_itl(gaps: Gaps) -> Floats:
    """ITL per token = chunk gap / k, counted once for each of the k tokens of the later chunk.

    A chunk of unknown count is taken as one token.
    """
    count = np.where(np.isnan(gaps.tokens), 1, gaps.tokens).astype(np.int64)
    carrying = count > 0
    return np.repeat(gaps.seconds[carrying] / count[carrying], count[carrying])


def tpot(chunks: Chunks, output_tokens: Floats) -> tuple[Floats, Bools]:
    """TPOT = (last token chunk - first token chunk) / (output tokens - tokens in the first chunk), per request;
    undefined for one token.

    With several choices the numerator and the first chunks are summed over the choices, so that it stays the time per
    token of one choice. Returns the values and whether each is an estimate: a first chunk of unknown count is taken
    as one.
    """
    request, at, tokens, new_stream = _streams(chunks)
    starts = np.flatnonzero(new_stream)
    ends = np.append(starts[1:], len(request)) - 1 if len(starts) else starts
    rows = request[starts]
    size = len(output_tokens)
    unknown = np.isnan(tokens[starts])
    span = np.bincount(rows, weights=at[ends] - at[starts], minlength=size).astype(np.float64)  # ints when empty
    later = output_tokens - np.bincount(rows, weights=np.where(unknown, 1, tokens[starts]), minlength=size)
    seen = np.bincount(rows, minlength=size) > 0
    return _ratio(span, np.where(seen, later, np.nan)), np.bincount(rows, weights=unknown, minlength=size) > 0


def arrived_tokens(chunks: Chunks, output_tokens: Floats) -> Floats:
    """Tokens of each chunk, with the unknown counts of a request sharing equally what its output tokens leave over.

    Where the output tokens are unknown too, such a chunk counts as one token.
    """
    unknown = np.isnan(chunks.tokens) & chunks.is_token
    if not unknown.any():
        return np.nan_to_num(chunks.tokens)
    size = len(output_tokens)
    known = np.bincount(chunks.request, weights=np.nan_to_num(chunks.tokens), minlength=size)
    sharers = np.bincount(chunks.request[unknown], minlength=size)
    share = np.where(np.isnan(output_tokens), 1.0, np.maximum(output_tokens - known, 0) / np.maximum(sharers, 1))
    return np.where(unknown, share[chunks.request], np.nan_to_num(chunks.tokens))


def output_throughput(at: Floats, tokens: Floats, window: tuple[float, float]) -> float:
    """Output throughput = tokens that arrived inside the measuring window / its length; tokens of cut-off requests
    count.
    """
    start, end = window
    inside = (at >= start) & (at <= end)
    return float(tokens[inside].sum() / (end - start)) if end > start else float("nan")


def request_throughput(ended_at: Floats, window: tuple[float, float]) -> float:
    """Request throughput = requests that ended ok inside the measuring window / its length."""
    start, end = window
    return float(((ended_at >= start) & (ended_at <= end)).sum() / (end - start)) if end > start else float("nan")


def binned(at: Floats, amounts: Floats, window: tuple[float, float], count: int) -> Floats:
    """What fell into each of ``count`` equal parts of the window, its end included; (count,)."""
    start, end = window
    inside = (at >= start) & (at <= end)
    part = np.floor((at[inside] - start) / (end - start) * count).astype(np.int64)
    sums = np.bincount(np.minimum(part, count - 1), weights=amounts[inside], minlength=count)
    return sums.astype(np.float64)


@dataclass(frozen=True)
class Batches:
    """Whole batches: one entry a batch."""

    seconds: Floats  # the batch's latency
    requests: Ints
    tokens: Floats  # output tokens of all its requests


def batches(batch: Ints, sent_at: Floats, ended_at: Floats, tokens: Floats, whole: Bools) -> Batches:
    """Batch latency = last answer ended - first request sent, of the requests of one batch.

    ``batch``: the number of each request's batch; of batches in which a request is not ``whole`` there is none.
    """
    numbers, row = np.unique(batch, return_inverse=True)
    first, last = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
    np.minimum.at(first, row, sent_at)
    np.maximum.at(last, row, ended_at)
    kept = np.bincount(row, weights=~whole, minlength=len(numbers)) == 0
    made = np.bincount(row, weights=tokens, minlength=len(numbers))
    return Batches((last - first)[kept], np.bincount(row, minlength=len(numbers))[kept], made[kept])


def slo_limits(experiment: Mapping[str, Any]) -> dict[str, float]:
    """The limits set in an experiment, in seconds: {"ttft": 0.5, ...}."""
    slo = experiment.get("slo") or {}
    names = ("ttft", "tpot", "e2e")
    return {name: slo[f"{name}_ms"] / 1e3 for name in names if isinstance(slo.get(f"{name}_ms"), int | float)}


def meets_slo(ok: Bools, values: dict[str, Floats], limits: dict[str, float]) -> Bools:
    """Good request = ended ok, with each of TTFT, TPOT and E2E within its limit.

    An undefined value (TPOT of a one-token answer) has nothing to miss. Failed and cut-off requests are misses, and
    those whose user gave up waiting. Requests that were hung up on as drawn are not to be among them.
    """
    good = ok.copy()
    for name, limit in limits.items():
        good &= ~(values[name] > limit)
    return good


def goodput(good: Bools, window: tuple[float, float]) -> tuple[float, float]:
    """Goodput = requests that met every SLO / the measuring window; as a share, of all measured requests but those
    that were hung up on as workload.cancel_share drew; failed and cut-off ones, and those given up for want of
    patience, counted as misses.
    """
    start, end = window
    met = float(good.sum())
    return (met / (end - start) if end > start else float("nan")), (met / len(good) if len(good) else float("nan"))


def _ratio(above: Floats, below: Floats) -> Floats:
    """Above / below, NaN unless below > 0."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))


def _first(request: Rows, at: Floats, requests: int) -> Floats:
    first = np.full(requests, np.nan)
    starts = _starts(request)
    first[request[starts]] = at[starts]
    return first


def _starts(request: Rows) -> Ints:
    """Where a new request begins in an ascending column."""
    return np.flatnonzero(np.diff(request, prepend=np.int32(-1)))


def mean_and_max(gaps: Gaps, requests: int) -> tuple[Floats, Floats]:
    """ITL mean and ITL max = mean and largest of a request's chunk gaps; NaN for a request without one."""
    mean, largest = np.full(requests, np.nan), np.full(requests, np.nan)
    starts = _starts(gaps.request)
    if len(starts):
        rows, counts = gaps.request[starts], np.diff(starts, append=len(gaps.request))
        mean[rows] = np.add.reduceat(gaps.seconds, starts) / counts
        largest[rows] = np.maximum.reduceat(gaps.seconds, starts)
    return mean, largest


def reading_wait(chunks: Chunks, words: Floats, words_per_s: float, requests: int) -> Floats:
    """Reading wait = how long a reader at a steady pace, who begins at the first token chunk, waits for words in all:
    largest of (arrival - first arrival - words that came before / pace) over the token chunks of an answer.

    ``words``: of each chunk. One value a request, of several choices the largest; NaN without a token chunk. A reader
    who never waits has 0, that of the first chunk.
    """
    seen, request = chunks.is_token, chunks.request[chunks.is_token]
    rows, at, _, new_stream = _streams(chunks)
    order = np.lexsort((chunks.choice[seen], request)) if chunks.choice[seen].any() else slice(None)
    read = words[seen][order] / words_per_s
    wait = np.full(requests, np.nan)
    if len(rows):
        starts = np.flatnonzero(new_stream)
        behind = at - (np.cumsum(read) - read)  # what came before an answer cancels out
        np.fmax.at(wait, rows[starts], np.maximum.reduceat(behind, starts) - behind[starts])
    return wait


def _streams(chunks: Chunks) -> tuple[Rows, Floats, Floats, Bools]:
    """Token chunks ordered by request, choice, arrival; and where a new (request, choice) begins."""
    request, choice = chunks.request[chunks.is_token], chunks.choice[chunks.is_token]
    order = np.lexsort((choice, request)) if choice.any() else slice(None)
    request, choice = request[order], choice[order]
    new = np.ones(len(request), dtype=bool)
    new[1:] = (np.diff(request) != 0) | (np.diff(choice) != 0)
    return request, chunks.at[chunks.is_token][order], chunks.tokens[chunks.is_token][order], new
