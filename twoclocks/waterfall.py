"""Waterfall: the joined table -> where the time until the first token went, and where both clocks part in decode.

Pure: arrays in, arrays out. The time from when a request was meant to go out until its first token is cut into bars
that sum to it exactly. What a server does not tell apart stays in one bar, whose name lists what is in it. A negative
bar is a contradiction between two clocks and is shown as such.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twoclocks.clocks import CLOCKS, TTFT_IS_A_SUM
from twoclocks.metrics import Floats

Ints = NDArray[np.int64]

PATH = {
    "send": "sending", "http": "HTTP", "template": "template", "tokenize": "tokenize", "queue": "queue",
    "prefill": "prefill", "held": "held until it is sent", "delivery": "delivery",
}  # fmt: skip
"""What a request passes between its first byte and its first token, in order."""
INSIDE = ("template", "tokenize", "queue", "prefill")
PERCENTILES = (50, 95, 99)
ROUNDING_S = 1e-6
"""Arrivals are stored in whole microseconds: a bar is negative from there on."""
SAME_TPOT = 0.02
"""Share up to which the two sides' times per token are called the same."""


@dataclass(frozen=True)
class Bar:
    """One part of each request's time until its first token."""

    name: str
    label: str
    definition: str
    seconds: Floats  # one a request


@dataclass(frozen=True)
class Waterfall:
    """Requests of which the same parts are known. The bars of a request sum to its ``total``."""

    source: str | None  # of the server's figures; None: it tells nothing of these requests
    server: str | None
    rows: Ints  # which requests these are
    bars: tuple[Bar, ...]
    total: Floats  # first token - intended_at
    is_window: bool = False  # means over the window, one value a bar: not the same requests one by one

    @property
    def largest(self) -> Bar:
        """The bar with the largest mean."""
        return max(self.bars, key=lambda bar: float(bar.seconds.mean()))


def waterfalls(columns: Mapping[str, Any], stages: Sequence[str] = ()) -> list[Waterfall]:
    """The requests that got a token, a Waterfall for each set of parts that is known; the largest first.

    ``columns``: intended_at, connect_started_at, connected_at, sent_at, written_at, ttft, server_source, server_kind,
    server_ttft, server_tokenize, server_validation, server_queue, server_prefill, server_held (if any server tells it),
    and stage_NAME_ttft for each of
    ``stages`` (outermost first); arrays with a row a request, seconds, NaN where unknown.
    """
    seconds = {
        name: np.asarray(columns[name], dtype=np.float64)
        for name in (
            "intended_at", "connect_started_at", "connected_at", "sent_at", "written_at", "ttft", "server_ttft",
            "server_tokenize", "server_validation", "server_queue", "server_prefill",
            *(name for name in ("server_held",) if name in columns),
            *(f"stage_{stage}_ttft" for stage in stages),
        )
    }  # fmt: skip
    told_by = [
        (source, server) if isinstance(source, str) else (None, None)
        for source, server in zip(columns["server_source"], columns["server_kind"], strict=True)
    ]
    got_token = ~np.isnan(seconds["ttft"])
    optional = [name for name in seconds if name.startswith(("written", "server_", "stage_"))]
    known = np.stack([~np.isnan(seconds[name]) for name in optional], axis=1)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in np.flatnonzero(got_token).tolist():
        groups.setdefault((told_by[row], known[row].tobytes()), []).append(row)
    made = [
        _waterfall({name: values[rows] for name, values in seconds.items()}, np.array(rows), who, _texts(who), stages)
        for (who, _), rows in groups.items()
    ]
    return sorted(made, key=lambda waterfall: -len(waterfall.rows))


def window_waterfall(
    columns: Mapping[str, Any], server: str, means: Mapping[str, float], texts: Mapping[str, str]
) -> Waterfall | None:
    """The same from means alone, for a server that tells nothing of single requests; None if nobody got a token.

    ``columns`` as for `waterfalls`, of the requests that the server's histograms tell of; ``means`` (seconds) and what
    each means (``texts``) by name: ttft, tokenize, validation, queue, prefill.
    """
    names = ("intended_at", "connect_started_at", "connected_at", "sent_at", "written_at", "ttft")
    at = {name: np.asarray(columns[name], dtype=np.float64) for name in names}
    rows = np.flatnonzero(~np.isnan(at["ttft"]))
    if not len(rows):
        return None
    at = {name: values[rows] for name, values in at.items()}
    sent_at = (at["sent_at"] - at["intended_at"]).mean()
    mean = {
        "intended_at": 0.0,
        "connect_started_at": 0.0,
        "connected_at": np.nan_to_num(at["connected_at"] - at["connect_started_at"]).mean(),
        "sent_at": sent_at,
        "written_at": sent_at + (at["written_at"] - at["sent_at"]).mean(),
        "ttft": at["ttft"].mean(),
        **{
            f"server_{name}": means.get(name, np.nan) for name in ("ttft", "tokenize", "validation", "queue", "prefill")
        },
    }
    one = {name: np.array([value], dtype=np.float64) for name, value in mean.items()}
    return replace(_waterfall(one, rows, ("/metrics", server), texts, ()), is_window=True)


