"""Verdict: can the figures of this run be believed? VALID, SUSPECT or INVALID, with reasons, figures and remedies.

SUSPECT: something may have bent the figures; look before you quote them. INVALID: they do not measure what they claim.
Each rule is one function over the run; it returns a Reason or nothing. The limits stand beside each rule, with why.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from twoclocks import checks, expositions, fleet_summary, metrics
from twoclocks.load import Run
from twoclocks.prefix_cache import CACHED_SHARE, cache_hits
from twoclocks.record import NO_FILES

Level = Literal["SUSPECT", "INVALID"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a run is not simply valid."""

    level: Level
    name: str
    reason: str  # what was seen, in words, with the figure
    figure: float | None
    remedy: str  # how to go on


def verdict(run: Run) -> dict[str, Any]:
    """``{"level", "reasons": [...]}``, the gravest reasons first."""
    found = [reason for rule in RULES if (reason := rule(run)) is not None]
    found.sort(key=lambda reason: reason.level)  # INVALID before SUSPECT
    return {"level": found[0].level if found else "VALID", "reasons": [asdict(reason) for reason in found]}


# the load generator


def _loop_lag(run: Run) -> Reason | None:
    """A late loop reads late. Kernel stamps hide that until the reads of one stream lag by more than a gap."""
    lag = _lags(run)
    gap = _quantile(run.gaps.seconds, 0.5)
    if not len(lag) or np.isnan(gap):
        return None
    p99 = _quantile(lag, 0.99)
    if (run.ok["timestamp_source"] != "kernel").mean() > USER_STAMPS_SHARE:
        # user-space stamps are late by what the loop is late; a tenth of a gap bends its percentiles visibly
        if p99 <= max(0.1 * gap, 1e-3):
            return None
        text = f"the event loop, which stamped the arrivals, was up to {p99 * 1e3:.1f} ms late (p99)"
    else:
        merged = _merged_share(run)
        if p99 <= gap or merged <= MERGED_SHARE:
            return None
        late = f"the event loop was up to {p99 * 1e3:.1f} ms late (p99), longer than a gap"
        text = f"{late}, and {merged:.1%} of the tokens were read together with others"
    return Reason("SUSPECT", "loop_lag", text, p99, "use more processes (--processes 2) or fewer users")


def _cpu(run: Run) -> Reason | None:
    """A process that uses 90 % of a core has no time left when several streams want it at once."""
    samples = run.self_samples
    samples = samples[samples["at"].between(*run.window)]
    if samples.empty:
        return None
    # the thread of the event loop alone: a native reader beside it is meant to run at the same time
    samples = samples.assign(loop_s=samples["loop_cpu_s"].fillna(samples["cpu_s"]))
    used = samples.groupby("worker")[["loop_s", "wall_s"]].sum()
    share = float((used["loop_s"] / used["wall_s"]).max())
    if share <= 0.9:
        return None
    text = f"the event loop of the load generator used {share:.0%} of a core"
    return Reason("SUSPECT", "cpu", text, share, "use more processes (--processes 2) or fewer users")


def _stall(run: Run) -> Reason | None:
    """A machine that stood still shows as one tick that came very late: sends and stamps of that moment are wrong."""
    lag = _lags(run)
    longest = float(lag.max()) if len(lag) else 0.0
    if longest <= STALL_S:
        return None
    text = f"the load generator stood still for {longest * 1e3:.0f} ms at least once"
    return Reason("SUSPECT", "stall", text, longest, "look for other work on this machine, and run again")


def _late_sends(run: Run) -> Reason | None:
    """A request that goes out late waits where no clock of the server sees it. Connecting is apart, and not counted."""
    connecting = (run.measured["connected_at"] - run.measured["connect_started_at"]).fillna(0)
    late = (run.measured["sent_at"] - run.measured["intended_at"] - connecting).dropna().to_numpy()
    p99 = _quantile(late, 0.99)
    if not p99 > LATE_SEND_S:
        return None
    text = f"requests went out up to {p99 * 1e3:.1f} ms late (p99)"
    return Reason("SUSPECT", "late_sends", text, p99, "use more processes (--processes 2) or fewer users")


def _not_sent(run: Run) -> Reason | None:
    """Requests that were due and did not leave are in no latency: the slowest of them would have been there."""
    unsent = int(run.meta.get("not_sent") or 0)
    if not unsent:
        return None
    due = len(run.measured) + unsent
    text = (
        f"{unsent:,} of {due:,} requests that were due ({unsent / due:.1%}) could not leave, as load.max_in_flight "
        "others were under way"
    )
    return Reason(
        "SUSPECT", "not_sent", text, unsent / due,
        "ask for a lower rate, which this server can keep up with, or raise load.max_in_flight",
    )  # fmt: skip


