"""Rosetta: the arrivals of one run -> what other load testers would report of them, each by its own definitions.

A tool is one pure function over arrays; its docstring says in a first paragraph why its figures differ, in a second one
how each is defined, in a third one where that stands. A figure that a tool does not report is not among its figures.
What lies outside of arrivals is not imitated: a tool's own client, its warm-up, its tokenizer, and what it takes for
a failure. Of all tools the same requests count: the measured ones, answered if they ended ok. An event that carries
several choices is recorded as several chunks, and counts as that many here.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twoclocks.load import Run
from twoclocks.metrics import PERCENTILES, Bools, Floats, Ints, distribution
from twoclocks.record import KINDS, TOKEN_KINDS, Kind

Figures = dict[str, dict[str, Any]]
"""Metric, by its name in summary.json -> {"unit": "s", "n", "mean", "p50", ...} or {"unit": ..., "value"}."""
Limits = Mapping[str, float]
"""The SLO in seconds, by metric: ttft, tpot, e2e; empty where there is none, and then no tool has a goodput."""

LATENCIES = ("ttft", "itl", "tpot", "e2e")
RATES = {"request_throughput": "requests/s", "output_throughput": "tokens/s", "goodput": "requests/s"}
TEXT: tuple[Kind, ...] = ("content", "reasoning")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Some requests and all that arrived of them. Seconds on one clock; NaN where unknown. Arrays of (requests,)."""

    at: Floats  # (chunks,), of these and maybe other requests
    kind: NDArray[np.int8]  # (chunks,), an index into record.KINDS
    tokens: Floats  # (chunks,)
    begin: Ints  # a request's chunks are those from begin to end, in order of arrival; ascending
    end: Ints
    usage_has_choice: bool  # usage comes in the event of a choice, and not in one without any
    began_at: Floats  # when it began to connect; where a connection was open already, sent_at
    sent_at: Floats
    ended_at: Floats  # the end of the stream, [DONE] where it came
    prompt_tokens: Floats
    output_tokens: Floats  # as the server told them, where it did
    ok: Bools
    cut_off: Bools  # by the end of the run, or by its user: no failure of the server


@dataclass(frozen=True, slots=True)
class Seen:
    """The chunks that a tool counts as tokens, all choices as one stream in order of arrival."""

    at: Floats
    place: Ints  # among all chunks
    begin: Ints  # (requests,): a request's are those from begin to end
    end: Ints

    def first(self) -> Floats:
        """(requests,); NaN where there is none."""
        return self._of(self.begin)

    def last(self) -> Floats:
        """(requests,); NaN where there is none."""
        return self._of(self.end - 1)

    def later(self, rows: Bools) -> Bools:
        """Which of these chunks, but for the very first, have one before them in the same one of these requests."""
        several = rows & (self.end - self.begin > 1)
        turns = np.zeros(len(self.at), dtype=np.int8)
        turns[self.begin[several]] = 1
        turns[self.end[several] - 1] = -1
        return np.cumsum(turns[:-1], dtype=np.int8).astype(bool)

    def gaps(self, rows: Bools) -> Floats:
        """Gaps between successive chunks of these requests, request by request."""
        return np.diff(self.at)[self.later(rows)]

    def _of(self, places: Ints) -> Floats:
        found = np.full(len(places), np.nan)
        some = self.end > self.begin
        found[some] = self.at[places[some]]
        return found


@dataclass(frozen=True, slots=True)
class VllmAnswers:
    """What `vllm bench serve` keeps of each request; NaN for one without any event."""

    seen: Seen
    ttft: Floats
    e2e: Floats
    tpot: Floats  # 0 for an answer of one token


def vllm_answers(a: Arrivals) -> VllmAnswers:
    """The events of each request, its TTFT, E2E and TPOT, by the definitions of `vllm`."""
    seen = _counted(a, KINDS if a.usage_has_choice else tuple(kind for kind in KINDS if kind != "usage"))
    ttft, e2e = seen.first() - a.began_at, seen.last() - a.began_at
    return VllmAnswers(seen, ttft, e2e, np.where(a.output_tokens <= 1, 0.0, _tpot(a, ttft, e2e)))


