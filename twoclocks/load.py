"""Load: a run folder -> Run, with its requests, chunks and server samples as DataFrames.

The only reader of run folders. Knows nothing of HTTP or Locust; computes with metrics, joins with join.
"""

import contextlib
import datetime
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import yaml

from twoclocks import metrics
from twoclocks.arrivals import chunk_columns, floats
from twoclocks.errors import RunFolderError
from twoclocks.expositions import Scrapes, label_text, quiet_scrape, read_scrapes
from twoclocks.join import TEXT_COLUMNS, Joined, join
from twoclocks.log_files import read_log_files
from twoclocks.log_series import log_series, placed, zone_of
from twoclocks.metrics import Chunks, Floats
from twoclocks.record import HUNG_UP, KINDS, Kind, Record, read_records
from twoclocks.server_logs import log_requests
from twoclocks.server_requests import read_server_requests
from twoclocks.settings_yaml import load_yaml

_Lists = tuple[Any, Any, list[bool]]  # chunk_us of all chunks, chunks of each request, does it tell its tokens?
BATCH = 5000
"""Records read at once."""

_FLOATS = (
    "intended_at", "connect_started_at", "connected_at", "sent_at", "written_at", "first_byte_at", "ended_at",
    "max_tokens", "expected_output_tokens", "prompt_tokens", "output_tokens", "cached_tokens", "turn", "http_status",
)  # fmt: skip


@dataclass(frozen=True)
class LogSeries:
    """One series of the server's log: a figure of one engine, line by line, while the run lasted."""

    name: str  # a key of log_series.MEANING
    engine: str | None
    unit: str
    at: Floats  # seconds on the run's clock, by the server's wall clock
    values: Floats
    zone: str  # in which the log's times were read, where they say none


