"""`make bench`: what reading streams costs, and how wrong it is, held against a server whose sends are known.

    python benchmarks/bench.py [--quick] [--only NAME ...] [--streams 50 200] [--seconds 20] [--repeat 1]

The server is pinned on one core, the client (Locust with its children, or a peer) on another. Every figure is a ratio
within this session or an error against the server's own log; the server's lateness and the machine's other work stand
in each row, so that a stall shows itself. Needs Linux, two cores and gcc. Load goes to 127.0.0.1 only.

CPU per token = CPU of the client's processes from the first request to a second after the last token / tokens sent, so
that parsing, records on disk, the collector and the users' ramp are in it and the import of libraries is not.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from twoclocks import __version__
from twoclocks.calibrate import known_schedule, machine_time, self_observed, split_cores
from twoclocks.record import read_records
from twoclocks.servers import cache_folder
from twoclocks.truth import Ints, SentLog, differences, error_figures, read_log, seen

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCUST = [sys.executable, "-m", "locust", "--headless", "--only-summary"]
PROMPT = "Describe the harbour of a small town in the early morning, in about a hundred words."
METRICS_PAGE = ROOT / "tests" / "data" / "vllm_0.33_metrics_t0.prom"  # so that the collector has a real page to read
SAMPLE_S = 0.25
AFTER_S = 1.0
TTFT_MS, TPOT_MS = 100.0, 20.0
LIMIT = "bare C reader"
DISTURBED_CORES, DISTURBED_STEAL = 0.2, 0.01
"""Where other programs used more than this, a row is marked: its errors and ratio are also theirs."""


@dataclass(frozen=True)
class Load:
    """A load and what the server does with it."""

    name: str
    streams: int
    seconds: float
    tokens: int
    flags: tuple[str, ...] = ()  # of the schedule server
    ttft_ms: float = TTFT_MS


@dataclass(frozen=True)
class Job:
    """What a client is told."""

    load: Load
    url: str
    folder: Path
    body: Path


Told = tuple[Iterable[tuple[str, Ints]], dict[str, Any]]


@dataclass(frozen=True)
class Client:
    """A client: how it is started, and how what it saw is read."""

    name: str
    command: Callable[[Job], list[str]]
    read: Callable[[Job], Told]
    environment: dict[str, str] = field(default_factory=dict)


# the clients


def ours_command(job: Job) -> list[str]:
    """The whole tool: Locust, collector, records on disk."""
    load = job.load
    experiment = {
        "name": "bench",
        "target": {"url": job.url, "server": "vllm"},
        "workload": {"requests": str(job.folder / "prompt.jsonl"), "max_tokens": load.tokens},
        "load": {"users": load.streams, "ramp_s": 0, "duration_s": load.seconds, "drain_s": 60},
        "warmup": {"requests": 0},
        "collect": {"gpu": "none"},
        "output": str(job.folder / "output"),
    }
    (job.folder / "prompt.jsonl").write_text(json.dumps({"id": "one", "prompt": PROMPT}) + "\n", encoding="utf-8")
    path = job.folder / "experiment.yaml"
    path.write_text(json.dumps(experiment), encoding="utf-8")  # JSON is YAML
    return [*LOCUST, "-f", str(ROOT / "load_test.py"), "--experiment", str(path), "--no-report"]


def ours_read(job: Job) -> Told:
    """From the run folder."""
    (run,) = (job.folder / "output").iterdir()
    records = list(read_records(run / "requests.jsonl"))
    failed = [record for record in records if record.status != "ok"]
    sources = sorted({record.timestamp_source for record in records if record.chunk_us})
    meta = msgspec.json.decode((run / "run.json").read_bytes())
    told = {
        "reader": meta.get("reader"),
        "loop_lag": asdict_struct(self_observed(run / "self_samples.jsonl", (0.0, 1e9))[0]),
        "stamps": "+".join(sources),
        "merged": sum(record.reads_merged for record in records),
        "failed": len(failed),
        "first_failure": failed[0].error_message if failed else None,
        "bytes_per_chunk": (run / "requests.jsonl").stat().st_size / max(1, sum(len(r.chunk_us) for r in records)),
    }
    return [seen(record) for record in records if record.status == "ok"], told


def bare_command(job: Job) -> list[str]:
    """The C reader, built when first asked for."""
    binary = build_bare_reader()
    port, load = job.url.rpartition(":")[2], job.load
    return [str(binary), port, str(load.streams), str(load.seconds), str(job.body), str(job.folder / "rows.bin")]


def rows_read(job: Job, *, skip: int) -> Told:
    """Rows of (request, events in this read, ns): the bare reader's, the Locust peers' (skip: events before tokens)."""
    rows = np.fromfile(job.folder / "rows.bin", dtype=np.int64).reshape(-1, 3)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    streams, merged = [], 0
    for one in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        sent_ns, events, at_ns = one[0, 2], one[1:, 1], one[1:, 2]
        until = np.clip(np.cumsum(events) - skip, 0, job.load.tokens)  # token events that had come with each read
        tokens = np.diff(until, prepend=0)
        merged += int((tokens > 1).sum())
        streams.append((f"{one[0, 0]:032x}", np.repeat(at_ns, tokens) - sent_ns))
    return streams, {"stamps": "kernel" if skip else "user", "merged": merged if skip else None}


def peer_command(locustfile: str) -> Callable[[Job], list[str]]:
    """A Locust user as people write it."""

    def command(job: Job) -> list[str]:
        load = job.load
        users = [
            "-u",
            str(load.streams),
            "-r",
            str(load.streams),
            "-t",
            str(round(load.seconds)),
            "--stop-timeout",
            "60",
        ]
        return [*LOCUST, "-f", str(HERE / "peers" / locustfile), "-H", job.url, *users]

    return command


def vllm_command(python: Path) -> Callable[[Job], list[str]]:
    """`vllm bench serve` with as many prompts as the other clients send."""

    def command(job: Job) -> list[str]:
        load = job.load
        cycle_s = (load.ttft_ms + load.tokens * TPOT_MS) / 1e3
        prompts = load.streams * max(1, round(load.seconds / cycle_s))
        model = cache_folder() / "models" / "tiny-random-llama"
        return [
            *(str(python), str(HERE / "peers" / "vllm_serve.py"), "--backend", "openai-chat", "--base-url", job.url),
            *("--endpoint", "/v1/chat/completions", "--model", "known-schedule", "--tokenizer", str(model)),
            *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(load.tokens)),
            *("--ignore-eos", "--num-prompts", str(prompts), "--max-concurrency", str(load.streams)),
            *("--request-id-prefix", "bench-", "--num-warmups", "0", "--ready-check-timeout-sec", "0"),
            *("--disable-tqdm", "--save-result", "--save-detailed"),
            *("--result-dir", str(job.folder), "--result-filename", "vllm.json"),
        ]

    return command


def vllm_read(job: Job) -> Told:
    """Its first message is the role chunk, which it counts as the first token; left out here."""
    result = json.loads((job.folder / "vllm.json").read_text())
    streams = []
    for number, (ttft, itls) in enumerate(zip(result["ttfts"], result["itls"], strict=True)):
        offsets = np.round(np.cumsum([ttft, *itls]) * 1e9).astype(np.int64)
        streams.append((f"bench-{number}", offsets[1:]))
    return streams, {"stamps": "user", "merged": None}


def clients() -> list[Client]:
    """All that can run here, the limit first."""
    found = [
        Client(LIMIT, bare_command, lambda job: rows_read(job, skip=1)),
        Client("twoclocks", ours_command, ours_read),
        Client("twoclocks, Python reader", ours_command, ours_read, {"TWOCLOCKS_READER": "python"}),
        Client("Locust HttpUser", peer_command("http_user.py"), lambda job: rows_read(job, skip=0)),
        Client("Locust FastHttpUser", peer_command("fast_http_user.py"), lambda job: rows_read(job, skip=0)),
    ]
    python = cache_folder() / "venvs" / "vllm" / "bin" / "python"
    if python.exists():
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        found.append(Client("vllm bench serve", vllm_command(python), vllm_read, offline))
    else:
        print("vllm bench serve: not installed here (scripts/prepare.py vllm would); left out")
    return found


def build_bare_reader() -> Path:
    """Compiled into the build folder; again when the source is newer."""
    source, binary = HERE / "bare_reader.c", ROOT / "build" / "bare_reader"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        compiler = shutil.which("gcc")
        if compiler is None:
            sys.exit("bench: the limit is a C program; install gcc")
        subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source)], check=True)
    return binary


# measuring


@dataclass(frozen=True)
class Sample:
    """A look at the client's processes: CPU in all so far, resident memory."""

    at_ns: int
    cpu_s: float
    rss_bytes: int
    collecting_s: float = 0.0  # CPU of the process that reads /metrics, spans and logs, among the rest


