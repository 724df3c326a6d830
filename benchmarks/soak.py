"""`make soak`: four hours' worth of requests, compressed, and whether the tester stays as it was at the beginning.

    python benchmarks/soak.py [--requests 1000000] [--rate 750] [--tokens 50] [--keep FOLDER] [--report]

An open loop against the known-schedule server, through the tool as a user runs it: Locust with its web UI, records on
disk, the collectors, the exporter that Prometheus scrapes and the live tab that somebody looks at. Each process of the
tester is looked at every two seconds. Afterwards the records are held against the server's own log. Exit code 1 if a
bound is broken: memory, file handles or threads that grow, requests that leave later and later, a request that is not
accounted for. A run that is too short to tell breaks the bound too. Needs Linux. Load goes to 127.0.0.1 only.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from twoclocks import __version__, keeper
from twoclocks.calibrate import known_schedule, machine_shares, machine_time
from twoclocks.record import Record
from twoclocks.truth import SentLog, differences, error_figures, read_log, seen

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROMPT = "Describe the harbour of a small town in the early morning, in about a hundred words."
LOOK_S, TAB_S, SCRAPE_S = 2.0, 1.0, 5.0
"""Between two looks at the processes; two questions of the live tab, as its page asks; two scrapes of the exporter."""
STRETCHES = 10
WARM_SHARE = 0.2
"""Share of the requests in which the processes fill their buffers; left out of every fit."""
SAMPLED = 50
"""Of so many requests one is held against the server's log, chunk by chunk."""
MOST_MB, MOST_FILES, MOST_THREADS = 1.0, 1.0, 1.0
"""Growth per 100,000 requests that is allowed at most."""
MOST_DRIFT_MS = {"p50": 1.0, "p99": 10.0}
"""How much send lateness may rise over the run, by the upper end of the interval."""
MOST_STEAL = 0.01
"""Share of the machine's time that its host may take between two looks; what was due then, or until the next look,
tells of the host and is left out of the drift (`make bench` marks its rows by the same share)."""
SLICES = 50
"""The drift is that of the percentiles of so many slices of the run."""


Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Look:
    """A process of the tester at one instant."""

    at: float  # seconds of time.time()
    role: str
    pid: int
    rss_mb: float
    files: int  # open ones that are no sockets
    sockets: int
    threads: int
    cpu_s: float


@dataclass
class Seen:
    """What was seen while the run went on."""

    looks: list[Look] = field(default_factory=list)
    machine: list[tuple[float, list[int]]] = field(default_factory=list)  # unix seconds, and its ticks by kind
    tab: dict[str, Any] = field(default_factory=dict)  # the tab's last answer
    page: str = ""  # the exporter's last page
    answers: dict[str, int] = field(default_factory=dict)  # of tab and exporter: how many, and how many failed
    slowest_s: dict[str, float] = field(default_factory=dict)
    steal_share: float | None = None
    busy_share: float | None = None

    def count(self, what: str, by: int = 1) -> None:
        """One more answer, or one that failed."""
        self.answers[what] = self.answers.get(what, 0) + by


# the run


def experiment(options: argparse.Namespace, url: str, folder: Path, exporter_port: int) -> dict[str, Any]:
    """What is run, as an experiment file has it."""
    (folder / "prompt.jsonl").write_text(json.dumps({"id": "one", "prompt": PROMPT}) + "\n", encoding="utf-8")
    return {
        "name": "soak",
        "target": {"url": url, "server": "vllm"},
        "workload": {"requests": str(folder / "prompt.jsonl"), "max_tokens": options.tokens},
        "load": {
            "shape": "rate",
            "rate": options.rate,
            "arrivals": "poisson",
            "requests": options.requests,
            "duration_s": round(1.5 * options.requests / options.rate + 60),
            "drain_s": 60,
        },
        "collect": {"gpu": "none", "otlp_port": free_port(), "otlp_grpc_port": "none"},
        "export": {"prometheus_port": exporter_port},
        "slo": {"ttft_ms": 1000},
        "output": str(folder / "output"),
    }


