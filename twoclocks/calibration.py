"""A calibration: the instrument's own error at one load, as calibration.json holds it; kept, found again, and used.

`calibrate` makes them; reports find the one that speaks for a run (`calibration_of`) and show its error bar (`bar`),
below which a difference is not resolved (`resolves`).
"""

import contextlib
import math
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from twoclocks.errors import TwoclocksError
from twoclocks.servers import cache_folder
from twoclocks.truth import ErrorFigures, mean_streams

if TYPE_CHECKING:
    from twoclocks.load import Run

METRICS = {"ttft": "TTFT", "gap": "ITL (chunk gap)", "tpot": "TPOT", "e2e": "E2E"}
LOWEST_LOAD, HIGHEST_LOAD = 0.8, 2.0
"""A calibration speaks for a run if its streams and its chunks/s are from 0.8 to 2 times the run's: below, it was made
with a less busy instrument; far above, its error says little of the run."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What the known-schedule server does, and for how long the load lasts."""

    ttft_ms: float = 100.0
    tpot_ms: float = 20.0
    chunk_tokens: int = 1
    output_tokens: int | None = None  # of every answer; None: max_tokens of the experiment and its request file
    seconds: float = 15.0  # measured, after the ramp
    processes: int = 1  # Locust workers


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The instrument's error at one load. calibration.json holds it as it is."""

    twoclocks_version: str
    made_at_unix: float
    hostname: str
    platform: str
    reader: str | None  # native | python, where run.json says
    processes: int
    replay: Replay
    streams: float  # mean number open at once, measured
    chunks_per_s: float  # that arrived, measured
    requests: int  # compared
    not_compared: int  # not ok, cut off, or not as the server sent them
    errors: dict[str, ErrorFigures]  # ttft, gap, tpot, e2e: client minus server, seconds
    server_lateness: ErrorFigures  # of the known schedule itself; not part of the errors, which are against true sends
    server_bracket: ErrorFigures  # how long a send took: how well the truth itself is known
    timestamp_sources: dict[str, int]  # requests
    reads_merged: int  # reads that carried several token chunks, whose own times are lost
    chunks: int
    steal_share: float | None  # of the machine's time; None where it is not told
    busy_share: float | None
    loop_lag: ErrorFigures  # how late the load generator's event loop was; kernel stamps are not moved by it
    loop_cores: float | None  # CPU of the busiest load generating process, in cores
    notes: list[str] = []


def bar(calibration: Calibration, metric: str = "ttft") -> float:
    """The error bar of a metric = p99 of |client - server|, in seconds; infinite where nothing was compared."""
    p99 = calibration.errors[metric].p99
    return math.inf if p99 is None else p99


def resolves(difference_s: float, calibration: Calibration, metric: str = "ttft") -> bool:
    """Is a difference larger than the error bar of its metric (ttft, gap, tpot or e2e), so that it can be believed?

    If no value is off by more than the bar, then no mean and no percentile of them is.
    """
    return abs(difference_s) > bar(calibration, metric)


def error_bars(calibration: Calibration) -> dict[str, float]:
    """The error bar, in seconds, of each metric that was compared; of the per-request means of gaps, that of a gap."""
    names = {"ttft": "ttft", "tpot": "tpot", "e2e": "e2e", "itl": "gap", "itl_mean": "gap"}
    return {name: bar(calibration, of) for name, of in names.items() if calibration.errors[of].p99 is not None}


def kept_folder() -> Path:
    """Where the calibrations of this user are kept."""
    return cache_folder() / "calibration"


def save(calibration: Calibration, path: Path | None = None) -> Path:
    """Store as JSON, by default under the host and the load; one of the same load replaces the one before."""
    if path is None:
        load = f"{calibration.streams:.0f}x{calibration.chunks_per_s:.0f}-{calibration.reader or 'any'}"
        path = kept_folder() / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', calibration.hostname)}-{load}.json"
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
        new.replace(path)
    except OSError as error:
        raise TwoclocksError(f"{path}: the calibration cannot be written: {error.strerror}") from None
    return path


