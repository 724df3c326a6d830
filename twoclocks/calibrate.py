"""Calibrate: an experiment's load against the known-schedule server on this machine -> the instrument's own error.

The load goes the whole way of a real run: Locust in a process of its own, records on disk. Only the server is replaced,
by one whose sends are known. What is left between the two is the error of this tool, on this machine, at this load.
The result is a `calibration.Calibration`, which reports find and use.
"""

import contextlib
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from twoclocks import __version__, keeper
from twoclocks.calibration import METRICS, Calibration, Replay
from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Experiment, Load, load_experiment
from twoclocks.levels import sweep_levels
from twoclocks.record import Record, read_records
from twoclocks.truth import ErrorFigures, SentLog, differences, error_figures, mean_streams, read_log, seen

ROOT = Path(__file__).resolve().parent.parent
LOCUST_GRACE_S = 60.0
STALL_SHARE = 0.01
"""Share of the machine's time taken by others (steal) above which a calibration says that it was disturbed."""

Progress = Callable[[str], None]


def chosen(options: Namespace) -> tuple[Experiment, Replay]:
    """What the command line of `twoclocks calibrate` asks for. Raises ExperimentError, RunFolderError."""
    like: Path | None = options.like
    path = options.experiment or (like / "experiment.yaml" if like else ROOT / "configs" / "default.yaml")
    given = {name: getattr(options, name) for name in Replay.__struct_fields__}
    replay = replay_like(like) if like else Replay()
    replay = msgspec.structs.replace(replay, **{name: value for name, value in given.items() if value is not None})
    for name, value in msgspec.structs.asdict(replay).items():
        if value is not None and value <= 0:
            raise TwoclocksError(f"--{name.replace('_', '-')}: expected a number above 0, found {value:g}")
    return load_experiment(path, options.set), replay


def calibrate(experiment: Experiment, replay: Replay, progress: Progress = lambda doing: None) -> Calibration:
    """Replay the load and compare. Raises TwoclocksError if the load could not be run."""
    server_cores, client_cores = split_cores()
    with tempfile.TemporaryDirectory(prefix="twoclocks-") as folder:
        log_path = Path(folder, "sent.npz")
        flags = [f"--ttft-ms={replay.ttft_ms}", f"--tpot-ms={replay.tpot_ms}", f"--chunk-tokens={replay.chunk_tokens}"]
        flags += [f"--log={log_path}"] + [f"--core={core}" for core in server_cores]
        with known_schedule(flags) as url:
            changed = replayed(experiment, replay, url, Path(folder))
            load = changed["load"]
            progress(f"{load.get('users')} users for {load['duration_s']:g} s against a known schedule at {url}")
            before = machine_time()
            run = run_locust(changed, Path(folder), client_cores, replay.processes)
            shares = machine_shares(before, machine_time())
        notes = [] if client_cores else ["one core for server and load alike: each waits for the other"]
        return judge(run, read_log(log_path), replay, shares, notes)


def replayed(experiment: Experiment, replay: Replay, url: str, output: Path) -> dict[str, Any]:
    """The experiment as a file would have it, aimed at the known schedule for a shorter time; no headers, no goals."""
    raw: dict[str, Any] = msgspec.to_builtins(experiment)
    target, load = raw["target"], raw["load"]
    target |= {"url": url, "name": "known schedule", "model": "auto", "headers": {}, "tls_verify": True}
    if replay.output_tokens is not None:
        target["extra_body"] = target["extra_body"] | {"max_tokens": replay.output_tokens}
    raw["workload"] |= {"cancel_share": 0, "patience_s": "none"}  # every stream is to be compared to its end
    load |= _heaviest(experiment.load)
    load["ramp_s"] = min(load["ramp_s"], replay.seconds) if load["shape"] == "ramp" else 0
    load["duration_s"] = load["ramp_s"] + replay.seconds
    tokens = replay.output_tokens or raw["workload"]["max_tokens"]
    load["drain_s"] = max(load["drain_s"], (replay.ttft_ms + tokens * replay.tpot_ms) / 1e3 + 5)
    alone = {"metrics_url": "auto", "log": "none", "gpu": "none", "otlp_port": "none", "otlp_grpc_port": "none"}
    raw["collect"] |= alone
    return raw | {"name": "calibration", "slo": {}, "output": str(output), "output_text": False}