def vllm(a: Arrivals, limits: Limits) -> Figures:
    """Any event with a choice counts as a token, be it empty, role-only or the finish; the drain is in its rates.

    TTFT = first event with a choice - start; the time to connect is in it. ITL = gap between two such events, each
    counted once, however many tokens came in it. TPOT = (E2E - TTFT) / (output tokens - 1), of answers of two tokens
    or more. E2E = last such event - start. Throughput = requests and output tokens of answered requests / (first start
    -> end of the last stream). Goodput = answered requests within all limits / the same time; the TPOT of a one-token
    answer is 0. It takes the server's count of tokens where that comes in an event of its own; else (transformers) it
    counts with a tokenizer, and here the server's count is taken.

    Source: vllm/benchmarks/serve.py (calculate_metrics) and lib/endpoint_request_func.py, vLLM 0.32.
    """
    one = vllm_answers(a)
    ok = a.ok & ~np.isnan(one.ttft)
    good = _within(limits, {"ttft": one.ttft, "tpot": one.tpot, "e2e": one.e2e})[ok]
    return {
        "ttft": _times(one.ttft[ok]),
        "itl": _times(one.seen.gaps(ok)),
        "tpot": _times(one.tpot[ok & (a.output_tokens > 1)]),
        "e2e": _times(one.e2e[ok]),
        **_rates(ok.sum(), a.output_tokens[ok].sum(), whole(a), good.sum() if limits else None),
    }


def sglang(a: Arrivals, limits: Limits) -> Figures:
    """Tool calls are no tokens; E2E, and with it TPOT, ends with [DONE] and not with the last token.

    TTFT = first event with content or reasoning - start; the time to connect is in it, and it would connect for each
    request; 0 for an answer without text. ITL = gap between two such events (its native API, and speculative decoding,
    divide a gap by its tokens). TPOT = (E2E - TTFT) / (output tokens - 1). E2E = end of the stream - start. Throughput
    = requests and output tokens of answered requests / (first start -> end of the last stream). Goodput = answered
    requests within all limits / the same time; the TPOT of a one-token answer is 0.

    Source: sglang/benchmark/serving.py and goodput.py, backend sglang-oai-chat, SGLang 0.5.23.
    """
    seen = _counted(a, TEXT)
    ttft, e2e = np.nan_to_num(seen.first() - a.began_at), a.ended_at - a.began_at
    tpot = _tpot(a, ttft, e2e)
    good = _within(limits, {"ttft": ttft, "tpot": np.where(a.output_tokens <= 1, 0.0, tpot), "e2e": e2e})[a.ok]
    return {
        "ttft": _times(ttft[a.ok]),
        "itl": _times(seen.gaps(a.ok)),
        "tpot": _times(tpot[a.ok]),
        "e2e": _times(e2e[a.ok]),
        **_rates(a.ok.sum(), a.output_tokens[a.ok].sum(), whole(a), good.sum() if limits else None),
    }


def guidellm(a: Arrivals, limits: Limits) -> Figures:
    """Its ITL is a mean of each answer, weighted by tokens; its TPOT holds the TTFT; its rates count failed requests.

    TTFT = first event with content, reasoning or a tool call - first header sent. ITL = (last - first such event) /
    (output tokens - 1), one value an answer, which weighs output tokens - 1. TPOT = (last such event - first header
    sent) / output tokens, one value an answer, which weighs output tokens. E2E = end of the stream - first header
    sent. Throughput = requests and output tokens, answered or not, / (first start -> end of the last stream). Goodput
    = answered requests within all limits / the same time; its limit of TPOT is held against its ITL, and an answer
    without that is left out. Percentiles do not interpolate.

    Source: guidellm/schemas/base/request_stats.py, benchmark/schemas/metrics.py and schemas/benchmark/goodput.py,
    guidellm 0.8.1, without its warm-up and cool-down; rates are the means that it prints.
    """
    seen, n = _counted(a, TOKEN_KINDS), a.output_tokens
    ttft, last = seen.first() - a.sent_at, seen.last() - a.sent_at
    itl, e2e = _over(last - ttft, n - 1), a.ended_at - a.sent_at
    good = _within(limits, {"ttft": ttft, "tpot": itl, "e2e": e2e}) == 1
    tokens = np.where(a.ok | ~np.isnan(n), n, seen.end - seen.begin)  # of a cut answer, what had come of it
    return {
        "ttft": _steps(ttft[a.ok]),
        "itl": _steps(itl[a.ok], n[a.ok] - 1),
        "tpot": _steps(_over(last, n)[a.ok], n[a.ok]),
        "e2e": _steps(e2e[a.ok]),
        **_rates(len(a.ok), tokens.sum(), whole(a), (good & a.ok).sum() if limits else None),
    }