def soak(options: argparse.Namespace, url: str, folder: Path) -> Seen:
    """The run, from start to end, into `run` in this folder. Exits with a line where it did not come to its end."""
    path, exporter, web = folder / "experiment.yaml", free_port(), free_port()
    path.write_text(json.dumps(experiment(options, url, folder, exporter)), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "locust", "-f", ROOT / "load_test.py", "--experiment", path]
    command += ["--only-summary", "--no-report", "--web-port", str(web)]
    if options.processes > 1:
        command += ["--processes", str(options.processes), "--master-bind-port", str(port := free_port())]
        command += ["--master-port", str(port)]
    seen_so_far, before = Seen(), machine_time()
    with (folder / "locust.log").open("wb") as log, client(command, log) as locust:
        ui, over = f"http://127.0.0.1:{web}", threading.Event()
        wait_for(lambda: answers(ui) >= options.processes, locust, folder)
        form = {"user_count": options.processes, "spawn_rate": options.processes, "host": url}
        httpx.post(f"{ui}/swarm", data=form, timeout=60).raise_for_status()
        wait_for(lambda: state(run_in(folder)) is not None, locust, folder)
        run = run_in(folder)
        viewers = [
            threading.Thread(target=look_at_tab, args=(ui, seen_so_far, over)),
            threading.Thread(target=scrape, args=(f"http://127.0.0.1:{exporter}/metrics", seen_so_far, over)),
        ]
        for viewer in viewers:
            viewer.start()
        try:
            deadline = time.monotonic() + 1.5 * options.requests / options.rate + 240
            while state(run) == "running":
                if not locust.running() or time.monotonic() > deadline:
                    give_up("the run did not come to its end", folder)
                seen_so_far.looks += looks(locust.pid)
                seen_so_far.machine.append((time.time(), machine_time() or []))
                time.sleep(LOOK_S)
            wait_for(lambda: has_told_the_end(seen_so_far), locust, folder, 60)
        finally:
            over.set()
            for viewer in viewers:
                viewer.join()
    run.rename(folder / "run")
    shares = machine_shares(before, machine_time())
    if shares is not None:
        seen_so_far.steal_share, seen_so_far.busy_share = shares
    return seen_so_far


@contextlib.contextmanager
def client(command: list[Any], log: Any) -> Iterator[keeper.Kept]:
    """Locust, which outlives neither this block nor this process."""
    kept = keeper.start(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, grace_s=60)
    try:
        yield kept
    finally:
        kept.stop()


def look_at_tab(ui: str, told: Seen, over: threading.Event) -> None:
    """Ask as the page of the live tab does, with what it knows already."""
    with httpx.Client(timeout=30) as http:
        while not over.is_set():
            query = {"run": told.tab["run"], "since": told.tab["seq"]} if told.tab else {}
            answer = asked(lambda query=query: http.get(f"{ui}/twoclocks/live.json", params=query), "tab", told)
            if answer is not None and "figures" in (fresh := answer.json()):
                told.tab = fresh
            over.wait(TAB_S)


def scrape(url: str, told: Seen, over: threading.Event) -> None:
    """As Prometheus does; the exporter goes when it has told the end."""
    while not over.is_set():
        if (answer := asked(lambda: httpx.get(url, timeout=30), "exporter", told)) is not None:
            told.page = answer.text
        elif "twoclocks" in told.page:
            told.count("exporter failed", -1)  # unless it was too early to go, which the counts would tell
            told.count("exporter gone")
        over.wait(SCRAPE_S)


def asked(ask: Callable[[], httpx.Response], who: str, told: Seen) -> httpx.Response | None:
    """The answer, counted and timed; None if there was none."""
    began = time.monotonic()
    try:
        answer = ask().raise_for_status()
    except httpx.HTTPError:
        told.count(f"{who} failed")
        return None
    told.count(who)
    told.slowest_s[who] = max(told.slowest_s.get(who, 0.0), time.monotonic() - began)
    return answer


def looks(pid: int) -> list[Look]:
    """A look at a process and at each of its descendants."""
    todo, found = [pid], []
    while todo:
        one = todo.pop()
        with contextlib.suppress(OSError):  # it may end while it is looked at
            found.append(look(one, is_first=one == pid))
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
    return found


