"""Checks: what two independent clocks and counters say of one run, held against each other, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import expositions
from twoclocks.clocks import CLOCKS
from twoclocks.join import NOT_OURS, SOURCES, TOLD_TWICE, reasons
from twoclocks.load import Run
from twoclocks.prefix_cache import CACHED_SHARE, cache_hits
from twoclocks.waterfall import ROUNDING_S, Waterfall

Found = tuple[str, bool | None, str]  # name, passed (None: could not be told), text
SAME_MEAN = 0.01
"""Share by which the means of the same requests may differ between two ways of telling them."""
SAME_S = 0.001
"""By how much two sources may differ over one duration of one request, where SAME_MEAN of it is less."""


def checks(run: Run, waterfalls: Sequence[Waterfall] = ()) -> list[dict[str, Any]]:
    """What can be held against each other in this run: name, passed (None: could not be told), text."""
    found = [_all_joined(run.ok), _not_before_server(run.ok), _same_counts(run.ok)]
    if run.in_process:  # there is no second clock, and no counter but the engine's own
        found = []
    optional = (_rows_joined(run), _parts_not_negative(waterfalls), _sources_agree(run.ok), _cache_as_planned(run))
    found += [check for check in optional if check is not None]
    if run.scrapes:
        found += [
            _scraped(run),
            _same_tokens(run, "output_tokens", "generation_tokens", "output"),
            _same_tokens(run, "prompt_tokens", "prompt_tokens", "prompt"),
            _same_traffic(run),
            *_same_as_histogram(run),
        ]
    return [{"name": name, "passed": passed, "text": text} for name, passed, text in found]


def joined(ok: pd.DataFrame) -> dict[str, Any]:
    """How many of these requests are joined with the server's own timing, from what, and why the others are not."""
    sources = ok["server_source"].dropna()
    return {
        "ok": len(ok),
        "joined": len(sources),
        "sources": sorted(set(sources)),
        "by_source": {source: int(count) for source, count in sources.value_counts().items()},
        "unjoined": reasons(ok["server_unmatched"]),
        "split": int((ok["server_children"] > 1).sum()),  # n > 1: the server made several requests of one
    }


def server_inside(rows: pd.DataFrame) -> pd.Series:
    """The least time that the server says it had a request before its first token, seconds; NaN where it says nothing.

    Its TTFT where it tells one, else what it tells of validation, queue and prefill.
    """
    parts = rows[["server_validation", "server_queue", "server_prefill"]].astype(np.float64).sum(axis=1, min_count=1)
    inside: pd.Series = rows["server_ttft"].fillna(parts)
    return inside


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One duration of the same requests, as two sources tell it."""

    metric: str
    sources: tuple[str, str]
    requests: int
    off: int  # requests in which they differ by more than SAME_S and SAME_MEAN
    worst: float  # largest difference, seconds


def disagreements(rows: pd.DataFrame) -> list[Disagreement]:
    """Each duration that two sources tell of the same requests by the same clock."""
    found = []
    for one, other in combinations(SOURCES, 2):
        for server in rows["server_kind"].dropna().unique():
            clocks, others = CLOCKS.get((one, server), {}), CLOCKS.get((other, server), {})
            for metric in clocks.keys() & others.keys():
                names = [f"{source.replace('-', '_')}_{metric}" for source in (one, other)]
                same = (clocks[metric].start, clocks[metric].stop) == (others[metric].start, others[metric].stop)
                if not same or not set(names) <= set(rows):
                    continue
                pair = rows.loc[rows["server_kind"] == server, names].dropna()
                apart = (pair[names[0]] - pair[names[1]]).abs()
                off = int((apart > np.maximum(SAME_S, SAME_MEAN * pair.max(axis=1))).sum())
                if len(pair):
                    found.append(Disagreement(metric, (one, other), len(pair), off, float(apart.max())))
    return sorted(found, key=lambda one: (-one.off, one.metric))


def foreign_spans(run: Run) -> tuple[int, int]:
    """Spans of requests that this run did not send, those that were left out at once among them; of how many.

    Log lines do not count: a log may reach back to earlier runs.
    """
    left_out = int(run.meta.get("foreign_spans") or 0)
    return run.unmatched_rows.get(NOT_OURS, 0) + left_out, run.rows.get("otlp", 0) + left_out


def _rows_joined(run: Run) -> Found | None:
    """Spans and log lines on the server's side that found no request."""
    foreign, spans = foreign_spans(run)
    if not run.rows and not spans:
        return None
    told = " and ".join(f"{count:,} from {source}" for source, count in run.rows.items())
    left = "; ".join(f"{count:,} {why}" for why, count in run.unmatched_rows.items())
    twice = int((run.requests["server_unmatched"] == TOLD_TWICE).sum())
    text = f"The server told of requests in {sum(run.rows.values()):,} rows ({told}); left over: {left or 'none'}."
    if run.meta.get("foreign_spans"):
        text += f" {run.meta['foreign_spans']:,} spans of others were left out as they came."
    if twice:
        text += f" Of {twice} requests it told twice, differently; they are not joined with those rows."
    return "server_rows_ours", not foreign and not twice, text