def aiperf(a: Arrivals, limits: Limits) -> Figures:
    """Its ITL is the TPOT of others, one value an answer; what others call ITL is its inter chunk latency.

    TTFT = first event with content, reasoning or a tool call - start; the time to connect is in it. ITL = (E2E - TTFT)
    / (output tokens - 1), one value an answer of two tokens or more. E2E = last such event - start. Throughput =
    requests and output tokens of answered requests / (first start -> last such event of an answered request). Goodput
    = answered requests within all limits / the same time; the limit of TPOT is held against its ITL, which a one-token
    answer does not have and so misses. By default it counts tokens with a tokenizer of its own; here the server's
    count is taken, as with --use-server-token-count.

    Source: aiperf/metrics/types/, aiperf 0.13.0.
    """
    seen = _counted(a, TOKEN_KINDS)
    ttft, e2e = seen.first() - a.began_at, seen.last() - a.began_at
    ok = a.ok & ~np.isnan(ttft)
    itl = _tpot(a, ttft, e2e)
    tpot = np.where(a.output_tokens <= 1, np.inf, itl)  # misses any limit
    good = _within(limits, {"ttft": ttft, "tpot": tpot, "e2e": e2e})[ok]
    seconds = _span(a.began_at[ok], (a.began_at + e2e)[ok])
    return {
        "ttft": _times(ttft[ok]),
        "itl": _times(itl[ok]),
        "e2e": _times(e2e[ok]),
        **_rates(ok.sum(), a.output_tokens[ok].sum(), seconds, good.sum() if limits else None),
    }


def genai_bench(a: Arrivals, limits: Limits) -> Figures:
    """It has no ITL; E2E, and with it TPOT, ends with the usage event and not with the last token.

    TTFT = first event with content or reasoning - start; the time to connect is in it, and it would connect for each
    request; an answer of several tokens without any takes its usage event instead. TPOT = (E2E - TTFT) / (output
    tokens - 1), left out where E2E - TTFT < 1 ms. E2E = usage event - start; without one, end of the stream - start.
    Throughput = requests and output tokens of answered requests / (first start -> end of the last stream).

    Source: genai_bench/user/openai_user.py and genai_bench/metrics/, genai-bench 0.0.5, without its --warmup-ratio.
    """
    used, ttft = _counted(a, ("usage",)).first() - a.began_at, _counted(a, TEXT).first() - a.began_at
    ttft = np.where(np.isnan(ttft) & (a.output_tokens > 1), used, ttft)
    e2e = np.where(np.isnan(used), a.ended_at - a.began_at, used)
    ok = a.ok & ~np.isnan(ttft)
    tpot = np.where(e2e - ttft < 0.001, np.nan, _tpot(a, ttft, e2e))
    return {
        "ttft": _times(ttft[ok]),
        "tpot": _times(tpot[ok]),
        "e2e": _times(e2e[ok]),
        **_rates(ok.sum(), a.output_tokens[ok].sum(), whole(a)),
    }


def inference_perf(a: Arrivals, limits: Limits) -> Figures:
    """Reasoning is no token: TTFT is the end of thinking. Its ITL is 0 within a chunk, the whole gap between chunks.

    TTFT = first event with content - start; the time to connect is in it. ITL = of a chunk of k tokens the whole gap
    before it once, and k - 1 times 0. TPOT = (last - first event with content) / (output tokens - 1). E2E = end of the
    stream - start. Throughput = requests and output tokens of answered requests / (first start -> end of the last
    stream). Goodput = answered requests within all limits / the same time; unknown here if one has no value to hold
    against a limit. By default it counts tokens with a tokenizer of its own; here the server's count is taken.

    Source: inference_perf/reportgen/base.py and apis/streaming_parser.py, main of August 2026 (7de5ef2).
    """
    seen = _counted(a, ("content",))
    ttft, last = seen.first() - a.began_at, seen.last() - a.began_at
    tpot, e2e = _tpot(a, ttft, last), a.ended_at - a.began_at
    inside = seen.later(a.ok)
    gaps, tokens = np.diff(seen.at)[inside], a.tokens[seen.place[1:][inside]]
    zeros = np.zeros(int((tokens[tokens > 1] - 1).sum()))  # a chunk of an unknown count is taken as one token
    good = _within(limits, {"ttft": ttft, "tpot": tpot, "e2e": e2e})[a.ok]
    return {
        "ttft": _times(ttft[a.ok]),
        "itl": _times(np.concatenate([gaps, zeros])),
        "tpot": _times(tpot[a.ok]),
        "e2e": _times(e2e[a.ok]),
        **_rates(a.ok.sum(), a.output_tokens[a.ok].sum(), whole(a), good.sum() if limits else None),
    }