def look(pid: int, *, is_first: bool) -> Look:
    """A look at one process. Raises OSError if it is not there."""
    proc = Path(f"/proc/{pid}")
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    words = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
    module = re.search(r"\btwoclocks\.(\w+)", " ".join(words))
    role = module[1] if module else "locust" if is_first else "worker"
    names = []
    for file in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(file.readlink()))
    sockets = sum(name.startswith("socket:") for name in names)
    return Look(
        at=time.time(),
        role=role,
        pid=pid,
        rss_mb=int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        files=len(names) - sockets,
        sockets=sockets,
        threads=int(fields[17]),
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    )


def run_in(folder: Path) -> Path:
    """The one run folder, which may not be there yet."""
    return next((folder / "output").glob("*"), folder / "output" / "none")


def state(run: Path) -> str | None:
    """What run.json says of the run; None as long as nothing is measured."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        meta = msgspec.json.decode((run / "run.json").read_bytes())
        if meta["status"] != "running" or meta["window"]["started_at"] is not None:
            return str(meta["status"])
    return None


def answers(ui: str) -> int:
    """Processes that are ready to send; 0 as long as the UI does not answer."""
    with contextlib.suppress(httpx.HTTPError):
        told = httpx.get(f"{ui}/stats/requests", timeout=10)
        return max(1, len(told.json().get("workers", []))) if told.is_success else 0
    return 0


def has_told_the_end(told: Seen) -> bool:
    """Have the tab, which may have more to read, and the exporter, which goes then, shown a run that is over?"""
    is_over = told.tab.get("state") in ("finished", "interrupted") and told.tab["bytes_behind"] == 0
    return is_over and told.answers.get("exporter gone", 0) > 0


def wait_for(condition: Callable[[], bool], locust: keeper.Kept, folder: Path, seconds: float = 120) -> None:
    """Until it is true. Exits with what Locust said if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not locust.running() or time.monotonic() > deadline:
            give_up(f"Locust ended early, or what was awaited did not come within {seconds:g} s", folder)
        time.sleep(0.2)


def give_up(what: str, folder: Path) -> None:
    """Exit with the last lines that Locust said."""
    said = (folder / "locust.log").read_text(errors="replace").strip().splitlines()[-5:]
    sys.exit("\n".join([f"soak: {what}; it said:", *said]))


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# the figures


class Line(msgspec.Struct):
    """What is read of a line of requests.jsonl."""

    request_id: str
    phase: str
    status: str
    intended_at: float
    ended_at: float
    sent_at: float | None = None
    chunk_kinds: list[tuple[str, int]] = []
    output_tokens: int | None = None
    worker: int = 0


@dataclass(frozen=True)
class Requests:
    """The records, in the order in which they were due; without the warm-up's but for the ids."""

    tokens: dict[str, int | None]  # request id -> its tokens, of all phases
    lines: int
    failed: Counter[str]  # status -> how many, of those that are not ok
    intended_at: Floats
    sent_at: Floats
    ended_at: Floats
    chunks: int
    bytes: int
    sampled: list[Record]  # every so many-th

    @property
    def late_ms(self) -> Floats:
        """Send lateness of each."""
        return (self.sent_at - self.intended_at) * 1e3


def read_requests(path: Path) -> Requests:
    """A pass over requests.jsonl, a line at a time."""
    decoder, whole = msgspec.json.Decoder(Line), msgspec.json.Decoder(Record)
    tokens: dict[str, int | None] = {}
    failed, rows, sampled, lines, chunks = Counter[str](), [], [], 0, 0
    with path.open("rb") as file:
        for number, text in enumerate(file):
            line = decoder.decode(text)
            lines += 1
            tokens[line.request_id] = line.output_tokens
            chunks += sum(count for _, count in line.chunk_kinds)
            if line.status != "ok":
                failed[line.status] += 1
            if line.phase != "warmup":
                rows.append((line.intended_at, np.nan if line.sent_at is None else line.sent_at, line.ended_at))
                if number % SAMPLED == 0 and line.status == "ok":
                    sampled.append(whole.decode(text))
    columns = np.array(sorted(rows)).reshape(-1, 3).T
    return Requests(tokens, lines, failed, *columns, chunks=chunks, bytes=path.stat().st_size, sampled=sampled)


