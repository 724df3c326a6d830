"""Verdict: reasons that lie with the workers of a distributed run. See twoclocks.verdict."""

from typing import Any

from twoclocks import fleet_summary
from twoclocks.load import Run
from twoclocks.verdict_reason import Reason


def lost(run: Run) -> Reason | None:
    """Records that never reached the master are in no figure, and nobody knows which."""
    lost = int(run.meta.get("lost_records") or 0)
    if not lost:
        return None
    text = f"{lost} records of the workers did not reach the master"
    return Reason("INVALID", "lost_records", text, lost, "look at the workers' output, and run again")


def missing_workers(run: Run) -> Reason | None:
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


def stalled_workers(run: Run) -> Reason | None:
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


def changed_workers(run: Run) -> Reason | None:
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


def held_back(run: Run) -> Reason | None:
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


def clock_offsets(run: Run) -> Reason | None:
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


def _fleet(run: Run) -> list[dict[str, Any]]:
    """What run.json tells of the workers, of a run that had any and came to its end."""
    return run.meta.get("fleet") or []