@dataclass(frozen=True)
class Run:
    """One run folder. Times in its tables are seconds on the run's clock; NaN where unknown."""

    path: Path
    meta: dict[str, Any]  # run.json
    experiment: dict[str, Any]  # experiment.yaml
    requests: pd.DataFrame  # one row a request: the record's fields, the metrics, the server's timings
    arrivals: Chunks  # the same chunks as ``chunks``, as arrays
    rows: dict[str, int]  # source -> requests that servers told of in spans and logs
    unmatched_rows: dict[str, int]  # those that joined no request of ours: why -> how many
    log_series: list[LogSeries] = field(default_factory=list)  # what the server's log says of the engine over time
    short_name: str | None = None  # given where several runs stand side by side

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.path.resolve().name

    @property
    def shown_name(self) -> str:
        """How tables and figures call it."""
        return self.short_name or self.name

    @cached_property
    def chunks(self) -> pd.DataFrame:
        """One row a chunk: request_id, at, tokens, kind, choice."""
        return pd.DataFrame(
            {
                "request_id": pd.Categorical.from_codes(
                    self.arrivals.request, categories=pd.Index(_distinct(self.requests))
                ),
                "at": self.arrivals.at,
                "tokens": self.arrivals.tokens,
                "kind": pd.Categorical.from_codes(self.arrivals.kind, categories=pd.Index(KINDS)),
                "choice": self.arrivals.choice,
            }
        )

    @cached_property
    def all_scrapes(self) -> list[Scrapes]:
        """The scrapes of the server's /metrics and of those of its stages, an entry a URL."""
        return read_scrapes(self.path / "server_samples.jsonl")

    @cached_property
    def scrapes(self) -> list[Scrapes]:
        """The scrapes of the server's own /metrics, an entry a URL."""
        of_stages = {url for urls in stage_urls(self.experiment).values() for url in urls}
        return [scrapes for scrapes in self.all_scrapes if scrapes.url not in of_stages]

    @cached_property
    def server_samples(self) -> pd.DataFrame:
        """One row a sample of every good scrape: at, series, labels, value, url. Unchanged values are filled in."""
        parts = [_samples(scrapes) for scrapes in self.all_scrapes]
        empty = pd.DataFrame({name: [] for name in ("at", "series", "labels", "value", "url")})
        return pd.concat(parts, ignore_index=True) if parts else empty

    @cached_property
    def self_samples(self) -> pd.DataFrame:
        """One row a second and process of the load generator: at, worker, loop_lag_s (a list), cpu_s, wall_s, ..."""
        columns = (
            "at", "worker", "pid", "reader", "loop_lag_s", "cpu_s", "loop_cpu_s", "wall_s", "rss_mb", "open_file_limit",
            "users", "in_flight", "not_sent",
        )  # fmt: skip
        rows = _json_lines(self.path / "self_samples.jsonl")
        return pd.DataFrame({name: [row.get(name) for row in rows] for name in columns})

    @cached_property
    def gpu_samples(self) -> list[dict[str, Any]]:
        """The rows of gpu_samples.jsonl; none where no GPU was read."""
        return _json_lines(self.path / "gpu_samples.jsonl")

    @cached_property
    def process_samples(self) -> list[dict[str, Any]]:
        """The rows of process_samples.jsonl; none where no process of the server's was sampled."""
        return [row for row in _json_lines(self.path / "process_samples.jsonl") if "error" not in row]

    @property
    def in_process(self) -> bool:
        """Whether it ran an engine without a server, so that there is no other side."""
        return bool((self.meta.get("target") or {}).get("api") == "in-process")

    @property
    def partial(self) -> bool:
        """Whether the run never came to its end."""
        return bool(self.meta.get("status") != "finished")

    @property
    def window(self) -> tuple[float, float]:
        """Start and end of the measuring window; of a run that was killed, up to the last thing it recorded."""
        window = self.meta.get("window") or {}
        start, end = window.get("started_at"), window.get("ended_at")
        measured = self.requests[self.requests["phase"] != "warmup"]
        if start is None:
            start = measured["sent_at"].min()
        if end is None:
            end = measured["ended_at"].max()
        return float(start), float(end)

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The requests that count: no warm-up, and sent before the window's end (finished in the drain or not)."""
        end = self.window[1]
        rows = self.requests
        return rows[(rows["phase"] != "warmup") & ~(rows["sent_at"] > end)]

    @cached_property
    def ok(self) -> pd.DataFrame:
        """The measured requests that ended ok: those whose latencies are summarised."""
        ok = self.measured["status"] == "ok"
        return self.measured if ok.all() else self.measured[ok]  # of a long run a copy takes half a gigabyte

    @property
    def judged(self) -> pd.DataFrame:
        """The measured requests that an SLO judges: all but those that were hung up on as drawn, at a time that says
        nothing of the server.
        """
        return self.measured[self.measured["error_kind"] != HUNG_UP]

    @property
    def told_by(self) -> list[tuple[str, str]]:
        """(source, server) of each clock by which the server told of single requests that ended ok."""
        pairs = self.ok[["server_source", "server_kind"]].dropna().drop_duplicates()
        return sorted(zip(pairs["server_source"], pairs["server_kind"], strict=True))

    @cached_property
    def first_scrapes(self) -> list[int]:
        """For each URL, the row of the scrape from which its counters are read: the warm-up left out if it can be."""
        return [self.first_scrape(scrapes) for scrapes in self.scrapes]

    def first_scrape(self, scrapes: Scrapes) -> int:
        """The row of the scrape from which one URL's counters are read."""
        sent_at, ended_at = self.requests["sent_at"].to_numpy(), self.requests["ended_at"].to_numpy()
        return quiet_scrape(scrapes, self.window[0], sent_at, ended_at)

    @property
    def scraped(self) -> pd.DataFrame:
        """The requests, of whatever phase, sent between first and last good scrapes: those the counters tell of."""
        begun = [s.until[first] for s, first in zip(self.scrapes, self.first_scrapes, strict=True) if len(s.until)]
        sent_at = self.requests["sent_at"]
        return self.requests[(sent_at > max(begun)) & (sent_at < self.scraped_until)] if begun else self.requests[:0]

    @property
    def scraped_until(self) -> float:
        """When the last good scrape of the server was begun, of several URLs the earliest; NaN if there was none."""
        return min((float(scrapes.at[-1]) for scrapes in self.scrapes if len(scrapes.at)), default=math.nan)

    @cached_property
    def gaps(self) -> metrics.Gaps:
        """Chunk gaps of the measured requests that ended ok."""
        gaps = metrics.chunk_gaps(self.arrivals)
        chosen = np.isin(gaps.request, self.ok.index.to_numpy())
        return metrics.Gaps(gaps.request[chosen], gaps.seconds[chosen], gaps.tokens[chosen])