@dataclass(frozen=True)
class Slope:
    """A straight line through the means of STRETCHES stretches: its slope per 100,000 requests, with a 95 % interval.

    Means of stretches, since neighbouring looks resemble each other, and an interval that took each for new evidence
    would be too narrow.
    """

    per_100k: float
    low: float
    high: float
    first: float  # mean of the first stretch
    last: float


def slope(requests: Floats, values: Floats, parts: int = STRETCHES) -> Slope | None:
    """The slope of values over the count of requests that had ended; None where a stretch has no value."""
    edges = np.linspace(requests.min(), requests.max(), parts + 1) if len(requests) else np.empty(0)
    part = np.clip(np.searchsorted(edges, requests, side="right") - 1, 0, parts - 1)
    counts = np.bincount(part, minlength=parts)
    if not len(requests) or not counts.all():
        return None
    x, y = (np.bincount(part, weights=column, minlength=parts) / counts for column in (requests, values))
    return line_through(x / 1e5, y)


def line_through(x: Floats, y: Floats) -> Slope | None:
    """Least squares, and the 95 % interval of the slope by Student's t; None where x does not vary."""
    if np.ptp(x) == 0:
        return None
    if np.ptp(y) == 0:  # of a constant scipy knows no error
        return Slope(0.0, 0.0, 0.0, float(y[0]), float(y[-1]))
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half, float(y[0]), float(y[-1]))


@dataclass(frozen=True)
class Bound:
    """One thing that had to hold."""

    name: str
    held: bool
    found: str
    allowed: str


def growth(looks_: list[Look], done: Callable[[float], float]) -> list[dict[str, Any]]:
    """Each process over the run, after its first requests. ``done``: unix time -> requests that had ended by then."""
    rows = []
    total = max((done(one.at) for one in looks_), default=0.0)
    for pid in dict.fromkeys(one.pid for one in looks_):
        own = [one for one in looks_ if one.pid == pid]
        kept = [one for one in own if done(one.at) >= WARM_SHARE * total]
        at = np.array([done(one.at) for one in kept])
        row: dict[str, Any] = {"role": own[-1].role, "pid": pid, "looks": len(kept)}
        row["cpu_s"] = own[-1].cpu_s - own[0].cpu_s  # without what it took to start
        for name in ("rss_mb", "files", "threads"):
            found = slope(at, np.array([float(getattr(one, name)) for one in kept]))
            row[name] = None if found is None else asdict(found)
        row |= {f"most_{name}": max(getattr(one, name) for one in own) for name in ("rss_mb", "sockets", "files")}
        rows.append(row)
    return rows


def undisturbed(at: Floats, machine: list[tuple[float, list[int]]]) -> Bools:
    """Of each time (unix seconds): whether the host took next to nothing then, and between the two looks before.

    False also where nothing is known: before the first look but one, and after the last.
    """
    known = [(when, ticks) for when, ticks in machine if ticks]
    if len(known) < 3:
        return np.zeros(len(at), dtype=bool)
    times = np.array([when for when, _ in known])
    steal = np.array([(machine_shares(early, late) or (1.0, 1.0))[0] for (_, early), (_, late) in pairwise(known)])
    calm = steal <= MOST_STEAL
    calm = np.concatenate([[False, False], calm[1:] & calm[:-1], [False]])
    return np.asarray(calm[np.searchsorted(times, at, side="right")])


def stretches(run: Requests, log: SentLog, calm: Bools) -> list[dict[str, Any]]:
    """Ten stretches of as many requests each, in the order in which they were due: lateness, and error of TTFT, ms."""
    rows, starts = [], np.linspace(0, len(run.intended_at), STRETCHES + 1).astype(int)
    late_ms = run.late_ms
    for begin, end in pairwise(starts.tolist()):
        if begin == end:
            continue
        first, last = run.intended_at[begin], run.intended_at[end - 1]
        sample = [record for record in run.sampled if first <= record.intended_at <= last]
        found = differences(map(seen, sample), log)
        error = error_figures(found.ttft)
        p50, p99, most = np.nanpercentile(late_ms[begin:end], [50, 99, 100])
        rows.append(
            {
                "from_s": float(first),
                "requests": int(end - begin),
                "late_ms": {"p50": float(p50), "p99": float(p99), "max": float(most)},
                "disturbed_share": float(1 - calm[begin:end].mean()),
                "ttft_error_ms": {
                    "n": error.n,
                    "p50": None if error.p50 is None else error.p50 * 1e3,
                    "p99": None if error.p99 is None else error.p99 * 1e3,
                },
            }
        )
    return rows