def _heaviest(load: Load) -> dict[str, Any]:
    """The keys of a load that is all the time as heavy as this one is at its peak, where it is not already."""
    if load.shape == "steps":
        return {"shape": "ramp", "users": max(users for users, _ in load.steps)}
    if load.shape == "rate" and not isinstance(load.rate, int | float):
        return {"rate": max(rate for _, rate in load.rate)}
    if load.shape == "batch":
        return {"batches": "none"}
    if load.shape in ("sweep", "search"):
        over = load.sweep.over if load.shape == "sweep" else load.search.over
        most = max(sweep_levels(load.sweep)) if load.shape == "sweep" else load.search.high
        if most == "none":
            most = load.search.low  # nobody knows yet how high it will go
        return {"shape": "rate", "rate": most} if over == "rate" else {"shape": "ramp", "users": int(most)}
    return {"requests": "none"}


def split_cores() -> tuple[list[int], set[int]]:
    """(core for the server, cores for the client), or nothing of either where they cannot be kept apart."""
    if not hasattr(os, "sched_getaffinity"):
        return [], set()
    cores = sorted(os.sched_getaffinity(0))
    return ([cores[-1]], set(cores[:-1])) if len(cores) > 1 else ([], set())


@contextlib.contextmanager
def known_schedule(flags: list[str]) -> Iterator[str]:
    """The address of a schedule server that lives as long as this block, or as this process; then it writes its log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "twoclocks.schedule_server", "--until-eof", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise TwoclocksError("the known-schedule server did not start; its own message is above")
        yield msgspec.json.decode(ready)["url"]
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
    if process.returncode:
        raise TwoclocksError(f"the known-schedule server failed with exit code {process.returncode}; see above")


def run_locust(raw: dict[str, Any], folder: Path, cores: set[int], processes: int) -> Path:
    """Run the experiment headless; its run folder. Raises TwoclocksError with Locust's last line if there is none."""
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    argv: list[str | Path] = [sys.executable, "-m", "locust", "-f", ROOT / "load_test.py", "--experiment", path]
    argv += ["--headless", "--no-report", "--only-summary"]
    argv += ["--processes", str(processes)] if processes > 1 else []
    pin = partial(os.sched_setaffinity, 0, cores) if cores else None
    log_path = folder / "locust.log"
    with log_path.open("wb") as log:
        kept = keeper.start(argv, stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin)
        try:
            kept.keeper.wait(raw["load"]["duration_s"] + raw["load"]["drain_s"] + LOCUST_GRACE_S)
        except subprocess.TimeoutExpired:
            raise TwoclocksError("the load did not come to its end; was the machine suspended? Try again") from None
        finally:
            kept.stop()
    text = log_path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^run folder: (.+)$", text, re.M)
    if not found:
        ours = re.findall(r"^twoclocks: (.+)$", text, re.M)
        last = (ours or text.strip().splitlines() or ["it said nothing"])[-1]
        raise TwoclocksError(f"the load could not be run: {last}")
    return Path(found[-1])