def _parts_not_negative(waterfalls: Sequence[Waterfall]) -> Found | None:
    bars = [bar for waterfall in waterfalls if not waterfall.is_window for bar in waterfall.bars]
    below = [bar for bar in bars if float(bar.seconds.min()) < -ROUNDING_S]
    name = "waterfall_not_negative"
    if not bars:
        return None
    if not below:
        return name, True, "No part of any request's waterfall is negative."
    told = "; ".join(
        f"{bar.label} in {int((bar.seconds < -ROUNDING_S).sum())} requests, down to {bar.seconds.min() * 1e3:,.2f} ms"
        for bar in below
    )
    return name, False, f"Negative parts of the waterfall, shown as they are: {told}."


def _sources_agree(ok: pd.DataFrame) -> Found | None:
    pairs = disagreements(ok)
    if not pairs:
        return None
    off = [pair for pair in pairs if pair.off]
    compared = ", ".join(sorted({pair.metric for pair in pairs}))
    sources = " and ".join(sorted({source for pair in pairs for source in pair.sources}))
    limit = f"{SAME_S * 1e3:g} ms or {SAME_MEAN:.0%}"
    if not off:
        return "sources_agree", True, f"{sources} agree on {compared} of each request, within {limit}."
    told = "; ".join(
        f"{pair.metric} of {pair.off} in {pair.requests} requests, by up to {pair.worst * 1e3:,.2f} ms" for pair in off
    )
    return "sources_agree", False, f"{sources} disagree by more than {limit}: {told}."


def _cache_as_planned(run: Run) -> Found | None:
    hits = cache_hits(run)
    if hits is None:
        return None
    who = "engine" if run.in_process else "server"
    text = f"The {who} answered {hits.share:.1%} of the prompt tokens from its prefix cache"
    if not hits.share:
        return "prefix_cache", True, f"{text}."
    if hits.intended is not None:
        rest = f"a perfect one could have known {hits.intended:.1%} of the prompt characters that this run sent"
    else:
        rest = f"{hits.unexplained:.1%} in prompts that had not been sent before (a common beginning, or a warm cache)"
    return "prefix_cache", hits.unexplained <= CACHED_SHARE, f"{text}; {rest}."


def _same_as_histogram(run: Run) -> list[Found]:
    """The server's own histograms against what it said of the same requests one by one."""
    found: list[Found] = []
    rows = run.scraped
    if (rows["server_children"] > 1).any():  # n > 1: the histograms hold each child, a request its fastest one
        return []
    for metric in ("ttft", "queue", "prefill", "decode", "e2e"):
        told = rows[rows["server_kind"] == "vllm"]
        if metric in ("ttft", "e2e"):  # in-band these are sums without template and tokenizing
            told = told[told["server_source"] == "otlp"]
        values = told[f"server_{metric}"].dropna()
        gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, metric) if len(values) else None
        if gained is None or not gained.count:
            continue
        mean = float(values.mean())
        same = gained.count == len(values) and abs(gained.mean - mean) <= max(SAME_MEAN * gained.mean, 1e-4)
        name = metric.upper() if metric in ("ttft", "e2e") else metric
        text = (
            f"Server {name}: its histogram gained {gained.count:,.0f} with a mean of {gained.mean * 1e3:,.2f} ms; "
            f"request by request it told {len(values):,} with a mean of {mean * 1e3:,.2f} ms."
        )
        found.append((f"{metric}_agrees_with_histogram", same, text))
    return found


def _scraped(run: Run) -> Found:
    failed = sum(len(scrapes.failed) for scrapes in run.all_scrapes)
    total = failed + sum(len(scrapes.at) for scrapes in run.all_scrapes)
    if any(
        expositions.restarted(scrapes, first) for scrapes, first in zip(run.scrapes, run.first_scrapes, strict=True)
    ):
        return (
            "scrapes",
            False,
            "A server restarted during the run (its counters fell): its /metrics tell nothing of the whole.",
        )
    if failed:
        why = next(text for scrapes in run.all_scrapes for _, text in scrapes.failed)
        text = f"{failed} of {total} scrapes of /metrics failed ({why})"
        if any(scrapes.failed and scrapes.failed[-1][0] > run.scraped_until for scrapes in run.scrapes):
            text += f"; they tell of the run up to second {run.scraped_until:.1f}"
        return "scrapes", False, f"{text}."
    return "scrapes", True, f"All {total} scrapes of /metrics succeeded, and no server restarted."


def _all_joined(ok: pd.DataFrame) -> Found:
    join = joined(ok)
    if not join["ok"]:
        return "joined", None, "No measured request ended ok, so that there is nothing to join."
    if join["joined"] == join["ok"]:
        source = " and ".join(join["sources"])
        return (
            "joined",
            True,
            f"All {join['ok']} requests that ended ok are joined with the server's own timing ({source}).",
        )
    why = "; ".join(f"{count}: {reason}" for reason, count in join["unjoined"].items())
    return (
        "joined",
        False,
        f"{join['joined']} of {join['ok']} requests are joined with the server's own timing ({why}).",
    )