def most_at_once(sent_at: Floats, ended_at: Floats) -> int:
    """The largest number of requests that were under way at one time."""
    known = ~np.isnan(sent_at)
    times = np.concatenate([sent_at[known], ended_at[known]])
    steps = np.concatenate([np.ones(known.sum()), -np.ones(known.sum())])
    return int(np.cumsum(steps[np.lexsort((steps, times))]).max(initial=0))


def account(run: Requests, log: SentLog, meta: dict[str, Any], seen_: Seen, asked_for: int) -> dict[str, Any]:
    """The same requests as counted by the records, by the server, by the exporter and by the live tab."""
    whole = log.writes * int(log.meta["schedule"]["chunk_tokens"] * log.meta["schedule"]["write_chunks"]) >= log.tokens
    sent = dict(zip(log.request_id, np.where(whole, log.tokens, -1).tolist(), strict=True))
    exported = re.findall(r'^twoclocks_requests_total\{[^}]*phase="measure"[^}]*\} (\S+)$', seen_.page, re.M)
    figures = seen_.tab.get("figures", {})
    return {
        "asked_for": asked_for,
        "records": run.lines,
        "measured": len(run.intended_at),
        "server": len(log.request_id),
        "only_in_records": len(run.tokens.keys() - sent.keys()),
        "only_at_server": len(sent.keys() - run.tokens.keys()),
        "twice": run.lines - len(run.tokens) + len(log.request_id) - len(sent),
        "other_tokens": sum(run.tokens[one] != count for one, count in sent.items() if one in run.tokens),
        "tokens_server": int(log.tokens[whole].sum()),
        "tokens_records": sum(count or 0 for count in run.tokens.values()),
        "failed": dict(run.failed),
        "not_sent": meta.get("not_sent"),
        "lost_records": meta.get("lost_records"),
        "exporter": sum(float(value) for value in exported),
        "tab": figures.get("requests", {}).get("value"),
        "tab_bytes_behind": seen_.tab.get("bytes_behind"),
    }


def bounds(result: dict[str, Any]) -> list[Bound]:
    """What had to hold."""
    found = []
    for row in result["processes"]:
        for name, most, unit in (
            ("rss_mb", MOST_MB, "MiB"),
            ("files", MOST_FILES, "files"),
            ("threads", MOST_THREADS, "threads"),
        ):
            line = row[name]
            told = "too few looks to tell" if line is None else per_100k(line)
            what = {"rss_mb": "memory", "files": "open files that are no sockets", "threads": "threads"}[name]
            limit = f"at most {most:g} {unit} per 100,000 requests"
            found.append(Bound(f"{row['role']}: {what}", line is not None and line["high"] <= most, told, limit))
        most_sockets = round(1.1 * result["most_at_once"]) + 30
        held = row["most_sockets"] <= most_sockets
        found.append(Bound(f"{row['role']}: sockets", held, f"{row['most_sockets']}", f"at most {most_sockets}"))
    for name, line in result["drift_ms"].items():
        told = "too few undisturbed requests to tell"
        if line is not None:
            told = f"{line['ms']:+.3f} ms ({line['low']:+.3f} to {line['high']:+.3f})"
        held = line is not None and line["high"] <= MOST_DRIFT_MS[name]
        limit = f"at most {MOST_DRIFT_MS[name]:g} ms over the run"
        found.append(Bound(f"send lateness {name}: drift", held, told, limit))
    told = result["accounts"]
    same = {told["measured"], told["asked_for"], told["exporter"], told["tab"]}
    found += [
        Bound(
            "requests: asked for = records = exporter = live tab",
            len(same) == 1,
            f"{told['asked_for']} = {told['measured']} = {told['exporter']} = {told['tab']}",
            "all the same",
        ),
        Bound(
            "requests: records = server's log, by id",
            not (told["only_in_records"] or told["only_at_server"] or told["twice"]),
            f"{told['records']} and {told['server']}; {told['only_in_records']} only in the records, "
            f"{told['only_at_server']} only at the server, {told['twice']} twice",
            "none alone, none twice",
        ),
        Bound(
            "tokens: records = server's log, by id",
            told["other_tokens"] == 0 and told["tokens_records"] == told["tokens_server"],
            f"{told['tokens_records']} and {told['tokens_server']}; {told['other_tokens']} requests differ",
            "none differs",
        ),
        Bound(
            "nothing failed, held back or lost",
            not (told["failed"] or told["not_sent"] or told["lost_records"]),
            f"failed {told['failed'] or 0}, not sent {told['not_sent']}, lost {told['lost_records']}",
            "0",
        ),
        Bound(
            "live tab and exporter answered",
            not any(count for who, count in result["answers"].items() if who.endswith("failed")),
            ", ".join(f"{who} {count}" for who, count in result["answers"].items()),
            "each time",
        ),
    ]
    return found