def llmperf(a: Arrivals, limits: Limits) -> Figures:
    """Its inter-token latency is the whole answer divided by its tokens, the TTFT in it; reasoning is no token.

    TTFT = first event with content - start; the time to connect is in it, and it would connect for each request; 0 for
    an answer without content. ITL = (last event with content - start) / output tokens, one value an answer. E2E = end
    of the stream - start. Throughput = requests and output tokens of answered requests / (first start -> end of the
    last stream); it prints requests a minute. It counts tokens with a tokenizer of its own; here the server's
    count is taken.

    Source: llmperf/ray_clients/openai_chat_completions_client.py and token_benchmark_ray.py, December 2024 (f1d6bed).
    """
    seen = _counted(a, ("content",))
    ttft, last = seen.first() - a.began_at, seen.last() - a.began_at
    itl = np.where(a.output_tokens == 0, 0.0, _over(np.nan_to_num(last), a.output_tokens))
    return {
        "ttft": _times(np.nan_to_num(ttft)[a.ok]),
        "itl": _times(itl[a.ok]),
        "e2e": _times((a.ended_at - a.began_at)[a.ok]),
        **_rates(a.ok.sum(), a.output_tokens[a.ok].sum(), whole(a)),
    }


def locust(a: Arrivals, limits: Limits) -> Figures:
    """It knows no tokens, only the whole response; its percentiles are rounded to two digits, and failures count in.

    E2E = end of the response - start, of answered and failed requests; the time to connect is in it. Percentiles are
    of milliseconds rounded to two significant digits (147 -> 150), the mean is not. Throughput = requests, answered or
    failed, / (first start -> end of the last response).

    Source: locust/stats.py (bucket_response_time, calculate_response_time_percentile, total_rps) and clients.py,
    Locust 2.47, of an HttpUser that reads the whole response.
    """
    done = ~a.cut_off & ~np.isnan(a.began_at)
    e2e = (a.ended_at - a.began_at)[done]
    seconds = _span(a.began_at[done], a.ended_at[done])
    return {"e2e": {"unit": "s", **_locust_spread(e2e)}, **_rates(done.sum(), None, seconds)}


TOOLS: dict[str, Callable[[Arrivals, Limits], Figures]] = {
    "vLLM bench serve": vllm,
    "SGLang bench": sglang,
    "guidellm": guidellm,
    "aiperf": aiperf,
    "genai-bench": genai_bench,
    "inference-perf": inference_perf,
    "llmperf": llmperf,
    "Locust": locust,
}

OURS = (
    "The clock starts when the first byte is sent; a token is content, reasoning or a tool call; rates are of the "
    "measuring window alone, in which tokens count when they arrive."
)


def rosetta(run: Run, ours: Figures, limits: Limits) -> list[dict[str, Any]]:
    """A row a tool: its name, figures, why they differ, how they are defined and where that stands; ours first.

    ``ours``: the figures of summary.json. Empty for a run without a server, of which no other tool could tell.
    """
    if run.in_process:
        return []
    told = {name: ours[name] for name in (*LATENCIES, *RATES) if name in ours}
    row: dict[str, Any] = {
        "tool": "twoclocks",
        "figures": {name: {k: v for k, v in of.items() if k != "definition"} for name, of in told.items()},
        "why": OURS,
        "definition": " ".join(of["definition"] for of in told.values()),
        "source": "Source: summary.json, figures.",
    }
    a = arrivals(run)
    return [row, *({"tool": name, "figures": tool(a, limits), **_words(tool)} for name, tool in TOOLS.items())]


def _words(tool: Callable[..., Any]) -> dict[str, str]:
    """The three paragraphs of a tool's docstring."""
    parts = [" ".join(part.split()) for part in inspect.cleandoc(tool.__doc__ or "").split("\n\n")]
    return dict(zip(("why", "definition", "source"), parts, strict=False))