def load_run(path: str | Path) -> Run:
    """The run in a folder. Raises RunFolderError, in one line, for what is no run folder or cannot be read."""
    folder = Path(path)
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder; give the folder that a run printed, such as output/NAME")
    meta = _meta(folder)
    records, arrivals, lists = _read(folder / "requests.jsonl")
    experiment = _experiment(folder)
    frame = _requests(records, arrivals, lists)
    lines = read_log_files(folder)  # may be large: parsed here, and not kept
    joined = _join(folder, lines, frame, stage_names(experiment))
    ends = [float(end) for end in (meta.get("ended_at"), frame["ended_at"].max()) if end is not None and end == end]
    series = _log_series(lines, meta.get("started_at_unix"), max(ends, default=0.0))
    return Run(folder, meta, experiment, frame, arrivals, joined.rows, joined.unmatched_rows, series)


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: is no run folder, it has no run.json") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None
    if not isinstance(meta, dict):
        raise RunFolderError(f"{path}: expected an object, found {type(meta).__name__}")
    return meta


def _experiment(folder: Path) -> dict[str, Any]:
    path = folder / "experiment.yaml"
    try:
        experiment = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return experiment if isinstance(experiment, dict) else {}


def _read(path: Path) -> tuple[list[Record], Chunks, _Lists]:
    """The records without their lists of chunks, and the chunks as arrays; nothing for a run killed at its beginning.

    Batch by batch, since the chunks of a long run as Python lists would take many times the memory of the arrays; and
    what a million requests have in common is kept once.
    """
    records: list[Record] = []
    batches: list[list[Any]] = []
    kinds: dict[tuple[tuple[str, int], ...], list[tuple[Kind, int]]] = {}
    lean: dict[str, Any] = {"chunk_us": [], "chunk_tokens": None}
    tells_tokens: list[bool] = []
    try:
        reader = read_records(path)
        while batch := list(itertools.islice(reader, BATCH)):
            batches.append(chunk_columns(batch, path, len(records)))
            tells_tokens += [record.chunk_tokens is not None for record in batch]
            records += [
                msgspec.structs.replace(
                    record,
                    chunk_kinds=kinds.setdefault(tuple(record.chunk_kinds), record.chunk_kinds),
                    target=sys.intern(record.target),
                    prompt_id=sys.intern(record.prompt_id),
                    finish_reason=record.finish_reason and sys.intern(record.finish_reason),
                    **lean,
                )
                for record in batch
            ]
    except FileNotFoundError:
        pass
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        line = _first_bad_line(path)
        raise RunFolderError(f"{path} line {line} is no record: {error}") from None
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
    batches = batches or [chunk_columns([], path, 0)]
    *columns, micros, counts = (_first_column(batches) for _ in range(len(batches[0])))
    return records, Chunks(*columns), (micros, counts, tells_tokens)


def _first_column(batches: list[list[Any]]) -> Any:
    """The first column of all batches, which give theirs up: both at once would be twice the memory."""
    return np.concatenate([batch.pop(0) for batch in batches])


def _first_bad_line(path: Path) -> int:
    count = 0
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        for _ in read_records(path):
            count += 1
    return count + 1


def _requests(records: Sequence[Record], arrivals: Chunks, lists: _Lists) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            name: pd.Series([getattr(r, name) for r in records], dtype=object)
            for name in Record.__struct_fields__
            if name not in ("chunk_us", "chunk_tokens")
        }
    )
    micros, counts, tells_tokens = lists
    frame["chunk_us"] = _views(micros, counts)
    frame["chunk_tokens"] = _views(arrivals.tokens, counts, tells_tokens)
    for name in _FLOATS:
        frame[name] = frame[name].astype(np.float64)
    for name in ("user", "worker", "reads_merged"):
        frame[name] = frame[name].astype(np.int64)
    sent_at, output_tokens = frame["sent_at"].to_numpy(), frame["output_tokens"].to_numpy()
    frame["ttft"] = metrics.ttft(arrivals, sent_at)
    frame["tpot"], frame["tpot_estimated"] = metrics.tpot(arrivals, output_tokens)
    frame["e2e"] = metrics.e2e(arrivals, sent_at)
    gaps = metrics.chunk_gaps(arrivals)
    frame["itl_mean"], frame["itl_max"] = metrics.mean_and_max(gaps, len(frame))
    del gaps  # of a long run they are gigabytes
    frame["e2e_per_token"] = metrics.e2e_per_token(frame["e2e"].to_numpy(), output_tokens)
    frame["latency_from_intended"] = metrics.last_token_at(arrivals, len(frame)) - frame["intended_at"]
    frame["ttft_from_intended"] = frame["ttft"] + frame["sent_at"] - frame["intended_at"]
    frame["first_event"] = metrics.first_event(arrivals, sent_at)
    # tokens without text (a part of a character, the end token) come in empty and finish chunks, and count too
    frame["chunk_token_sum"] = np.bincount(arrivals.request, weights=arrivals.tokens, minlength=len(frame))
    frame["got_token"] = frame["ttft"].notna() | (frame["output_tokens"] > 0)
    return frame