def _not_before_server(ok: pd.DataFrame) -> Found:
    margin = (ok["ttft"] - server_inside(ok)).dropna()
    told = ok["server_source"].eq("otlp").any() and ok["server_ttft"].notna().any()
    parts = [part for part in ("validation", "queue", "prefill") if ok[f"server_{part}"].notna().any()]
    part = "TTFT" if told else " + ".join(parts)
    name = "client_after_server"
    if margin.empty:
        return name, None, "The server told no request's queue or prefill time: client TTFT cannot be held against it."
    late = int((margin >= 0).sum())
    smallest = f"smallest margin {margin.min() * 1e3:,.2f} ms"
    if late == len(margin):
        return name, True, f"Client TTFT >= server {part} in each of the {late} joined requests ({smallest})."
    return (
        name,
        False,
        f"Client TTFT < server {part} in {len(margin) - late} of {len(margin)} joined requests ({smallest}).",
    )


def _same_counts(ok: pd.DataFrame) -> Found:
    known = ok[ok["token_source"].isin(["usage", "per-chunk usage"]) & ok["chunk_token_sum"].notna()]
    name = "chunks_agree_with_usage"
    if known.empty:
        return name, None, "No request has both a usage count and a token count of every chunk."
    differ = int((known["output_tokens"] != known["chunk_token_sum"]).sum())
    if not differ:
        return (
            name,
            True,
            f"The tokens of the chunks add up to the server's usage count in each of {len(known)} requests.",
        )
    off = (known["output_tokens"] - known["chunk_token_sum"]).sum()
    return (
        name,
        False,
        f"The tokens of the chunks do not add up to the server's usage count in {differ} of {len(known)} requests "
        f"({off:+.0f} tokens in all; an end token without text is the usual reason).",
    )


def _same_tokens(run: Run, column: str, counter: str, word: str) -> Found:
    name = f"{word}_tokens_agree_with_counter"
    gain = expositions.counter_gain(run.scrapes, run.first_scrapes, counter)
    if gain is None or gain.since_restart:
        return name, None, f"The server's counter of {word} tokens was not read (absent, or it restarted)."
    ours = run.scraped
    client, cut_off = ours[column].sum(), int((ours["status"] != "ok").sum())
    counted = f"the client counted {client:,.0f} in {len(ours)} requests"
    rounding = f" ± {gain.error:,.0f} (it is printed with six digits)" if gain.error >= 1 else ""
    text = f"{word.capitalize()} tokens: {counted}, the server's counter rose by {gain.value:,.0f}{rounding}."
    same = bool(abs(gain.value - client) <= gain.error)
    if not same and cut_off:
        text += f" Of {cut_off} requests that did not end ok the client knows at most what had arrived."
    if not same and (under_way := _under_way(run)):
        text += f" {under_way} were still under way at the last good scrape."
    return name, same, text


@dataclass(frozen=True, slots=True)
class Traffic:
    """How many requests the server answered over the scraped window, and how many of them we know of."""

    answered: float
    ours: int
    unseen: int  # requests of ours that may have been answered without our seeing it: cut off, failed
    under_way: int  # requests of ours that may have been answered after the last good scrape
    what: str  # what was counted


def traffic(run: Run) -> Traffic | None:
    """First tokens by the server's histograms; where it has none, finished requests. None if neither was read."""
    told = expositions.histogram_deltas(run.scrapes, run.first_scrapes, "ttft")
    if any(gained.since_restart for gained in told):
        return None
    unseen = int((run.scraped["status"] != "ok").sum())
    under_way = _under_way(run)
    if told:
        ours = int(run.scraped["got_token"].sum())
        return Traffic(sum(gained.count for gained in told), ours, unseen, under_way, "first tokens")
    finished = expositions.counter_delta(run.scrapes, run.first_scrapes, "requests")
    if finished is None:
        return None
    return Traffic(finished, int((run.scraped["status"] == "ok").sum()), unseen, under_way, "whole answers")


def _under_way(run: Run) -> int:
    """Requests that the last good scrape cut in two: no counter says which of them it has counted."""
    return int((run.scraped["ended_at"] > run.scraped_until).sum())


def _same_traffic(run: Run) -> Found:
    told = traffic(run)
    name = "only_our_traffic"
    if told is None:
        return name, None, "The server's count of answered requests was not read (absent, or it restarted)."
    text = f"The server gave {told.answered:,.0f} {told.what} while the client received {told.ours:,}."
    if told.answered > told.ours:
        text += " Others used the server too, requests ran with n > 1, or some were cut off."
    if told.under_way:
        text += f" {told.under_way} were still under way at the last good scrape."
    return name, told.ours - told.under_way <= told.answered <= told.ours, text