def judge(run: Path, log: SentLog, replay: Replay, shares: tuple[float, float] | None, notes: list[str]) -> Calibration:
    """A finished run folder held against the server's log. Raises TwoclocksError if no request can be compared."""
    meta = msgspec.json.decode((run / "run.json").read_bytes())
    measured = [record for record in read_records(run / "requests.jsonl") if record.phase != "warmup"]
    ok = [record for record in measured if record.status == "ok"]
    found = differences(map(seen, ok), log)
    if not found.compared:
        why = next((record.error_message for record in measured if record.error_message), "none ended in time")
        raise TwoclocksError(f"no request could be compared ({why}); give more --seconds, or look at the experiment")
    window = (meta["window"]["started_at"], meta["window"]["ended_at"])
    at = np.concatenate([np.array(seen(record)[1]) / 1e9 + (record.sent_at or 0.0) for record in measured])
    lateness, stall = error_figures(log.lateness_s), log.meta["schedule"]["tpot_ms"] * replay.chunk_tokens / 2e3
    if lateness.max is not None and lateness.max > max(stall, 0.005):
        notes = [*notes, f"the machine stalled: the server itself was up to {lateness.max * 1e3:.1f} ms late"]
    loop_lag, loop_cores = self_observed(run / "self_samples.jsonl", window)
    if shares is not None and shares[0] > STALL_SHARE:
        notes = [*notes, f"others took {shares[0]:.1%} of the machine's time (steal)"]
    return Calibration(
        twoclocks_version=__version__,
        made_at_unix=time.time(),
        hostname=socket.gethostname(),
        platform=platform.platform(),
        reader=meta.get("reader"),
        processes=replay.processes,
        replay=replay,
        streams=mean_streams(_floats(measured, "sent_at"), _floats(measured, "ended_at"), window),
        chunks_per_s=float(((at >= window[0]) & (at <= window[1])).sum() / (window[1] - window[0])),
        requests=found.compared,
        not_compared=len(measured) - found.compared,
        errors={name: error_figures(getattr(found, name)) for name in METRICS},
        server_lateness=lateness,
        server_bracket=error_figures(log.bracket_s),
        timestamp_sources=_counts(ok),
        reads_merged=sum(record.reads_merged for record in ok),
        chunks=sum(len(record.chunk_us) for record in ok),
        steal_share=shares[0] if shares else None,
        busy_share=shares[1] if shares else None,
        loop_lag=loop_lag,
        loop_cores=loop_cores,
        notes=notes,
    )


def self_observed(path: Path, window: tuple[float, float]) -> tuple[ErrorFigures, float | None]:
    """(lags of the load generator's loop, CPU of its busiest process in cores) inside the window, as it saw them."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    samples = [sample for sample in map(msgspec.json.decode, lines) if window[0] <= sample["at"] <= window[1]]
    lags = [lag for sample in samples for lag in sample["loop_lag_s"]]
    cores: dict[int, list[float]] = {}
    for sample in samples:
        cores.setdefault(sample["worker"], []).append(sample["cpu_s"] / sample["wall_s"])
    busiest = max((float(np.mean(values)) for values in cores.values()), default=None)
    return error_figures(np.array(lags, dtype=np.float64)), busiest


def replay_like(run: Path) -> Replay:
    """The rates of a run, as medians of what it measured. Raises RunFolderError."""
    try:
        records = [record for record in read_records(run / "requests.jsonl") if record.status == "ok"]
    except FileNotFoundError:
        raise RunFolderError(f"{run}: is no run folder, it has no requests.jsonl") from None
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{run}: cannot be read: {' '.join(str(error).split())}") from None
    streams = [(record, seen(record)[1]) for record in records if record.phase != "warmup"]
    streams = [(record, offsets) for record, offsets in streams if len(offsets) > 1]
    if not streams:
        raise RunFolderError(f"{run}: has no answer of two tokens or more, whose rate could be replayed")
    tokens = [record.output_tokens or len(offsets) for record, offsets in streams]
    chunk_tokens = max(1, round(float(np.median([n / len(o) for n, (_, o) in zip(tokens, streams, strict=True)]))))
    gap_ms = float(np.median(np.concatenate([np.diff(offsets) for _, offsets in streams]))) / 1e6
    return Replay(
        ttft_ms=round(float(np.median([offsets[0] for _, offsets in streams])) / 1e6, 3),
        tpot_ms=round(gap_ms / chunk_tokens, 3),
        chunk_tokens=chunk_tokens,
        output_tokens=round(float(np.median(tokens))),
    )


def machine_time() -> list[int] | None:
    """Clock ticks of the whole machine since boot, by kind: user nice system idle iowait irq softirq steal (Linux)."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None
    return [int(value) for value in first.split()[1:9]]


def machine_shares(before: list[int] | None, after: list[int] | None) -> tuple[float, float] | None:
    """(steal, busy) as shares of the machine's time between two `machine_time`."""
    if before is None or after is None:
        return None
    passed = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(passed) or 1
    return passed[7] / total, 1 - (passed[3] + passed[4]) / total


def _floats(records: list[Record], name: str) -> Any:
    return np.array([getattr(record, name) for record in records], dtype=np.float64)  # None becomes NaN


def _counts(records: list[Record]) -> dict[str, int]:
    sources = [record.timestamp_source for record in records]
    return {source: sources.count(source) for source in sorted(set(sources))}