def watch(process: subprocess.Popen[bytes], limit_s: float) -> list[Sample]:
    """Samples until the process ends, the last one with the CPU of all that it waited for. Raises TimeoutError."""
    samples, began = [], time.monotonic()
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            samples.append(Sample(time.monotonic_ns(), usage.ru_utime + usage.ru_stime, 0))
            return samples
        samples.append(sample(process.pid))
        if time.monotonic() - began > limit_s:
            raise TimeoutError(f"did not end within {limit_s:.0f} s")
        time.sleep(SAMPLE_S)


def sample(pid: int) -> Sample:
    """CPU and memory of a process and all its descendants, now."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    todo, ticks, pages, collecting = [pid], 0, 0, 0
    while todo:
        one = todo.pop()
        with contextlib.suppress(OSError):  # it may end while it is looked at
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            used = sum(int(value) for value in fields[11:15])  # user, system, and those of children that have ended
            ticks += used
            collecting += used if b"twoclocks.collector" in Path(f"/proc/{one}/cmdline").read_bytes() else 0
            pages += int(fields[21])
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
    return Sample(time.monotonic_ns(), ticks / tick, pages * page, collecting / tick)


def measure(client: Client, load: Load, server_core: int, client_core: int) -> dict[str, Any]:
    """One client under one load, as a row of figures. What goes wrong stands in the row as `failure`."""
    row: dict[str, Any] = {"client": client.name, "load": load.name, "streams": load.streams, "seconds": load.seconds}
    with tempfile.TemporaryDirectory(prefix="twoclocks-bench-") as name:
        folder = Path(name)
        body = folder / "body.json"
        body.write_text(json.dumps(request_body(load)), encoding="utf-8")
        log_path = folder / "sent.npz"
        flags = [f"--core={server_core}", f"--log={log_path}", f"--metrics={METRICS_PAGE}", f"--ttft-ms={load.ttft_ms}"]
        before = machine_time()
        began = time.monotonic()
        with known_schedule([*flags, f"--tpot-ms={TPOT_MS}", *load.flags]) as url:
            job = Job(load, url, folder, body)
            environment = {"BENCH_BODY": str(body), "BENCH_OUT": str(folder / "rows.bin"), **client.environment}
            with (folder / "client.log").open("wb") as out:
                started_ns = time.monotonic_ns()
                process = subprocess.Popen(
                    client.command(job),
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=lambda: os.sched_setaffinity(0, {client_core}),
                )
                try:
                    samples = watch(process, 3 * load.seconds + 120)
                except TimeoutError as error:
                    return row | {"failure": str(error)}
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, 9)
        after = machine_time()
        elapsed_s = time.monotonic() - began
        log = read_log(log_path)
        try:
            streams, told = client.read(job)
        except (OSError, ValueError) as error:
            last = (folder / "client.log").read_text(errors="replace").strip().splitlines()[-1:]
            return row | {"failure": f"{error}; it said: {' '.join(last)}"}
        startup = {"startup_s": (int(log.arrived_ns.min()) - started_ns) / 1e9} if len(log.arrived_ns) else {}
        host = machine(before, after, log, samples, elapsed_s)
        return row | told | figures(log, samples, streams, load) | startup | host


def request_body(load: Load) -> dict[str, Any]:
    """The body that the bare reader and the Locust peers send: what ours sends."""
    return {
        "model": "known-schedule",
        "max_tokens": load.tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "messages": [{"role": "user", "content": PROMPT}],
    }


def figures(log: SentLog, samples: list[Sample], streams: Iterable[tuple[str, Ints]], load: Load) -> dict[str, Any]:
    """Cost and errors of one client."""
    if not len(log.after_ns):
        return {"failure": "no token was sent"}
    first_ns, last_ns = int(log.arrived_ns.min()), int(log.after_ns.max())
    start = max((one for one in samples if one.at_ns <= first_ns), default=samples[0], key=lambda one: one.at_ns)
    end = next((one for one in samples if one.at_ns >= last_ns + AFTER_S * 1e9), samples[-1])
    tokens = log.sent_between(0, last_ns + 1)
    found = differences(streams, log)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / ((last_ns - first_ns) / 1e9),
        "cpu_us_per_token": (end.cpu_s - start.cpu_s) / tokens * 1e6,
        "collecting_cores": (end.collecting_s - start.collecting_s) / ((end.at_ns - start.at_ns) / 1e9),
        "peak_rss_bytes": max(one.rss_bytes for one in samples),
        "compared": found.compared,
        "not_compared": len(log.request_id) - found.compared,
        "ttft_error": asdict_struct(error_figures(found.ttft)),
        "gap_error": asdict_struct(error_figures(found.gap)),
        "server_lateness": asdict_struct(error_figures(log.lateness_s)),
        "server_bracket": asdict_struct(error_figures(log.bracket_s)),
        "server_cpu_us_per_token": log.meta["cpu_s"] / tokens * 1e6,
    }


def machine(
    before: list[int] | None, after: list[int] | None, log: SentLog, samples: list[Sample], elapsed_s: float
) -> dict[str, Any]:
    """What else the machine did meanwhile, in cores: neither the client nor the server."""
    assert before is not None
    assert after is not None
    passed = np.array(after) - np.array(before)
    tick = os.sysconf("SC_CLK_TCK")
    busy_s = float(passed.sum() - passed[3] - passed[4]) / tick
    others_s = busy_s - samples[-1].cpu_s - float(log.meta["cpu_s"])
    return {
        "steal_share": float(passed[7] / max(1, passed.sum())),
        "idle_share": float((passed[3] + passed[4]) / max(1, passed.sum())),
        "others_cores": max(0.0, others_s / elapsed_s),
    }


def asdict_struct(value: msgspec.Struct) -> dict[str, Any]:
    """A struct as JSON has it."""
    fields: dict[str, Any] = msgspec.structs.asdict(value)
    return fields


# showing

COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("load", lambda row: row["load"]),
    ("client", lambda row: row["client"] + (f" ({row['reader']})" if row.get("reader") else "")),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("CPU us/token = s/M", lambda row: f"{row['cpu_us_per_token']:.1f}"),
    ("x limit", lambda row: f"{row['ratio']:.2f}" if row.get("ratio") else "–"),
    ("TTFT error p50 / p99 / max, ms", lambda row: errors(row["ttft_error"])),
    ("gap error p50 / p99 / max, ms", lambda row: errors(row["gap_error"])),
    ("compared", lambda row: f"{row['compared']:,} of {row['compared'] + row['not_compared']:,}"),
    ("stamps", lambda row: row["stamps"]),
    ("merged reads", lambda row: "–" if row["merged"] is None else f"{row['merged']:,}"),
    ("kB/stream", lambda row: f"{row['kb_per_stream']:.0f}" if row.get("kb_per_stream") is not None else "–"),
    ("collecting, cores", lambda row: f"{row['collecting_cores']:.3f}" if row.get("collecting_cores") else "–"),
    ("start-up, s", lambda row: f"{row['startup_s']:.2f}"),
    ("server late p99 / max, ms", lambda row: errors(row["server_lateness"], ("p99", "max"))),
    ("others, cores", lambda row: f"{row['others_cores']:.2f}" + (" DISTURBED" if disturbed(row) else "")),
    ("steal", lambda row: f"{row['steal_share']:.1%}"),
]


def disturbed(row: dict[str, Any]) -> bool:
    """Did other programs, here or on the host, take so much of the machine that the row cannot be trusted?"""
    return bool(row["others_cores"] > DISTURBED_CORES or row["steal_share"] > DISTURBED_STEAL)


def errors(figures: dict[str, Any], keys: tuple[str, ...] = ("p50", "p99", "max")) -> str:
    """Some figures of an error in ms."""
    return " / ".join("–" if figures[key] is None else f"{figures[key] * 1e3:,.2f}" for key in keys)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with columns aligned so that a terminal shows them too."""
    cells = [[title for title, _ in COLUMNS]]
    for row in rows:
        if "failure" in row:
            cells.append([row["load"], row["client"], f"failed: {row['failure'][:120]}", *[""] * (len(COLUMNS) - 3)])
        else:
            cells.append([show(row) for _, show in COLUMNS])
    widths = [max(len(line[index]) for line in cells if "failed" not in line[2]) for index in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def median_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs of one client and load: each number's median; of one run, itself."""
    whole = [row for row in rows if "failure" not in row]
    return _median(whole) if whole else rows[0]


def _median(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    is_number = all(isinstance(value, int | float) for value in values)
    return statistics.median(values) if is_number and len(values) > 1 else first


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its CPU per token as a multiple of the bare reader's under the same load, and its memory a stream.

    Memory = (peak - peak of the same client with the fewest streams) / streams more: a process has to be there anyway.
    """
    whole = [row for row in rows if "failure" not in row]
    limits = {row["load"]: row["cpu_us_per_token"] for row in whole if row["client"] == LIMIT}
    fewest: dict[str, dict[str, Any]] = {}
    for row in sorted(whole, key=lambda row: -int(row["streams"])):
        fewest[row["client"]] = row

    def derived(row: dict[str, Any]) -> dict[str, Any]:
        least, limit = fewest[row["client"]], limits.get(row["load"])
        more = row["streams"] - least["streams"]
        grown = row["peak_rss_bytes"] - least["peak_rss_bytes"]
        return {
            "ratio": row["cpu_us_per_token"] / limit if limit else None,
            "kb_per_stream": grown / more / 1000 if more >= least["streams"] else None,  # else too few to tell
        }

    return [row if "failure" in row else row | derived(row) for row in rows]


def loads(options: argparse.Namespace) -> list[Load]:
    """What is measured: paced streams, then flat out and idle streams unless it has to be quick."""
    streams = options.streams or ([50, 200] if options.quick else [50, 200, 500, 1000])
    seconds = options.seconds or (10.0 if options.quick else 20.0)
    paced = [Load(f"{count} x 50/s", count, seconds, 128) for count in streams]
    if options.quick or options.streams:
        return paced
    flat = Load("flat out, 100", 100, seconds, 1024, ("--flat-out", "--write-chunks=8"))
    idle = Load("10,000 open", 10_000, 5.0, 1, ttft_ms=25_000.0)
    return [*paced, flat, idle]


def session(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows, one after the other."""
    server_cores, client_cores = split_cores()
    if not client_cores:
        sys.exit("bench: two cores are needed, one for the server and one for the client")
    chosen = [client for client in clients() if not options.only or client.name in (*options.only, LIMIT)]
    for load in loads(options):
        # idle streams are a matter of memory, which is asked of the limit and of ours
        takes_part = [client for client in chosen if load.streams < 5000 or client.name in (LIMIT, "twoclocks")]
        for client in takes_part:
            rows = []
            for _ in range(options.repeat):
                print(f"{load.name}: {client.name} ...", file=sys.stderr, flush=True)
                rows.append(measure(client, load, server_cores[0], max(client_cores)))
            yield median_row(rows) | {"repeats": rows}


def main() -> None:
    """Measure, print the table, leave the figures in benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 and 200 streams for 10 s")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these clients, and the bare C reader")
    parser.add_argument("--streams", nargs="+", type=int, help="these numbers of streams, nothing else")
    parser.add_argument("--seconds", type=float, help="how long each load lasts (20)")
    parser.add_argument("--repeat", type=int, default=1, help="the median of so many runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows: list[dict[str, Any]] = []
    for row in session(options):
        rows.append(row)
        print(table(with_ratios(rows)).splitlines()[-1], flush=True)  # the table again, whole, at the end
    rows = with_ratios(rows)
    shown = table(rows)
    marked = sum("failure" not in row and disturbed(row) for row in rows)
    if marked:
        shown += (
            f"\n\n{marked} of {len(rows)} rows were DISTURBED: other programs used more than {DISTURBED_CORES} cores, "
            f"or the host took more than {DISTURBED_STEAL:.0%}. Repeat them on a quiet machine."
        )
    print(f"\n{shown}")
    host = {"platform": platform.platform(), "cpu_count": os.cpu_count(), "python": platform.python_version()}
    result = {"twoclocks_version": __version__, "host": host, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{datetime.now():%Y-%m-%d-%H%M}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"{shown}\n", encoding="utf-8")
    print(f"\nresults: {path} and .md")


if __name__ == "__main__":
    main()
