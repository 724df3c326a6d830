"""Retries: which attempts at a request are made again, and when. Pure arithmetic; the waiting and sending are user's.

An ask is what a user wants; an attempt is one request on the wire, with an id and a record of its own. No answer that
has begun is ever asked for again.
"""

from twoclocks.experiment import Retries
from twoclocks.record import NO_FILES, Record

JITTER = 0.25
"""So much of a pause is left to chance, so that users whom a server turned away together do not come back together."""


def pause_s(retries: Retries, record: Record, drawn: float) -> float | None:
    """Seconds from the end of this attempt until the next one is due; None: there is none.

    ``Retry-After``, where the server sent it and `respect_retry_after` is on; whoever is asked to stay away for longer
    than `longest_pause_s` does not come again. Else `pause_s`, doubled with each attempt, up to `longest_pause_s`, less
    JITTER of it times ``drawn``, a random number in [0, 1).
    """
    if record.attempt > retries.max or not may_be_repeated(retries, record):
        return None
    if retries.respect_retry_after and record.retry_after_s is not None:
        return record.retry_after_s if record.retry_after_s <= retries.longest_pause_s else None
    return min(retries.pause_s * 2.0 ** (record.attempt - 1), retries.longest_pause_s) * (1 - JITTER * drawn)


def may_be_repeated(retries: Retries, record: Record) -> bool:
    """Did this attempt end in a way that ``retries.after`` names?"""
    if record.status not in ("error", "timeout") or record.error_kind == NO_FILES:
        return False
    if record.sent_at is None:
        return "connect" in retries.after
    if record.error_kind in ("closed", "reset"):  # before any answer: later ones are truncated
        return "closed" in retries.after
    return record.error_kind == f"http_{record.http_status}" and record.http_status in retries.after