def _texts(who: tuple[str | None, str | None]) -> dict[str, str]:
    return {metric: clock.text for metric, clock in CLOCKS.get((who[0] or "", who[1] or ""), {}).items()}


def _waterfall(
    at: Mapping[str, Floats],
    rows: Ints,
    who: tuple[str | None, str | None],
    texts: Mapping[str, str],
    stages: Sequence[str],
) -> Waterfall:
    """The bars of requests that are alike in what is known of them. ``texts``: what the server's figures mean."""
    total = at["sent_at"] + at["ttft"] - at["intended_at"]
    connect = np.nan_to_num(at["connected_at"] - at["connect_started_at"])
    bars = [
        Bar("late", "late start", "from when it was meant to go out until its first byte, connecting apart: inside the "
            "load generator, or waiting for it; sent_at - intended_at - connecting",
            at["sent_at"] - at["intended_at"] - connect),
        Bar("connect", "connect", "TCP and TLS; 0 on a connection that was open; connected_at - connect_started_at",
            connect),
    ]  # fmt: skip
    inner = _inside(at, texts)
    missing = [name for name in INSIDE if not any(name in bar.name.split("+") for bar in inner)]
    is_whole = "ttft" in texts and who not in TTFT_IS_A_SUM and _all_known(at["server_ttft"])
    told = sum((bar.seconds for bar in inner), np.zeros_like(total))
    outside = ["http", "delivery"]
    if is_whole:
        if missing:
            rest = f"server TTFT ({texts['ttft']}) - what it tells apart"
            inner = _in_order([*inner, _bar(missing, rest, at["server_ttft"] - told)])
        told, told_text = at["server_ttft"], f"server TTFT ({texts['ttft']})"
    else:
        outside += missing
        told_text = " - ".join(f"server's {bar.label}" for bar in inner)
    passed = [stage for stage in stages if _all_known(at[f"stage_{stage}_ttft"])]
    since, begun = at["sent_at"], "request's first byte"
    if _all_known(at["written_at"]):
        # who loses the processor within the call stamps its end late, when others have long been at work
        room = np.maximum(at["ttft"] - (at[f"stage_{passed[0]}_ttft"] if passed else told), 0)
        meaning = "its first byte -> all of it handed to the kernel, at most what the other clocks leave of TTFT; "
        meaning += "written_at - sent_at"
        send = Bar("send", "send", meaning, np.minimum(at["written_at"] - since, room))
        bars.append(send)
        since, begun = since + send.seconds, "request written"
    else:
        outside.append("send")
    outer, place, outer_text = at["sent_at"] + at["ttft"] - since, "client", f"client: {begun} -> first token"
    for stage in passed:
        text, spans = f"{stage}'s span: receipt -> first token", at[f"stage_{stage}_ttft"]
        bars.append(Bar(f"to {stage}", f"{place} to {stage}, and back", f"({outer_text}) - ({text})", outer - spans))
        outer, place, outer_text = spans, stage, text
    definition = f"({outer_text}) - {told_text}" if told_text else outer_text
    definition += "; without a common clock its parts cannot be told apart"
    bar = _bar(outside, definition, outer - told)
    if place != "client":
        bar = replace(bar, label=f"{place} to server, and back: {bar.label}")
    return Waterfall(*who, rows, (*bars, bar, *inner), total)


def _inside(at: Mapping[str, Floats], texts: Mapping[str, str]) -> list[Bar]:
    """The bars that the server tells apart, in order."""
    holds = {
        "tokenize": ["template", "tokenize"],
        "validation": ["tokenize"],
        "queue": ["queue"],
        "prefill": ["prefill"],
        "held": ["held"],
    }
    if _all_known(at["server_tokenize"]):
        del holds["validation"]
    return [
        _bar(parts, f"server: {texts[metric]}", at[f"server_{metric}"])
        for metric, parts in holds.items()
        if parts and metric in texts and _all_known(at[f"server_{metric}"])
    ]


def _bar(parts: Sequence[str], definition: str, seconds: Floats) -> Bar:
    """A bar that holds some steps of PATH."""
    steps = [step for step in PATH if step in parts]
    words = [PATH[step] for step in steps]
    label = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    return Bar("+".join(steps), label, definition, seconds)


def _in_order(bars: Sequence[Bar]) -> list[Bar]:
    steps = list(PATH)
    return sorted(bars, key=lambda bar: steps.index(bar.name.split("+")[0]))


def _all_known(values: Floats) -> bool:
    """Requests of one waterfall are alike in what is known of them, so that the first tells it of all."""
    return bool(len(values)) and not np.isnan(values[0])


