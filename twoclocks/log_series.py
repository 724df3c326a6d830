"""Log series: server log lines -> what they say of the engine over time, each on the run's clock.

Pure. vLLM 0.8 - 0.33 (the older "V0" engine too), SGLang 0.5, llama.cpp.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, timedelta, timezone, tzinfo

import msgspec

from twoclocks.log_lines import NUMBER, PREFIX_CHARS, messages, time_before, unix_times


class LogSample(msgspec.Struct, frozen=True):
    """One figure that a log line gives of the engine, not of one request."""

    time: str | None  # wall clock as the line says it, ISO 8601; without year and zone where it says none
    name: str  # a key of MEANING
    engine: str | None  # which engine, rank or slot of a server that has several; "0" for vLLM's "Engine 000"
    value: float
    unit: str  # tokens/s | requests | tokens | s | 1


MEANING = {
    "log:vllm:prompt_throughput": "prompt tokens computed, not cached, since the last such line / time between",
    "log:vllm:generation_throughput": "tokens generated since the last such line / time between",
    "log:vllm:requests_running": "in the last engine step before the line",
    "log:vllm:requests_waiting": "in the last engine step before the line, deferred ones included in newer versions",
    "log:vllm:requests_deferred": "in the last engine step before the line",
    "log:vllm:requests_swapped": "in the last engine step before the line (V0)",
    "log:vllm:kv_usage": "share of KV cache blocks in use, in the last engine step before the line",
    "log:vllm:prefix_hit_rate": "share of prompt tokens found in the prefix cache, over the last 1000 requests",
    "log:vllm:external_prefix_hit_rate": "the same for the external prefix cache",
    "log:vllm:acceptance_length": "tokens per step with speculation, since the last such line",
    "log:vllm:draft_acceptance_rate": "share of drafted tokens that were accepted, since the last such line",
    "log:sglang:prompt_throughput": "prompt tokens since the last prefill batch that was logged / time between",
    "log:sglang:generation_throughput": "tokens generated since the last decode line / time between",
    "log:sglang:requests_running": "when the batch was logged",
    "log:sglang:requests_waiting": "when the batch was logged",
    "log:sglang:kv_usage": "share of the token pool in use",
    "log:sglang:prefill_tokens": "new tokens of one prefill batch",
    "log:sglang:cached_tokens": "tokens of one prefill batch that were found in the prefix cache",
    "log:sglang:acceptance_length": "tokens per step with speculation",
    "log:llamacpp:prompt_time": "slot picks up the prompt -> first token sampled, one request. No queue",
    "log:llamacpp:prompt_tokens": "prompt tokens computed for one request",
    "log:llamacpp:decode_time": "first -> last token of one request",
    "log:llamacpp:decode_tokens": "tokens generated for one request",
}
"""What each series says. The names are none of /metrics."""


_VLLM_ANCHOR = "Avg prompt throughput: "
_VLLM_ENGINE = re.compile(r"Engine ([0-9]{3,6}): $")
_VLLM = {
    "Avg prompt throughput": "log:vllm:prompt_throughput",
    "Avg generation throughput": "log:vllm:generation_throughput",
    "Running": "log:vllm:requests_running",
    "Waiting": "log:vllm:requests_waiting",
    "Pending": "log:vllm:requests_waiting",  # V0's word
    "Deferred": "log:vllm:requests_deferred",
    "Swapped": "log:vllm:requests_swapped",
    "Prefix cache hit rate": "log:vllm:prefix_hit_rate",
    "External prefix cache hit rate": "log:vllm:external_prefix_hit_rate",
    "Mean acceptance length": "log:vllm:acceptance_length",
    "Avg Draft acceptance rate": "log:vllm:draft_acceptance_rate",
}
_KV_USAGE = re.compile(r"\w{2,10} KV cache usage")  # of the device: GPU, CPU, TPU, ...
_SPECULATION_ANCHOR = "SpecDecoding metrics: "
_QUANTITY = re.compile(rf"({NUMBER})( tokens/s| reqs| tokens|%|)\.?")
_UNITS = {" tokens/s": "tokens/s", " reqs": "requests", " tokens": "tokens", "%": "1", "": "1"}

_SGLANG_ANCHOR = re.compile(r"\b(Prefill|Decode) batch[,.] ")
_SGLANG_RANKS = re.compile(r"\[[0-9:. -]{19,26}((?: [A-Z]{2,4}[0-9]{1,5}){1,6})\] $")
_SGLANG = {
    "#running-req": ("log:sglang:requests_running", "requests"),
    "#queue-req": ("log:sglang:requests_waiting", "requests"),
    "token usage": ("log:sglang:kv_usage", "1"),
    "full token usage": ("log:sglang:kv_usage", "1"),  # of models with several kinds of cache
    "gen throughput (token/s)": ("log:sglang:generation_throughput", "tokens/s"),
    "input throughput (token/s)": ("log:sglang:prompt_throughput", "tokens/s"),
    "#new-token": ("log:sglang:prefill_tokens", "tokens"),
    "#cached-token": ("log:sglang:cached_tokens", "tokens"),
    "accept len": ("log:sglang:acceptance_length", "1"),
}

_LLAMACPP = re.compile(rf"(prompt eval|eval) time = {{1,12}}({NUMBER}) ms / {{1,8}}([0-9]{{1,12}}) tokens")
_LLAMACPP_SLOT = re.compile(r"id {1,4}([0-9]{1,6}) \| task {1,2}-?[0-9]{1,12} \| {0,12}$")


def log_series(lines: Iterable[str]) -> Iterator[LogSample]:
    """The figures of the engine that a log tells line by line, in the log's order.

    vLLM's own lines say neither the year nor the zone nor parts of a second (its JSON log does); `placed` finds the
    year, and a sample may be up to a second later than where it is placed. SGLang's say no zone, llama.cpp's no time.
    """
    for text, at, _ in messages(lines):
        if (start := text.find(_VLLM_ANCHOR)) >= 0:
            yield from _vllm(text, start, start, at)
        elif (start := text.find(_SPECULATION_ANCHOR)) >= 0:
            yield from _vllm(text, start, start + len(_SPECULATION_ANCHOR), at)
        elif " batch" in text and (match := _SGLANG_ANCHOR.search(text)):
            yield from _sglang(text, match, at)
        elif "eval time = " in text and (match := _LLAMACPP.search(text)):
            yield from _llamacpp(text, match, at)


def _vllm(text: str, anchor: int, start: int, at: str | None) -> Iterator[LogSample]:
    """From a line whose own words begin at ``anchor``, its pairs at ``start``."""
    at = at or time_before(text, anchor)
    found = _VLLM_ENGINE.search(text[max(0, anchor - PREFIX_CHARS) : anchor])
    engine = str(int(found[1])) if found else None
    seen = set()
    for key, said in _pairs(text[start:]):
        name = "log:vllm:kv_usage" if _KV_USAGE.fullmatch(key) else _VLLM.get(key)
        quantity = _QUANTITY.fullmatch(said)
        if name is None or quantity is None or name in seen:  # V0 tells of its swap space after the KV cache
            continue
        value, unit = quantity.groups()
        if (unit == "") != (name == "log:vllm:acceptance_length"):
            continue  # cut off before its unit, and perhaps within the number
        seen.add(name)
        yield LogSample(at, name, engine, float(value) / (100 if unit == "%" else 1), _UNITS[unit])


def _sglang(text: str, anchor: re.Match[str], at: str | None) -> Iterator[LogSample]:
    at = at or time_before(text, anchor.start())
    ranks = _SGLANG_RANKS.search(text[max(0, anchor.start() - PREFIX_CHARS) : anchor.start()])
    engine = ranks[1].strip() if ranks else None
    for key, said in _pairs(text[anchor.end() :]):
        if key in _SGLANG and re.fullmatch(NUMBER, said):
            name, unit = _SGLANG[key]
            yield LogSample(at, name, engine, float(said), unit)


def _llamacpp(text: str, match: re.Match[str], at: str | None) -> Iterator[LogSample]:
    at = at or time_before(text, match.start())
    slot = _LLAMACPP_SLOT.search(text[max(0, match.start() - PREFIX_CHARS) : match.start()])
    engine = slot[1] if slot else None
    part = "prompt" if match[1] == "prompt eval" else "decode"
    yield LogSample(at, f"log:llamacpp:{part}_time", engine, float(match[2]) / 1e3, "s")
    yield LogSample(at, f"log:llamacpp:{part}_tokens", engine, float(match[3]), "tokens")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """(key, value) of ``key: value, key: value``. No line of a server has more than some twenty."""
    for part in text.split(", ", 40)[:40]:
        key, colon, value = part.partition(": ")
        if colon:
            yield key.strip(), value.strip()


_DISORDER_S = 60.0
_ZONED = re.compile(r"(?:Z|[+-][0-9]{2}:[0-9]{2})$")


def placed(samples: Iterable[LogSample], started_at_unix: float, tz: tzinfo) -> list[tuple[float, LogSample]]:
    """(seconds on the run's clock, sample) in the log's order; samples without a time are left out.

    ``started_at_unix`` is the run's zero by the wall clock of the load generator, ``tz`` the zone of times that say
    none: the server's, which in a container is mostly UTC. The clocks of two hosts may differ: good for a picture, not
    for a difference. A log may cross a new year and the end of summer time: in the hour that comes twice, the log's
    order tells which one it is.
    """
    found: list[tuple[float, LogSample]] = []
    previous: float | None = None
    for sample in samples:
        times = unix_times(sample.time, started_at_unix, tz) if sample.time else []
        if not times:
            continue
        if previous is None:
            previous = min(times, key=lambda each: abs(each - started_at_unix))
        else:
            earliest = previous - _DISORDER_S  # lines of several processes are not strictly in order
            previous = next((each for each in times if each >= earliest), times[-1])
        found.append((previous - started_at_unix, sample))
    return found


def zone_of(samples: Iterable[LogSample], started_at_unix: float, duration_s: float, local: tzinfo) -> tzinfo:
    """The zone of times that say none: the one that puts most of them into the run.

    Tried in this order, the first of the best is taken: ``local``, UTC, and every whole quarter of an hour from it. Of
    a log that is much longer than the run all may be as good.
    """
    bare = list({each.time: each for each in samples if each.time and not _ZONED.search(each.time)}.values())
    some = bare[:: max(1, len(bare) // 200)]
    quarters = [timezone(timedelta(minutes=15 * count)) for count in range(-48, 57)]

    def inside(zone: tzinfo) -> int:
        return sum(-_DISORDER_S <= at <= duration_s + _DISORDER_S for at, _ in placed(some, started_at_unix, zone))

    return max([local, UTC, *quarters], key=inside)