def per_100k(line: dict[str, float]) -> str:
    """A slope with its interval."""
    return f"{line['per_100k']:+.3f} ({line['low']:+.3f} to {line['high']:+.3f})"


def drift(late_ms: Floats, calm: Bools, percentile: float) -> dict[str, float] | None:
    """How far a percentile of send lateness rose over the run, ms, with its 95 % interval.

    late_ms: of each request, in the order in which they were due. The median of the slopes between any two of SLICES
    slices (Theil and Sen), which a few bad slices do not move, times the length of the run; without what the host
    disturbed, and without the first fifth, in which all warms up. None where that leaves less than half of the slices.
    """
    kept = [
        (number / SLICES, float(np.percentile(one[quiet], percentile)))
        for number, (one, quiet) in enumerate(
            zip(np.array_split(late_ms, SLICES), np.array_split(calm & ~np.isnan(late_ms), SLICES), strict=True)
        )
        if number >= WARM_SHARE * SLICES and quiet.sum() >= 10 * 100 / (100 - percentile)
    ]
    if len(kept) < SLICES / 2:
        return None
    slope_, _, low, high = stats.theilslopes([value for _, value in kept], [at for at, _ in kept])
    return {"ms": float(slope_), "low": float(low), "high": float(high), "slices": len(kept)}