def bar_rows(waterfall: Waterfall) -> list[dict[str, Any]]:
    """A row a bar, and one of the total: mean, its share of the total's mean, and percentiles of the bar by itself.

    Means add up to the mean of the total; percentiles of bars do not add up to percentiles of it. ``negative`` counts
    the requests in which the bar is below zero, ``least`` is its smallest value.
    """
    mean = float(waterfall.total.mean())
    meaning = "from when it was meant to go out until its first token; first token - intended_at"
    total = Bar("total", "first token since intended", meaning, waterfall.total)
    return [
        {
            "name": bar.name,
            "label": bar.label,
            "definition": bar.definition,
            "unit": "s",
            "n": len(waterfall.rows),
            "mean": float(bar.seconds.mean()),
            "share": float(bar.seconds.mean()) / mean if mean else None,
            **{f"p{p}": None if waterfall.is_window else float(np.percentile(bar.seconds, p)) for p in PERCENTILES},
            "negative": int((bar.seconds < -ROUNDING_S).sum()),
            "least": float(bar.seconds.min()),
        }
        for bar in (*waterfall.bars, total)
    ]


def stacks(waterfall: Waterfall) -> list[dict[str, Any]]:
    """What to stack: the mean request and those at p50, p95 and p99 of the total; bars that sum to each one's total.

    A request at p99 is the mean of the requests whose rank by total lies within half a percent of p99 (one at least).
    """
    order = np.argsort(waterfall.total, kind="stable")
    chosen: list[tuple[str, Ints]] = [("mean", order)]
    count = len(order)
    for p in () if waterfall.is_window else PERCENTILES:
        centre, half = p / 100 * (count - 1), max(0.5, 0.005 * count)
        ranks = np.arange(max(0, int(np.ceil(centre - half))), min(count - 1, int(np.floor(centre + half))) + 1)
        chosen.append((f"p{p}", order[ranks]))
    return [
        {
            "name": name,
            "n": len(waterfall.rows) if name == "mean" else len(rows),
            "total": float(waterfall.total[rows].mean()),
            "bars": {bar.name: float(bar.seconds[rows].mean()) for bar in waterfall.bars},
        }
        for name, rows in chosen
    ]


_MEANING = {
    "late": "the load generator sent late; use more processes or fewer users",
    "connect": "connecting decides; keep connections open, or look at the network and TLS",
    "send": "sending decides; long prompts or a slow network",
    "queue": "the server is saturated: more load lengthens its queue and nothing else",
    "prefill": "the server works on prompts; shorter or cached prompts would shorten it",
    "held": "the server keeps answers until the longest of their batch has ended",
    "template+tokenize": "the API server's own processor decides, not the engine",
    "tokenize": "the API server's own processor decides, not the engine",
    "http+delivery": "the way to the server and back decides: the network, a proxy, or a busy API server",
}


def dominant(waterfall: Waterfall) -> str:
    """Which part dominates the time until the first token, in words."""
    bar, mean = waterfall.largest, float(waterfall.total.mean())
    part = float(bar.seconds.mean())
    least = min(waterfall.bars, key=lambda bar: float(bar.seconds.mean()))
    if float(least.seconds.mean()) < -ROUNDING_S:
        below = f"{least.label} is negative in the mean, {least.seconds.mean() * 1e3:,.1f} ms"
        return f"The clocks contradict each other: {below}; which part dominates cannot be said."
    of = f"{part * 1e3:,.1f} of {mean * 1e3:,.1f} ms ({part / mean:.0%})" if mean > 0 else "0 of 0 ms"
    if bar.name == "queue":
        return f"Requests waited in the server's queue for {of} until their first token: {_MEANING['queue']}."
    meaning = _MEANING.get(bar.name, "this server does not tell these apart")
    return f"The largest part of the time to the first token is {bar.label}, {of}: {meaning}."


@dataclass(frozen=True)
class Decode:
    """Time per output token of the same requests by both clocks, seconds."""

    source: str
    server: str
    definition: str
    client: Floats
    on_server: Floats


def decodes(columns: Mapping[str, Any]) -> list[Decode]:
    """Both sides' TPOT where both are known, by source; ``columns``: tpot, server_tpot, server_source, server_kind."""
    client, on_server = (np.asarray(columns[name], dtype=np.float64) for name in ("tpot", "server_tpot"))
    sources, servers = np.asarray(columns["server_source"]), np.asarray(columns["server_kind"])
    both = ~np.isnan(client) & ~np.isnan(on_server)
    groups: dict[tuple[str, str], list[int]] = {}
    for row in np.flatnonzero(both).tolist():
        groups.setdefault((sources[row], servers[row]), []).append(row)
    return [
        Decode(*who, CLOCKS[who]["tpot"].text, client[rows], on_server[rows])
        for who, rows in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]


def parting(decode: Decode) -> str:
    """Where client and server part after the first token, in words."""
    client, server = float(decode.client.mean()), float(decode.on_server.mean())
    means = f"{client * 1e3:,.2f} ms a token at the client, {server * 1e3:,.2f} ms in the server"
    if abs(client - server) <= SAME_TPOT * server:
        return f"Decode: {means}: tokens arrive as they are made."
    if client > server:
        return f"Decode: {means}: tokens wait after they are made (detokenizing, delivery, a slow reader)."
    return f"Decode: {means}: the first token came late, and later ones caught up (held back and delivered together)."
