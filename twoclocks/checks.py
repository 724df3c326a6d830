"""Checks: what two independent clocks and counters say of one run, held against each other, in words."""

from typing import Any

import pandas as pd

from twoclocks import expositions
from twoclocks.join import reasons
from twoclocks.load import Run

Found = tuple[str, bool | None, str]  # name, passed (None: could not be told), text


def checks(run: Run) -> list[dict[str, Any]]:
    """What can be held against each other in this run: name, passed (None: could not be told), text."""
    found = [_all_joined(run.ok), _not_before_server(run.ok), _same_counts(run.ok)]
    if run.scrapes:
        found += [
            _scraped(run),
            _same_tokens(run, "output_tokens", "generation_tokens", "output"),
            _same_tokens(run, "prompt_tokens", "prompt_tokens", "prompt"),
            _same_traffic(run),
        ]
    return [{"name": name, "passed": passed, "text": text} for name, passed, text in found]


def joined(ok: pd.DataFrame) -> dict[str, Any]:
    """How many of these requests are joined with the server's own timing, from what, and why the others are not."""
    sources = ok["server_source"].dropna()
    return {
        "ok": len(ok),
        "joined": len(sources),
        "sources": sorted(set(sources)),
        "unjoined": reasons(ok["server_unmatched"]),
    }


def _scraped(run: Run) -> Found:
    failed = sum(len(scrapes.failed) for scrapes in run.scrapes)
    total = failed + sum(len(scrapes.at) for scrapes in run.scrapes)
    if any(
        expositions.restarted(scrapes, first) for scrapes, first in zip(run.scrapes, run.first_scrapes, strict=True)
    ):
        return (
            "scrapes",
            False,
            "A server restarted during the run (its counters fell): its /metrics tell nothing of the whole.",
        )
    if failed:
        why = next(text for scrapes in run.scrapes for _, text in scrapes.failed)
        return "scrapes", False, f"{failed} of {total} scrapes of /metrics failed ({why})."
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
    inside = ok["server_ttft"].fillna(ok["server_queue"])
    part = "queue + prefill" if ok["server_ttft"].notna().any() else "queue"
    margin = (ok["ttft"] - inside).dropna()
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
    risen = expositions.counter_delta(run.scrapes, run.first_scrapes, counter)
    if risen is None:
        return name, None, f"The server's counter of {word} tokens was not read (absent, or it restarted)."
    ours = run.scraped
    client, cut_off = ours[column].sum(), int((ours["status"] != "ok").sum())
    counted = f"the client counted {client:,.0f} in {len(ours)} requests"
    text = f"{word.capitalize()} tokens: {counted}, the server's counter rose by {risen:,.0f}."
    same = bool(risen == client)
    if not same and cut_off:
        text += f" Of {cut_off} requests that did not end ok the client knows at most what had arrived."
    return name, same, text


def _same_traffic(run: Run) -> Found:
    gained = expositions.histogram_delta(run.scrapes, run.first_scrapes, "ttft")
    name = "only_our_traffic"
    if gained is None:
        return name, None, "The server's count of answered requests was not read (absent, or it restarted)."
    ours = int(run.scraped["got_token"].sum())
    text = f"The server gave {gained.count:,.0f} first tokens while the client received {ours:,}."
    if gained.count > ours:
        text += " Others used the server too, requests ran with n > 1, or some were cut off."
    return name, gained.count == ours, text