def _no_file_handle(run: Run) -> Reason | None:
    """Requests that the tester itself could not send are no failures of the server, and were missing in its load."""
    without = int((run.measured["error_kind"] == NO_FILES).sum())
    if not without:
        return None
    share = without / len(run.measured)
    text = f"{without:,} of {len(run.measured):,} requests ({share:.1%}) could not be sent for want of a file handle"
    return Reason(
        "INVALID" if share > 0.01 else "SUSPECT", "no_file_handle", text, share,
        "raise the limit (ulimit -n), use more processes, or lower load.max_in_flight",
    )  # fmt: skip


def _file_limit(run: Run) -> Reason | None:
    """Each stream is an open file; near the limit connections fail, and the server is blamed."""
    limits = run.self_samples["open_file_limit"].dropna()
    if limits.empty:
        return None
    limit = int(limits.min())
    users = int(run.measured.groupby("worker")["user"].nunique().max()) if len(run.measured) else 0
    if users + SPARE_FILES <= limit:
        return None
    text = f"{users} streams in one process, which may have {limit} open files"
    return Reason("SUSPECT", "file_limit", text, limit, "raise the limit (ulimit -n), or use more processes")


def _lost(run: Run) -> Reason | None:
    """Records that never reached the master are in no figure, and nobody knows which."""
    lost = int(run.meta.get("lost_records") or 0)
    if not lost:
        return None
    text = f"{lost} records of the workers did not reach the master"
    return Reason("INVALID", "lost_records", text, lost, "look at the workers' output, and run again")


def _unwritten(run: Run) -> Reason | None:
    """Records that the disk did not take: the run was stopped there, and they are in no figure."""
    unwritten = int(run.meta.get("unwritten_records") or 0)
    if not unwritten:
        return None
    text = f"{unwritten} records could not be written to the disk, and the run was stopped there"
    return Reason(
        "INVALID", "unwritten_records", text, unwritten, "make room, or name another place with --set output=DIR"
    )


def _clock_set(run: Run) -> Reason | None:
    """Durations are on the monotonic clock, and hold. What the server's log tells is placed by the wall clock."""
    by = float(run.meta.get("wall_clock_set_s") or 0)
    if abs(by) <= max(CLOCK_SET_S, CLOCK_SLEW * (run.window[1] - run.window[0])):
        return None
    text = f"the wall clock was set by {by:+,.1f} s while the run lasted, or the machine slept"
    return Reason(
        "SUSPECT", "clock_set", text, by,
        "latencies hold, they are on another clock; lines of the server's log may be misplaced by as much: let the "
        "clock settle, and run again",
    )  # fmt: skip


def _missing_workers(run: Run) -> Reason | None:
    """What a worker had not sent yet when it ended is in no figure, and its users left the load."""
    missing = int(run.meta.get("missing_workers") or 0)
    if not missing:
        return None
    text = f"{missing} of {run.meta.get('workers')} workers ended before the run did"
    remedy = "look at the workers' output, and run again"
    if rows := fleet_summary.gone(_fleet(run)):
        lost, unsent = sum(row["lost"] for row in rows), sum(row["due_not_sent"] or 0 for row in rows)
        text += f": {fleet_summary.named(rows)} was last heard at second {rows[0]['heard_until']:.1f}"
        text += f"; {lost:,} requests that had been begun there have no record"
        text += f", and {unsent:,} that were due there were not sent" if unsent else ""
        remedy = "look at the output of those processes and at the memory of their hosts, and run again"
    return Reason("INVALID", "missing_workers", text, missing, remedy)


def _stalled_workers(run: Run) -> Reason | None:
    """A worker that stands still sends nothing, while Locust gives its users to others: the load was another one."""
    silent = fleet_summary.was_silent(_fleet(run), run.window)
    if not silent:
        return None
    row, seconds = max(silent, key=lambda one: one[1])
    more = f", and {len(silent) - 1} others for less" if len(silent) > 1 else ""
    text = f"{fleet_summary.name_of(row)} was not heard for {seconds:.1f} s while the run went on{more}"
    return Reason(
        "SUSPECT", "stalled_workers", text, seconds,
        "look whether its process or host stood still (its loop lag in self_samples.jsonl says so) or the network did, "
        "and run again",
    )  # fmt: skip