def load_calibration(
    streams: float,
    chunks_per_s: float,
    *,
    hostname: str | None = None,
    reader: str | None = None,
    run: Path | None = None,
    kept_in: Path | None = None,
) -> Calibration | None:
    """The calibration that speaks for a load, or None: the one beside the run's files, else the nearest that is kept.

    It has to be of the same host (by default this one) and reader (if known), and its streams and chunks/s from
    LOWEST_LOAD to HIGHEST_LOAD times those given. A file that is no calibration is passed over.
    """
    if run is not None and (beside := _read(run / "calibration.json")) is not None:
        return beside
    kept = sorted((kept_in or kept_folder()).glob("*.json"))
    fitting = []
    for calibration in filter(None, map(_read, kept)):
        ratios = [_ratio(calibration.streams, streams), _ratio(calibration.chunks_per_s, chunks_per_s)]
        same = calibration.hostname == (hostname or socket.gethostname())
        same = same and (reader is None or calibration.reader in (None, reader))
        if same and all(LOWEST_LOAD <= ratio <= HIGHEST_LOAD for ratio in ratios):
            fitting.append((sum(abs(math.log(ratio)) for ratio in ratios), -calibration.made_at_unix, calibration))
    return min(fitting, key=lambda entry: entry[:2])[2] if fitting else None


def calibration_of(run: "Run", kept_in: Path | None = None) -> Calibration | None:
    """The calibration that speaks for a run folder's host, reader, streams and chunks/s, or None."""
    start, end = run.window
    measured = run.requests[run.requests["phase"] != "warmup"]
    arrivals = run.arrivals
    inside = arrivals.is_token & (arrivals.at >= start) & (arrivals.at <= end)
    return load_calibration(
        mean_streams(measured["sent_at"].to_numpy(), measured["ended_at"].to_numpy(), (start, end)),
        float(inside.sum() / (end - start)) if end > start else math.nan,
        hostname=(run.meta.get("host") or {}).get("hostname") or "unknown",
        reader=run.meta.get("reader"),
        run=run.path,
        kept_in=kept_in,
    )


def text(calibration: Calibration) -> str:
    """What the terminal shows."""
    c, ms = calibration, 1e3
    lines = [
        f"Instrument error at {c.streams:.0f} streams, {c.chunks_per_s:,.0f} chunks/s:"
        f" client - server, ms (reader: {c.reader or 'unknown'})",
        f"  {'':<18}{'n':>10}{'p50':>10}{'p99':>10}{'max':>10}{'mean':>10}",
    ]
    shown = [(label, c.errors[name]) for name, label in METRICS.items()]
    for label, e in [*shown, ("server's lateness", c.server_lateness), ("our loop's lag", c.loop_lag)]:
        values = [e.p50, e.p99, e.max, e.mean]
        cells = "".join(f"{'–':>10}" if value is None else f"{value * ms:>10.3f}" for value in values)
        lines.append(f"  {label:<18}{e.n:>10,}{cells}")
    sources = ", ".join(f"{source} {count:,}" for source, count in c.timestamp_sources.items())
    lines.append("  p50, p99, max of the absolute error; mean with its sign. Lateness and lag are not in the errors.")
    lines.append(
        f"requests compared {c.requests:,}, not compared {c.not_compared:,}; stamps: {sources};"
        f" merged reads {c.reads_merged:,} of {c.chunks:,} chunks"
    )
    if c.steal_share is not None and c.busy_share is not None:
        cores = "" if c.loop_cores is None else f"; the load generator used {c.loop_cores:.2f} cores"
        lines.append(f"machine: busy {c.busy_share:.0%}, steal {c.steal_share:.1%} of its time{cores}")
    lines += [f"note: {note}" for note in c.notes]
    return "\n".join(lines)


def _read(path: Path) -> Calibration | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    return None


def _ratio(above: float, below: float) -> float:
    return above / below if above > 0 and below > 0 else math.nan
