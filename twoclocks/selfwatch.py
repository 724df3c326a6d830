"""The load generator watches itself: is its event loop late, is its CPU full, what is it at? A line a second in
self_samples.jsonl.

A loop that is late sends late and, without the kernel's stamps, reads late; the verdict is built on these lines.
"""

import resource
import time
from collections.abc import Callable, Iterator

import gevent
import msgspec

TICK_S = 0.05  # twenty wake-ups a second cost well under 1 % of a core
LINE_S = 1.0


class SelfSample(msgspec.Struct, frozen=True):
    """What one process of the load generator did in one second."""

    at: float  # seconds on the run's clock, at the end of the second
    worker: int  # which process; 0 without workers
    pid: int  # its id in the operating system
    reader: str  # native or python: what this process reads with
    loop_lag_s: list[float]  # how late each tick was
    cpu_s: float  # CPU time of the process, all threads
    loop_cpu_s: float  # CPU time of the event loop's thread; the rest is the native reader's
    wall_s: float  # length of this second
    rss_mb: float  # the largest so far
    open_file_limit: int  # open files that it may have
    users: int  # Locust's, of this process; in an open loop one of them sends all that is due
    in_flight: int  # requests under way
    not_sent: int  # so far: were due while load.max_in_flight others were under way


def watch(
    clock: Callable[[], float],
    worker: int,
    pid: int,
    reader: str,
    write: Callable[[bytes], None],
    load: Callable[[], tuple[int, int, int]],
) -> None:
    """Write a line a second, for ever. Runs in a greenlet of its own.

    ``clock`` tells seconds on the run's clock, ``load`` users, requests in flight, and requests not sent so far.
    """
    encoder = msgspec.json.Encoder()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    cpu, loop_cpu, began = time.process_time(), time.thread_time(), time.monotonic()
    for lags in _ticks():
        now_cpu, now_loop_cpu, now = time.process_time(), time.thread_time(), time.monotonic()
        users, in_flight, not_sent = load()
        sample = SelfSample(
            at=clock(),
            worker=worker,
            pid=pid,
            reader=reader,
            loop_lag_s=lags,
            cpu_s=now_cpu - cpu,
            loop_cpu_s=now_loop_cpu - loop_cpu,
            wall_s=now - began,
            rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            open_file_limit=limit,
            users=users,
            in_flight=in_flight,
            not_sent=not_sent,
        )
        cpu, loop_cpu, began = now_cpu, now_loop_cpu, now
        write(encoder.encode(sample) + b"\n")


def _ticks() -> Iterator[list[float]]:
    """The lags of each second's ticks: how much later than asked the loop came back, microseconds kept."""
    while True:
        lags = []
        for _ in range(round(LINE_S / TICK_S)):
            due = time.monotonic() + TICK_S
            gevent.sleep(TICK_S)
            lags.append(round(max(0.0, time.monotonic() - due), 6))
        yield lags
