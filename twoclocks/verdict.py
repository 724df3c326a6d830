"""Verdict: can the figures of this run be believed? VALID, SUSPECT or INVALID, with reasons, figures and remedies.

SUSPECT: something may have bent the figures; look before you quote them. INVALID: they do not measure what they claim.
Each rule is one function over the run; it returns a Reason or nothing. The rules of the measurement itself stand here,
those of the load generator, of the workers and of the server in modules of their own, each with its limits and why.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from twoclocks import checks, metrics
from twoclocks import verdict_fleet as fleet
from twoclocks import verdict_generator as generator
from twoclocks import verdict_server as server
from twoclocks.load import Run
from twoclocks.verdict_reason import Level, Reason

MIN_FOR_P99 = 100
MIN_FOR_DRIFT = 20
DRIFT_SHARE, DRIFT_P = 0.2, 0.01
MIN_BINS, MOST_BINS = 6, 40  # six of a half against six: the least that can fall below DRIFT_P with some to spare
CLOCK_S = 0.001  # what two clocks of one machine may differ by within a request


def verdict(run: Run) -> dict[str, Any]:
    """``{"level", "reasons": [...]}``, the gravest reasons first."""
    found = [reason for rule in RULES if (reason := rule(run)) is not None]
    found.sort(key=lambda reason: reason.level)  # INVALID before SUSPECT
    return {"level": found[0].level if found else "VALID", "reasons": [asdict(reason) for reason in found]}


def _nothing_ok(run: Run) -> Reason | None:
    """Without one whole answer there is nothing to report."""
    if len(run.ok):
        return None
    return Reason("INVALID", "nothing_ok", "no measured request ended ok", 0, "the errors, if there are any, say why")


def _too_few(run: Run) -> Reason | None:
    """A p99 of fewer than a hundred values is their maximum."""
    count = int(run.ok["ttft"].notna().sum())  # an answer may end without a token
    if run.ok.empty or count >= MIN_FOR_P99:
        return None
    text = f"{count} requests are too few for a p99: it is little more than the slowest one"
    if not count:
        text = f"none of the {len(run.ok):,} requests that ended ok brought a token, so that there is no latency"
    return Reason(
        "SUSPECT", "too_few", text, count, f"measure for longer, until {MIN_FOR_P99} requests or more have ended"
    )


def _before_server(run: Run) -> Reason | None:
    """The client cannot have a token before the server has made it; if so a join or a clock is wrong."""
    margin = (run.ok["ttft"] - checks.server_inside(run.ok)).dropna()
    early = margin[margin < -CLOCK_S]
    if early.empty:
        return None
    share = len(early) / len(margin)
    worst = -early.min() * 1e3
    text = f"{len(early)} of {len(margin)} first tokens came up to {worst:.1f} ms before the server made them"
    level: Level = "INVALID" if share > 0.01 else "SUSPECT"
    return Reason(level, "before_server", text, share, "report this: a join or a clock is wrong")


def _sources_disagree(run: Run) -> Reason | None:
    """Two ways in which the server tells the same duration: where they differ, one is joined or read wrongly."""
    worst = next(iter(checks.disagreements(run.ok)), None)
    if worst is None or worst.off / worst.requests <= 0.01:
        return None
    share = worst.off / worst.requests
    text = (
        f"{' and '.join(worst.sources)} disagree over the server's {worst.metric} in {share:.0%} of the requests, "
        f"by up to {worst.worst * 1e3:.1f} ms"
    )
    return Reason("SUSPECT", "sources_disagree", text, share, "report this: a join or a definition is wrong")


def _tokens_disagree(run: Run) -> Reason | None:
    """Chunks that do not add up to usage: ITL per token and throughput rest on a guess."""
    known = run.ok[run.ok["token_source"].isin(["usage", "per-chunk usage"]) & run.ok["chunk_token_sum"].notna()]
    # the end token is in usage and has no text of its own
    off = (known["output_tokens"] - known["chunk_token_sum"]).abs() - (known["finish_reason"] == "stop")
    share = float((off > 0).mean()) if len(known) else 0.0
    if share <= 0.01:
        return None
    text = f"in {share:.0%} of the requests the tokens of the chunks do not add up to the server's usage count"
    return Reason("SUSPECT", "tokens_disagree", text, share, "look whether n is above 1, or a parser holds text back")


def _drift(run: Run) -> Reason | None:
    """Where the experiment asked for one state, the window should be one: its halves, compared by rank, so that no
    tail decides. Steps, rates that change and traces ask for several, and a ramp is left out.
    """
    load = run.experiment.get("load") or {}
    shape, rate = load.get("shape", "ramp"), load.get("rate")
    if shape in ("steps", "trace") or (shape == "rate" and isinstance(rate, list) and len(rate) > 1):
        return None
    start, end = run.window
    start += float(load.get("ramp_s") or 0) if shape == "ramp" else 0.0
    rows = run.ok[run.ok["sent_at"] >= start]
    if rows.empty:
        return None
    end = min(end, float(rows["sent_at"].max()))  # of so many requests the last ones have the server for themselves
    halves = [
        (f"median {word}", rows.loc[rows["sent_at"] < (start + end) / 2, column].dropna().to_numpy(),
         rows.loc[rows["sent_at"] >= (start + end) / 2, column].dropna().to_numpy(), MIN_FOR_DRIFT)
        for column, word in (("ttft", "TTFT"), ("tpot", "TPOT"))
    ]  # fmt: skip
    if shape == "ramp":  # of an open loop they change by chance, as its arrivals do
        early, late = np.split(_tokens_of_bins(run, start, end), 2)
        halves.append(("tokens/s", early, late, MIN_BINS))
    for word, early, late, needed in halves:
        if min(len(early), len(late)) < needed or not np.median(early) > 0:
            continue
        change = float(np.median(late) / np.median(early)) - 1
        if abs(change) > DRIFT_SHARE and stats.mannwhitneyu(early, late).pvalue < DRIFT_P:
            text = f"{word} changed by {change:+.0%} between the halves of the window (after the ramp)"
            return Reason("SUSPECT", "drift", text, change, "warm up for longer, or measure for longer")
    return None


def _tokens_of_bins(run: Run, start: float, end: float) -> metrics.Floats:
    """Tokens that arrived in each of an even number of equal bins, none shorter than a request: users in step with each
    other make waves of that length.
    """
    count = int(min(MOST_BINS, (end - start) / max(float(run.ok["e2e"].median()), 1e-3))) // 2 * 2
    if count < 2:
        return np.empty(0)
    tokens = metrics.arrived_tokens(run.arrivals, run.requests["output_tokens"].to_numpy())
    return metrics.binned(run.arrivals.at, tokens, (start, end), count)


def _unjoined(run: Run) -> Reason | None:
    """A server that tells its timings tells them of every request, or of a sample nobody chose."""
    joined = float(run.ok["server_source"].notna().mean()) if len(run.ok) else 0.0
    if joined == 0 or joined >= 0.99:
        return None
    text = f"only {joined:.1%} of the requests could be joined with the server's own timing"
    return Reason("SUSPECT", "unjoined", text, joined, "the violins of client and server show different requests")


def _unfinished(run: Run) -> Reason | None:
    """A run that was killed ends somewhere, and its slowest requests are the ones that are missing."""
    if run.meta.get("status") != "running":
        return None
    return Reason("SUSPECT", "killed", "the run was killed or is still going on", None, "run again for a whole window")


RULES: tuple[Callable[[Run], Reason | None], ...] = (
    _nothing_ok, fleet.lost, generator.unwritten, fleet.missing_workers, server.restarted, server.foreign_traffic,
    server.fewer_answers, server.foreign_spans, _before_server, _sources_disagree, server.preempted,
    generator.loop_lag, generator.cpu, generator.stall, generator.late_sends, generator.not_sent,
    generator.no_file_handle, generator.file_limit, generator.clock_set,
    fleet.stalled_workers, fleet.changed_workers, fleet.held_back, fleet.clock_offsets,
    _drift, server.prefix_cache, server.short_outputs, _tokens_disagree, _unjoined, _too_few, _unfinished,
)  # fmt: skip
