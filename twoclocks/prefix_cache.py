"""Prefix cache: what of the prompts it could have known beside what it answered, by each who tells of it.

These are two quantities: what was intended is counted in characters of the texts that were sent, what came from the
cache in tokens of the prompts that a chat template made of them.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from twoclocks import expositions
from twoclocks.load import Run

CACHED_SHARE = 0.2
"""By how much the share of the tokens may be above that of the characters; a chat template's beginning stays below."""

INTENDED = (
    "Intended share = characters of the prompts that a perfect prefix cache could know / characters of all prompts, of "
    "what was sent after the warm-up. Such a cache is empty before the run, holds all that the run sent and, in the "
    "history of a session, what the model itself answered, and forgets nothing. What a chat template adds is left out"
)
OBSERVED = (
    "Observed share = prompt tokens that, as the server says of each request, came from its prefix cache / prompt "
    "tokens of the same requests"
)
COUNTED = "Counted share = rise of the counter of tokens that were found / rise of that of tokens that were looked up"


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Shares of all prompt tokens that came from the server's prefix cache, and how many could."""

    share: float
    unexplained: float  # beyond what was intended; where that is not known, in prompts that had not been sent before
    intended: float | None  # of the prompt characters, each counted once for every choice that was asked for


def cache_hits(run: Run) -> CacheHits | None:
    """What the prefix cache answered, and how much of it the run itself does not explain; None if nobody says.

    By what the server says of each request, else by its counters, which count a lookup for each of n choices: all but
    the first find the prompt of the first. Every step of a beam search is a lookup, so that of those nothing is said.

    A killed run knows no intended share: there a prompt that was sent before (the warm-up too), or a later turn
    of a session, may be in the cache as a whole; in any other request a hit can only be a beginning that prompts share,
    or what others sent.
    """
    body = (run.experiment.get("target") or {}).get("extra_body") or {}
    if body.get("use_beam_search"):
        return None
    rows = run.requests.sort_values("sent_at", kind="stable")
    repeated = rows.duplicated("prompt_id") | (rows["session"].notna() & rows.duplicated("session"))
    if (run.experiment.get("workload") or {}).get("salt") == "request" and not has_sessions(run):
        repeated &= False  # no two prompts begin alike, so that nothing explains a hit
    meant = intended_share(run)
    cached = cached_tokens(run.ok)
    known = run.ok[cached.notna() & run.ok["prompt_tokens"].notna()]
    total = float(known["prompt_tokens"].sum())
    if total:
        hits = cached.reindex(known.index)
        share, beyond = float(hits.sum()) / total, float(hits[~repeated.reindex(known.index)].sum()) / total
    else:
        risen = expositions.counter_delta(run.scrapes, run.first_scrapes, "cached_tokens") if run.scrapes else None
        total = float(run.scraped["prompt_tokens"].sum())
        if risen is None or not total:
            return None
        choices = body["n"] if isinstance(body.get("n"), int) and body["n"] > 1 else 1
        explained = float(run.scraped["prompt_tokens"][repeated.reindex(run.scraped.index)].sum())
        explained += (choices - 1) * (total - explained) / choices
        share, beyond = risen / (total * choices), max(0.0, risen / choices - explained) / total
        meant = None if meant is None else 1 - (1 - meant) / choices
    return CacheHits(share, beyond if meant is None else max(0.0, share - meant), meant)


def prefix_cache(run: Run) -> dict[str, Any]:
    """The intended share, the observed one of the requests, and that of the server's counters; None where unknown."""
    told = run.meta.get("prefix_intended") or {}
    cached = cached_tokens(run.ok)
    return {
        "intended": {
            "share": intended_share(run),
            "unit": "share of characters",
            "requests": told.get("requests"),
            "left_out": told.get("left_out"),
            "definition": INTENDED,
        },
        "observed": {
            "share": cached_share(run.ok),
            "unit": "share of tokens",
            "requests": int((cached.notna() & run.ok["prompt_tokens"].notna()).sum()),
            "definition": f"{OBSERVED}; of the measured requests that ended ok",
        },
        "counted": _counted(run),
    }


def _counted(run: Run) -> dict[str, Any]:
    gains = [expositions.counter_gain(run.scrapes, run.first_scrapes, f"prefix_{name}") for name in ("hits", "queries")]
    hits, queries = gains
    told = hits is not None and queries is not None and not (hits.since_restart or queries.since_restart)
    share = hits.value / queries.value if told and hits and queries and queries.value else None
    names = "; ".join(f"{name}: {gain.definition}" for gain in gains if gain for name in gain.names)
    return {
        "share": share,
        "unit": "share of tokens",
        "hits": hits.value if told and hits else None,
        "queries": queries.value if told and queries else None,
        "definition": f"{COUNTED}, over the scraped window, whoever asked" + (f". {names}" if names else ""),
    }


def intended_share(run: Run) -> float | None:
    """Of the prompt characters, as run.json has it; None for a run that never came to its end."""
    told = run.meta.get("prefix_intended")
    share = told.get("share") if isinstance(told, dict) else None
    return float(share) if isinstance(share, int | float) else None


def has_sessions(run: Run) -> bool:
    """Were the turns of a session sent as a conversation?"""
    return bool((run.experiment.get("workload") or {}).get("sessions", "none") != "none")


def cached_share(rows: pd.DataFrame) -> float | None:
    """The OBSERVED share of these requests; None if the server says it of none of them."""
    cached = cached_tokens(rows)
    known = cached.notna() & rows["prompt_tokens"].notna()
    total = float(rows["prompt_tokens"][known].sum())
    return float(cached[known].sum()) / total if total else None


def cached_tokens(rows: pd.DataFrame) -> pd.Series:
    """Of each request the prompt tokens from the server's prefix cache, by usage, else its timings; NaN unknown."""
    cached: pd.Series = rows["cached_tokens"].fillna(rows["server_cached_tokens"])
    return cached