def _changed_workers(run: Run) -> Reason | None:
    """Before a worker came, and after it left, others carried its part, or nobody did."""
    rows = _fleet(run)
    late = fleet_summary.joined_late(rows, run.window[0])
    early = fleet_summary.left_early(rows, run.window[1])
    if not late and not early:
        return None
    told = []
    if late:
        told.append(f"{fleet_summary.named(late)} joined at second {late[0]['joined_at']:.1f}, in the midst of the run")
    if early:
        told.append(f"{fleet_summary.named(early)} left at second {early[0]['done_at']:.1f}, before its end")
    shape = (run.experiment.get("load") or {}).get("shape", "ramp")
    kept = "" if shape in ("ramp", "steps") else "; the arrivals stay with those that they were dealt to at the start"
    return Reason(
        "SUSPECT", "workers_changed", " and ".join(told) + kept, len(late) + len(early),
        "start all workers before the run: --expect-workers N lets the master wait for them",
    )  # fmt: skip


def _held_back(run: Run) -> Reason | None:
    """Where the master takes no records, workers stop sending rather than lose any: the load was lighter then."""
    held = [row for row in _fleet(run) if row["held_s"]]
    if not held:
        return None
    longest = max(row["held_s"] for row in held)
    text = f"{fleet_summary.named(held)} held requests back for {longest:.1f} s, as the master took no records"
    return Reason(
        "SUSPECT", "held_back", text, longest,
        "give the master a faster disk, a core of its own and a better network, or use fewer workers (docs/scale.md)",
    )  # fmt: skip


def _clock_offsets(run: Run) -> Reason | None:
    """Times of workers on other hosts are the master's only as well as the offset is known."""
    bad = fleet_summary.badly_known(_fleet(run))
    if not bad:
        return None
    clock = bad[0]["clock"]
    error = float(clock["error_s"])
    text = (
        f"the clock of {fleet_summary.named(bad)} is known to ± {error * 1e3:.1f} ms and drifts by "
        f"{clock['drift'] * 1e6:+.0f} µs/s: its sends, the edges of the window and tokens/s may be off by as much"
    )
    return Reason(
        "SUSPECT", "clock_offset", text, error,
        "bring the worker nearer to the master (an offset is known to half a round trip), and have chrony or NTP "
        "correct both clocks",
    )  # fmt: skip


# the server and others on it


def _restarted(run: Run) -> Reason | None:
    """Counters that fell: what the server says covers only a part of the run."""
    if not any(expositions.restarted(s, first) for s, first in zip(run.scrapes, run.first_scrapes, strict=True)):
        return None
    return Reason(
        "INVALID", "server_restarted", "a server restarted during the run (its counters fell)", None, "run again"
    )


def _foreign_traffic(run: Run) -> Reason | None:
    """The server gave more answers than we received: others had a share of it."""
    told = checks.traffic(run) if run.scrapes else None
    if told is None or told.answered <= told.ours:
        return None
    # a request that we cut off may have had its first token on the way; n > 1 counts each choice
    share = (told.answered - told.ours - told.unseen) / told.answered
    if share <= FOREIGN_SHARE or _is_n(run):
        return None
    text = f"{share:.1%} of the {told.answered:.0f} requests that the server answered were not ours"
    level: Level = "INVALID" if share > 10 * FOREIGN_SHARE else "SUSPECT"
    return Reason(level, "foreign_traffic", text, share, "keep others from the server while it is measured")


def _fewer_answers(run: Run) -> Reason | None:
    """The server counts fewer answers than we received: its page tells of a part of what answered us."""
    told = checks.traffic(run) if run.scrapes else None
    if told is None or not told.ours:
        return None
    share = (told.ours - told.under_way - told.answered) / told.ours
    if share <= FOREIGN_SHARE:
        return None
    text = f"{share:.1%} of the {told.ours} {told.what} that we received are missing in the server's own count"
    return Reason(
        "SUSPECT", "fewer_answers", text, share,
        "did it restart between two scrapes, or do several servers answer at this address? then give the /metrics of "
        "each in collect.metrics_url",
    )  # fmt: skip


def _foreign_spans(run: Run) -> Reason | None:
    """Spans with an id that is not ours: others had a share of the server. Of a killed run some are our own."""
    foreign, told = checks.foreign_spans(run)
    if foreign <= FEW_SPANS or foreign / told <= FOREIGN_SHARE or run.meta.get("status") == "running":
        return None
    share = foreign / told
    text = f"{share:.1%} of the {told} requests that the server told of in spans were not ours"
    level: Level = "INVALID" if share > 10 * FOREIGN_SHARE else "SUSPECT"
    return Reason(level, "foreign_spans", text, share, "keep others from the server while it is measured")


def _preempted(run: Run) -> Reason | None:
    """A preempted request loses its KV cache and is computed anew: its gaps show a full cache, not the model."""
    risen = expositions.counter_delta(run.scrapes, run.first_scrapes, "preemptions") if run.scrapes else None
    if not risen:
        return None
    text = f"the server preempted running requests {risen:.0f} times, as its KV cache was full"
    return Reason("SUSPECT", "preemptions", text, risen, "use fewer users, or give the server more KV cache")