def _join(folder: Path, lines: Sequence[str], frame: pd.DataFrame, stages: Sequence[str]) -> Joined:
    """Put what servers told of each request beside it."""
    rows = chain(read_server_requests(folder / "server_requests.jsonl"), log_requests(lines))
    joined = join(list(frame["request_id"]), list(frame["server"]), frame["output_tokens"].tolist(), rows, stages)
    columns = {
        name: pd.Series(values, index=frame.index, dtype=object if name in TEXT_COLUMNS else np.float64)
        for name, values in joined.columns.items()
    }
    frame[list(columns)] = pd.DataFrame(columns, index=frame.index)
    return joined


def _log_series(lines: Sequence[str], started_at_unix: float | None, duration_s: float) -> list[LogSeries]:
    """What the log says of the engine while the run lasted; nothing where the run's wall clock is not known."""
    if started_at_unix is None:
        return []
    local = datetime.datetime.fromtimestamp(started_at_unix).astimezone().tzinfo or datetime.UTC
    samples = list(log_series(lines))
    zone = zone_of(samples, started_at_unix, duration_s, local)
    offset = datetime.datetime.fromtimestamp(started_at_unix, zone).isoformat()[-len("+00:00") :]
    found: dict[tuple[str, str | None, str], list[tuple[float, float]]] = {}
    for at, sample in placed(samples, started_at_unix, zone):
        if 0 <= at <= duration_s:
            found.setdefault((sample.name, sample.engine, sample.unit), []).append((at, sample.value))
    read_as = f"UTC{offset.removesuffix('+00:00')}"
    return [
        LogSeries(name, engine, unit, floats([at for at, _ in pairs]), floats([value for _, value in pairs]), read_as)
        for (name, engine, unit), pairs in found.items()
    ]


def stage_names(experiment: dict[str, Any]) -> list[str]:
    """The names of target.stages, the outermost first."""
    return list(stage_urls(experiment))


def stage_urls(experiment: dict[str, Any]) -> dict[str, list[str]]:
    """The /metrics of each of target.stages, by its name, the outermost first."""
    stages = (experiment.get("target") or {}).get("stages") or []
    urls = {stage["name"]: stage.get("metrics_url") or "none" for stage in stages}
    return {name: [told] if isinstance(told, str) else told for name, told in urls.items()}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none if it is not there. A cut last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None


def _views(column: Any, counts: Any, told: Sequence[bool] | None = None) -> list[Any]:
    """Each request's part of a column over all chunks; no copies. None for those of which it is not ``told``."""
    parts = zip(np.cumsum(counts).tolist(), counts.tolist(), told or itertools.repeat(True), strict=False)
    return [column[end - count : end] if known else None for end, count, known in parts]


def _samples(scrapes: Scrapes) -> pd.DataFrame:
    row, column = np.nonzero(~np.isnan(scrapes.values))
    names = [name for name, _ in scrapes.series]
    labels = [label_text(labels) for _, labels in scrapes.series]
    return pd.DataFrame(
        {
            "at": scrapes.at[row],
            "series": pd.Series(np.array(names, dtype=object)[column], dtype="category"),
            "labels": pd.Series(np.array(labels, dtype=object)[column], dtype="category"),
            "value": scrapes.values[row, column],
            "url": scrapes.url,
        }
    )


def _distinct(requests: pd.DataFrame) -> list[str]:
    ids = list(requests["request_id"])
    if len(set(ids)) != len(ids):
        raise RunFolderError("requests.jsonl holds a request_id twice, so that chunks cannot be told apart")
    return ids