def judge(run: Path, log: SentLog, seen_: Seen, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run that has ended."""
    meta = msgspec.json.decode((run / "run.json").read_bytes())
    requests = read_requests(run / "requests.jsonl")
    ended = np.sort(requests.ended_at)

    def done(at: float) -> float:
        return float(np.searchsorted(ended, at - meta["started_at_unix"]))

    window = meta["window"]["ended_at"] - meta["window"]["started_at"]
    calm = undisturbed(requests.intended_at + meta["started_at_unix"], seen_.machine)
    tokens = int(log.tokens.sum())
    processes = growth(seen_.looks, done)
    cpu_s = sum(row["cpu_s"] for row in processes)
    result: dict[str, Any] = {
        "twoclocks_version": __version__,
        "host": {"platform": platform.platform(), "cpu_count": os.cpu_count(), "python": platform.python_version()},
        "options": {
            name: getattr(options, name) for name in ("requests", "rate", "tokens", "ttft_ms", "tpot_ms", "processes")
        },
        "reader": meta.get("reader"),
        "window_s": window,
        "requests_per_s": len(requests.intended_at) / window,
        "tokens_per_s": tokens / window,
        "most_at_once": most_at_once(requests.sent_at, requests.ended_at),
        "accounts": account(requests, log, meta, seen_, options.requests),
        "processes": processes,
        "cpu": {
            "s": cpu_s,
            "cores": cpu_s / window,
            "us_per_token": cpu_s / tokens * 1e6,
            "us_per_request": cpu_s / len(log.request_id) * 1e6,
            "server_s": log.meta["cpu_s"],
        },
        "stretches": stretches(requests, log, calm),
        "drift_ms": {name: drift(requests.late_ms, calm, float(name[1:])) for name in MOST_DRIFT_MS},
        "server_lateness_ms": {
            name: value * 1e3
            for name, value in asdict_struct(error_figures(log.lateness_s)).items()
            if name in ("p50", "p99", "max") and value is not None
        },
        "disk": {
            "requests_jsonl": requests.bytes,
            "bytes_per_chunk": requests.bytes / max(1, requests.chunks),
            "bytes_per_record": requests.bytes / max(1, requests.lines),
            "chunks": requests.chunks,
            "other_files": {
                file.name: file.stat().st_size for file in sorted(run.iterdir()) if file.name != "requests.jsonl"
            },
        },
        "answers": dict(seen_.answers),
        "slowest_answer_s": seen_.slowest_s,
        "steal_share": seen_.steal_share,
        "busy_share": seen_.busy_share,
        "looks": [asdict(one) for one in thinned(seen_.looks)],
    }
    return result | {"bounds": [asdict(bound) for bound in bounds(result)]}


def asdict_struct(value: msgspec.Struct) -> dict[str, Any]:
    """A struct as JSON has it."""
    fields: dict[str, Any] = msgspec.structs.asdict(value)
    return fields


def thinned(looks_: list[Look], kept: int = 100) -> list[Look]:
    """About so many looks at each process."""
    by_pid: dict[int, list[Look]] = {}
    for one in looks_:
        by_pid.setdefault(one.pid, []).append(one)
    return [one for own in by_pid.values() for one in own[:: max(1, len(own) // kept)]]


# showing


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def shown(result: dict[str, Any]) -> str:
    """What people read of the result."""
    accounts, disk, cpu = result["accounts"], result["disk"], result["cpu"]
    broken = [bound for bound in result["bounds"] if not bound["held"]]
    options, late = result["options"], result["server_lateness_ms"]
    lines = [
        f"# Soak: {accounts['measured']:,} requests, {accounts['tokens_server']:,} tokens, "
        f"{result['window_s'] / 60:.1f} min",
        "",
        f"Open loop, Poisson, {result['requests_per_s']:.0f} requests/s, {result['tokens_per_s']:,.0f} tokens/s; "
        f"answers of {options['tokens']} tokens, one token a chunk and a write, counted by the server's log; "
        f"TTFT {options['ttft_ms']:g} ms, {options['tpot_ms']:g} ms a token; at most {result['most_at_once']:,} at "
        f"once. {result['reader']} reader, {options['processes']} process(es) that send; web UI with the live tab, "
        "exporter and collector on.",
        "",
        "All bounds held." if not broken else f"{len(broken)} of {len(result['bounds'])} bounds are BROKEN.",
        "",
        table(
            ["bound", "", "found", "allowed"],
            [[b["name"], "held" if b["held"] else "BROKEN", b["found"], b["allowed"]] for b in result["bounds"]],
        ),
        "",
        "Growth per 100,000 requests, with its 95 % interval, after the first fifth of the run:",
        "",
        table(
            [
                "process",
                "memory, MiB",
                "first to last, MiB",
                "most, MiB",
                "files",
                "threads",
                "sockets, most",
                "CPU, s",
            ],
            [
                [
                    row["role"],
                    *(["–", "–"] if row["rss_mb"] is None else [per_100k(row["rss_mb"]), span(row["rss_mb"])]),
                    f"{row['most_rss_mb']:.1f}",
                    *("–" if row[name] is None else per_100k(row[name]) for name in ("files", "threads")),
                    f"{row['most_sockets']}",
                    f"{row['cpu_s']:.1f}",
                ]
                for row in result["processes"]
            ],
        ),
        "",
        "Send lateness (sent_at - intended_at) and the error of TTFT against the server's log, ms, in ten stretches. "
        f"Disturbed: due where the machine's host took more than {MOST_STEAL:.0%} of it; left out of the drift alone, "
        f"which is that of {SLICES} slices.",
        "",
        table(
            ["from, s", "requests", "late p50", "p99", "max", "disturbed", "TTFT error p50", "p99", "of"],
            [
                [
                    f"{row['from_s']:.0f}",
                    f"{row['requests']:,}",
                    *(f"{row['late_ms'][name]:.3f}" for name in ("p50", "p99", "max")),
                    f"{row['disturbed_share']:.0%}",
                    *(f"{row['ttft_error_ms'][n]:.3f}" if row["ttft_error_ms"]["n"] else "–" for n in ("p50", "p99")),
                    f"{row['ttft_error_ms']['n']:,}",
                ]
                for row in result["stretches"]
            ],
        ),
        "",
        f"On disk: {disk['requests_jsonl'] / 1e9:.2f} GB, {disk['bytes_per_chunk']:.2f} bytes a chunk, "
        f"{disk['bytes_per_record']:.0f} bytes a record of {disk['chunks'] / max(1, accounts['records']):.0f} chunks.",
        f"CPU of the tester with all its processes: {cpu['cores']:.2f} cores, {cpu['us_per_token']:.1f} us a token "
        f"({cpu['us_per_request']:.0f} us a request of {options['tokens']} tokens); the server's "
        f"{cpu['server_s']:.0f} s.",
        "The server itself was late by "
        + ", ".join(f"{name} {value:.2f}" for name, value in late.items())
        + " ms. "
        + (
            f"The machine was busy for {result['busy_share']:.0%} of its time; steal {result['steal_share']:.1%}."
            if result["busy_share"] is not None
            else ""
        ),
        "",
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, twoclocks {__version__}",
    ]
    if told := result.get("report"):
        lines += ["", f"`twoclocks report` on it: {told['seconds']:.0f} s, at most {told['most_mb']:,.0f} MiB."]
    return "\n".join(lines) + "\n"


def span(line: dict[str, float]) -> str:
    """From where to where."""
    return f"{line['first']:.1f} to {line['last']:.1f}"


# the report


def timed_report(run: Path) -> dict[str, Any]:
    """`twoclocks report` on the folder: seconds, and the most memory that it took."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "twoclocks", "report", str(run)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "most_mb": usage.ru_maxrss / 1024, "exit_code": process.returncode}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--requests", type=int, default=1_000_000)
    made.add_argument("--rate", type=float, default=750.0, help="requests/s (%(default)g)")
    made.add_argument("--tokens", type=int, default=50, help="of each answer, a chunk each (%(default)d)")
    made.add_argument("--ttft-ms", type=float, default=100.0)
    made.add_argument("--tpot-ms", type=float, default=10.0)
    made.add_argument("--processes", type=int, default=1, help="Locust workers (%(default)d: none, one process)")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="leave run folder, server's log and looks there")
    made.add_argument("--judge", type=Path, metavar="FOLDER", help="no run: judge one that was kept; same load options")
    made.add_argument("--report", action="store_true", help="also time `twoclocks report` on the run folder")
    made.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run, judge, leave the figures in benchmarks/results; 1 if a bound is broken."""
    options = parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if options.judge is not None:
            folder = options.judge
            seen_ = msgspec.json.decode((folder / "seen.json").read_bytes(), type=Seen)
        else:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twoclocks-soak-")))
            if options.keep is not None and folder.exists():
                sys.exit(f"soak: --keep {folder}: exists already; name a folder that does not exist yet")
            folder.mkdir(parents=True, exist_ok=True)
            flags = [f"--log={folder / 'sent.npz'}", f"--ttft-ms={options.ttft_ms}", f"--tpot-ms={options.tpot_ms}"]
            with known_schedule(flags) as url:
                seen_ = soak(options, url, folder)
            (folder / "seen.json").write_bytes(msgspec.json.encode(seen_))
        result = judge(folder / "run", read_log(folder / "sent.npz"), seen_, options)
        if options.report:
            result["report"] = timed_report(folder / "run")
    text = shown(result)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{datetime.now():%Y-%m-%d-%H%M}-soak.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\nresults: {path} and .md")
    return int(not all(bound["held"] for bound in result["bounds"]))


if __name__ == "__main__":
    sys.exit(main())