def arrivals(run: Run) -> Arrivals:
    """The measured requests of a run."""
    rows, chunks = run.measured, run.arrivals
    names = ("sent_at", "ended_at", "prompt_tokens", "output_tokens")
    columns = {name: rows[name].to_numpy(dtype=np.float64) for name in names}
    connect_at = rows["connect_started_at"].to_numpy(dtype=np.float64)
    numbers, status = rows.index.to_numpy(dtype=np.int32), rows["status"].to_numpy()
    return Arrivals(
        at=chunks.at,
        kind=chunks.kind,
        tokens=chunks.tokens,
        begin=np.searchsorted(chunks.request, numbers),
        end=np.searchsorted(chunks.request, numbers, side="right"),
        # transformers says usage beside the choice that finishes, other servers in an event of its own without any
        usage_has_choice=(run.meta.get("target") or {}).get("server") == "transformers",
        began_at=np.where(np.isnan(connect_at), columns["sent_at"], connect_at),
        ok=status == "ok",
        cut_off=status == "cancelled",
        **columns,
    )


def _counted(a: Arrivals, kinds: tuple[Kind, ...]) -> Seen:
    """The chunks of these kinds."""
    place = np.flatnonzero(np.array([kind in kinds for kind in KINDS])[a.kind])
    return Seen(a.at[place], place, np.searchsorted(place, a.begin), np.searchsorted(place, a.end))


def _tpot(a: Arrivals, ttft: Floats, e2e: Floats) -> Floats:
    """(E2E - TTFT) / (output tokens - 1); NaN for answers of one token and of an unknown count."""
    return _over(e2e - ttft, a.output_tokens - 1)


def _over(above: Floats, below: Floats) -> Floats:
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))


def _within(limits: Limits, values: Mapping[str, Floats]) -> Floats:
    """1 for a request within all limits, 0 for one beyond any, NaN where a value is not known; (requests,)."""
    within = np.ones(len(values["e2e"]))
    for name, limit in limits.items():
        within *= np.where(np.isnan(values[name]), np.nan, values[name] <= limit)
    return within


def whole(a: Arrivals) -> float:
    """First start -> end of the last stream, of all requests."""
    return _span(a.began_at, a.ended_at)


def _span(began_at: Floats, ended_at: Floats) -> float:
    known = ~np.isnan(began_at)
    return float(ended_at[known].max() - began_at[known].min()) if known.any() else float("nan")


def _rates(requests: float, tokens: float | None, seconds: float, good: float | None = None) -> Figures:
    """Per second, by the names of summary.json; without those of which the amount is None."""
    amounts = dict(zip(RATES, (requests, tokens, good), strict=True))
    return {
        name: {"unit": RATES[name], "value": float(amount) / seconds if seconds > 0 else float("nan")}
        for name, amount in amounts.items()
        if amount is not None
    }


def _times(values: Floats) -> dict[str, Any]:
    return {"unit": "s", **distribution(values)}


def _steps(values: Floats, weights: Floats | None = None) -> dict[str, Any]:
    """As `_times`, weighted; a percentile is the smallest value with at least that share of the weight up to it."""
    known = ~np.isnan(values)
    if not known.any():
        return _times(values)
    values, weights = values[known], np.ones(len(values))[known] if weights is None else weights[known]
    ranks = np.percentile(values, PERCENTILES, weights=weights, method="inverted_cdf")
    quantiles = {f"p{p}": float(rank) for p, rank in zip(PERCENTILES, ranks, strict=True)}
    return _times(values) | {"mean": float(np.average(values, weights=weights))} | quantiles


def _locust_spread(seconds: Floats) -> dict[str, Any]:
    """Locust's percentiles: of rounded milliseconds, the one of rank n * p / 100, rounded down."""
    if not len(seconds):
        return distribution(seconds)
    ms = seconds * 1e3
    digits = np.select([ms < 100, ms < 1_000, ms < 10_000], [1, 10, 100], 1_000)
    rounded = np.sort(np.round(ms / digits) * digits) / 1e3
    ranks = {f"p{p}": float(rounded[min(len(ms) * p // 100, len(ms) - 1)]) for p in PERCENTILES}
    return distribution(seconds) | ranks