def _prefix_cache(run: Run) -> Reason | None:
    """Prompts that the server knows from elsewhere are answered from its cache, and TTFT is that of the cache."""
    hits = cache_hits(run)
    if hits is None or hits.unexplained <= CACHED_SHARE:
        return None
    if hits.intended is not None:
        text = (
            f"{hits.share:.0%} of the prompt tokens came from the server's prefix cache, which could have known "
            f"{hits.intended:.0%} of the prompt characters from this run itself"
        )
    else:
        text = (
            f"{hits.unexplained:.0%} of the prompt tokens came from the server's prefix cache although this run had "
            "not sent these prompts before"
        )
    return Reason(
        "SUSPECT", "prefix_cache", text, hits.unexplained,
        "restart the server or empty its cache before a run, or make prompts differ from their beginning on",
    )  # fmt: skip


def _short_outputs(run: Run) -> Reason | None:
    """Where the workload says how long answers are, shorter ones make the load lighter than planned."""
    target, workload = run.experiment.get("target") or {}, run.experiment.get("workload") or {}
    asked = run.ok["expected_output_tokens"]
    if workload.get("ignore_eos") or (target.get("extra_body") or {}).get("ignore_eos"):
        asked = asked.fillna(run.ok["max_tokens"])
    asked = asked.clip(upper=run.ok["max_tokens"])  # an experiment may allow fewer than its request file recorded
    known = asked.notna() & run.ok["output_tokens"].notna()
    if not known.any():
        return None
    share = float((run.ok["output_tokens"][known] < asked[known]).mean())
    if share <= 0.01:
        return None
    text = f"{share:.0%} of the answers were shorter than the workload says that they are"
    remedy = "look whether this server knows ignore_eos, and whether it is set"
    return Reason("SUSPECT", "short_outputs", text, share, remedy)


# the measurement


def _nothing_ok(run: Run) -> Reason | None:
    """Without one whole answer there is nothing to report."""
    if len(run.ok):
        return None
    return Reason("INVALID", "nothing_ok", "no measured request ended ok", 0, "look at the errors below")


def _too_few(run: Run) -> Reason | None:
    """A p99 of fewer than a hundred values is their maximum."""
    count = len(run.ok)
    if count == 0 or count >= MIN_FOR_P99:
        return None
    text = f"{count} requests are too few for a p99: it is little more than the slowest one"
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
    _nothing_ok, _lost, _unwritten, _missing_workers, _restarted, _foreign_traffic, _fewer_answers, _foreign_spans,
    _before_server, _sources_disagree, _preempted, _loop_lag, _cpu, _stall,
    _late_sends, _not_sent, _no_file_handle, _file_limit, _clock_set,
    _stalled_workers, _changed_workers, _held_back, _clock_offsets,
    _drift, _prefix_cache, _short_outputs, _tokens_disagree, _unjoined, _too_few, _unfinished,
)  # fmt: skip

USER_STAMPS_SHARE = 0.01
MERGED_SHARE = 0.01
STALL_S = 0.1  # several gaps of any server; scheduling alone stays far below
LATE_SEND_S = 0.005
SPARE_FILES = 64  # for what else a process has open
FOREIGN_SHARE = 0.01
FEW_SPANS = 2  # a probe before the run may be told of, too
MIN_FOR_P99 = 100
MIN_FOR_DRIFT = 20
DRIFT_SHARE, DRIFT_P = 0.2, 0.01
MIN_BINS, MOST_BINS = 6, 40  # six of a half against six: the least that can fall below DRIFT_P with some to spare
CLOCK_SET_S, CLOCK_SLEW = 0.5, 0.001  # a clock that is disciplined moves by less
CLOCK_S = 0.001  # what two clocks of one machine may differ by within a request


def _lags(run: Run) -> metrics.Floats:
    """How late each tick of each process's loop was, in the window."""
    samples = run.self_samples
    inside = samples.loc[samples["at"].between(*run.window), "loop_lag_s"]
    return np.concatenate([np.asarray(lags, dtype=np.float64) for lags in inside]) if len(inside) else np.empty(0)


def _fleet(run: Run) -> list[dict[str, Any]]:
    """What run.json tells of the workers, of a run that had any and came to its end."""
    return run.meta.get("fleet") or []


def _merged_share(run: Run) -> float:
    """Share of token chunks that came in one read with the one before, so that their gap is lost."""
    gaps = run.gaps.seconds
    return float((gaps == 0).mean()) if len(gaps) else 0.0


def _is_n(run: Run) -> bool:
    return bool(((run.experiment.get("target") or {}).get("extra_body") or {}).get("n", 1) != 1)


def _quantile(values: metrics.Floats | pd.Series, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")
