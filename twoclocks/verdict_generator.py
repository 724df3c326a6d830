"""Verdict: reasons that lie with the load generator and its machine. See twoclocks.verdict."""

import numpy as np
import pandas as pd

from twoclocks import metrics
from twoclocks.load import Run
from twoclocks.record import NO_FILES
from twoclocks.verdict_reason import Reason

USER_STAMPS_SHARE = 0.01
MERGED_SHARE = 0.01
STALL_S = 0.1  # several gaps of any server; scheduling alone stays far below
LATE_SEND_S = 0.005
SPARE_FILES = 64  # for what else a process has open
CLOCK_SET_S, CLOCK_SLEW = 0.5, 0.001  # a clock that is disciplined moves by less


def loop_lag(run: Run) -> Reason | None:
    """A late loop reads late. Kernel stamps hide that until the reads of one stream lag by more than a gap."""
    lag = _lags(run)
    gaps = run.gaps.seconds
    if not len(lag) or not len(gaps):
        return None
    gap = _quantile(gaps[gaps > 0], 0.5) if gaps.any() else 0.0  # of tokens that a server sends together there is none
    p99 = _quantile(lag, 0.99)
    if (run.ok["timestamp_source"] != "kernel").mean() > USER_STAMPS_SHARE:
        # user-space stamps are late by what the loop is late; a tenth of a gap bends its percentiles visibly
        if p99 <= max(0.1 * gap, 1e-3):
            return None
        text = f"the event loop, which stamped the arrivals, was up to {p99 * 1e3:.1f} ms late (p99)"
    else:
        merged = _merged_share(run)
        if not gap or p99 <= gap or merged <= MERGED_SHARE:
            return None
        late = f"the event loop was up to {p99 * 1e3:.1f} ms late (p99), longer than a gap"
        text = f"{late}, and {merged:.1%} of the tokens were read together with others"
    return Reason("SUSPECT", "loop_lag", text, p99, "use more processes (--processes 2) or fewer users")


def cpu(run: Run) -> Reason | None:
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


def stall(run: Run) -> Reason | None:
    """A machine that stood still shows as one tick that came very late: sends and stamps of that moment are wrong."""
    lag = _lags(run)
    longest = float(lag.max()) if len(lag) else 0.0
    if longest <= STALL_S:
        return None
    text = f"the load generator stood still for {longest * 1e3:.0f} ms at least once"
    return Reason("SUSPECT", "stall", text, longest, "look for other work on this machine, and run again")


def late_sends(run: Run) -> Reason | None:
    """A request that goes out late waits where no clock of the server sees it. Connecting is apart, and not counted."""
    connecting = (run.measured["connected_at"] - run.measured["connect_started_at"]).fillna(0)
    late = (run.measured["sent_at"] - run.measured["intended_at"] - connecting).dropna().to_numpy()
    p99 = _quantile(late, 0.99)
    if not p99 > LATE_SEND_S:
        return None
    text = f"requests went out up to {p99 * 1e3:.1f} ms late (p99)"
    return Reason("SUSPECT", "late_sends", text, p99, "use more processes (--processes 2) or fewer users")


def not_sent(run: Run) -> Reason | None:
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


def no_file_handle(run: Run) -> Reason | None:
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


def file_limit(run: Run) -> Reason | None:
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


def unwritten(run: Run) -> Reason | None:
    """Records that the disk did not take: the run was stopped there, and they are in no figure."""
    unwritten = int(run.meta.get("unwritten_records") or 0)
    if not unwritten:
        return None
    text = f"{unwritten} records could not be written to the disk, and the run was stopped there"
    return Reason(
        "INVALID", "unwritten_records", text, unwritten, "make room, or name another place with --set output=DIR"
    )


def clock_set(run: Run) -> Reason | None:
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


def _lags(run: Run) -> metrics.Floats:
    """How late each tick of each process's loop was, in the window."""
    samples = run.self_samples
    inside = samples.loc[samples["at"].between(*run.window), "loop_lag_s"]
    return np.concatenate([np.asarray(lags, dtype=np.float64) for lags in inside]) if len(inside) else np.empty(0)


def _merged_share(run: Run) -> float:
    """Share of token chunks that came in one read with the one before, so that their gap is lost."""
    gaps = run.gaps.seconds
    return float((gaps == 0).mean()) if len(gaps) else 0.0


def _quantile(values: metrics.Floats | pd.Series, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")
