"""What a request, a token, an open stream and a record cost, each measured by itself: what docs/scale.md computes with.

    python benchmarks/unit_costs.py [--seconds 20]

Short open loops through the tool as the soak runs it, each heavy in one thing: requests of one token, few requests of
many tokens, streams that are open and say nothing, and two workers that send their records to a master. CPU is that of
each process from the beginning of the window to its end, without what it took to start. Per request and per token are
solved from three loads; a fourth, of another mix, tells how well they predict. Needs Linux.
Load goes to 127.0.0.1 only.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from soak import HERE, Look, Requests, Seen, most_at_once, read_requests, soak, table

from twoclocks import __version__
from twoclocks.calibrate import known_schedule


@dataclass(frozen=True)
class Load:
    """An open loop that is heavy in one thing."""

    name: str
    rate: float  # requests/s
    tokens: int
    ttft_ms: float = 100.0
    tpot_ms: float = 10.0
    processes: int = 1


LOADS = (
    Load("almost nothing", 1, 1),
    Load("requests", 300, 1),
    Load("tokens", 30, 800),
    Load("both", 200, 50),
    Load("200 open", 200, 1, ttft_ms=1_000),
    Load("open", 200, 1, ttft_ms=30_000),
    Load("two workers", 400, 5, processes=2),
)


@dataclass(frozen=True)
class Cost:
    """What one load took."""

    load: Load
    seconds: float
    requests: int
    tokens: int
    most_at_once: int
    cpu_s: dict[str, float]  # role -> CPU of its processes in those seconds
    most_rss_mb: dict[str, float]
    bytes_per_record: float
    busy_share: float | None


def measure(load: Load, seconds: float) -> Cost:
    """One load, for so many seconds and as long as its last answers take."""
    requests = max(1, round(load.rate * seconds))
    options = Namespace(requests=requests, rate=load.rate, tokens=load.tokens, processes=load.processes)
    with tempfile.TemporaryDirectory(prefix="twoclocks-costs-") as name:
        folder = Path(name)
        flags = [f"--log={folder / 'sent.npz'}", f"--ttft-ms={load.ttft_ms}", f"--tpot-ms={load.tpot_ms}"]
        with known_schedule(flags) as url:
            seen = soak(options, url, folder)
        meta = msgspec.json.decode((folder / "run" / "run.json").read_bytes())
        return cost(load, read_requests(folder / "run" / "requests.jsonl"), meta, seen)


def cost(load: Load, requests: Requests, meta: dict[str, Any], seen: Seen) -> Cost:
    """The figures of a load."""
    begin, end = (meta["started_at_unix"] + meta["window"][name] for name in ("started_at", "ended_at"))
    inside = [one for one in seen.looks if begin <= one.at <= end + 60]
    roles = {one.role for one in inside}
    return Cost(
        load=load,
        seconds=max(one.at for one in inside) - min(one.at for one in inside),
        requests=len(requests.intended_at),
        tokens=sum(count or 0 for count in requests.tokens.values()),
        most_at_once=most_at_once(requests.sent_at, requests.ended_at),
        cpu_s={role: cpu_between([one for one in inside if one.role == role]) for role in roles},
        most_rss_mb={role: max(one.rss_mb for one in inside if one.role == role) for role in roles},
        bytes_per_record=requests.bytes / requests.lines,
        busy_share=seen.busy_share,
    )


def cpu_between(looks: Sequence[Look]) -> float:
    """From the first look at each process to its last."""
    total = 0.0
    for pid in {one.pid for one in looks}:
        own = [one.cpu_s for one in looks if one.pid == pid]
        total += own[-1] - own[0]
    return total


def solved(costs: Sequence[Cost], role: str) -> dict[str, float]:
    """CPU seconds a second, a request and a token of one role, from three loads in which these differ."""
    table_ = np.array([[one.seconds, one.requests, one.tokens] for one in costs], dtype=np.float64)
    per = np.linalg.solve(table_, np.array([one.cpu_s.get(role, 0.0) for one in costs]))
    return dict(zip(("second", "request", "token"), per.tolist(), strict=True))


def figures(costs: Sequence[Cost]) -> dict[str, Any]:
    """Unit costs of all loads together."""
    by = {one.load.name: one for one in costs}
    three = [by[name] for name in ("almost nothing", "requests", "tokens")]
    both, few, many, shared = by["both"], by["200 open"], by["open"], by["two workers"]
    grown = many.most_rss_mb["locust"] - few.most_rss_mb["locust"]
    idle_stream = grown * 2**20 / (many.most_at_once - few.most_at_once)
    roles = ("locust", "collector", "exporter", "live_run")
    units = {role: solved(three, role) for role in roles}
    told = {
        role: per["second"] * both.seconds + per["request"] * both.requests + per["token"] * both.tokens
        for role, per in units.items()
    }
    return {
        "units_s": units,
        "foretold_cpu_s": told,
        "measured_cpu_s": {role: both.cpu_s.get(role, 0.0) for role in roles},
        "idle_stream_bytes": idle_stream,
        "process_mb": by["almost nothing"].most_rss_mb["locust"],
        "master_us_per_record": shared.cpu_s["locust"] / shared.requests * 1e6,  # all that it does is in it
        "kept_bytes_per_token": kept_bytes(by["tokens"], by["almost nothing"], idle_stream),
        "bytes_per_record": {"tokens_1": by["requests"].bytes_per_record, "tokens_50": both.bytes_per_record},
        "bytes_per_token": (by["tokens"].bytes_per_record - by["requests"].bytes_per_record)
        / (by["tokens"].load.tokens - by["requests"].load.tokens),
    }


def kept_bytes(streaming: Cost, idle: Cost, idle_stream: float) -> float:
    """Memory of a token that has come, until its answer ends; of answers under way, half has come in the mean."""
    grown = (streaming.most_rss_mb["locust"] - idle.most_rss_mb["locust"]) * 2**20
    return (grown - streaming.most_at_once * idle_stream) / (streaming.most_at_once * streaming.load.tokens / 2)


def shown(costs: Sequence[Cost], told: dict[str, Any]) -> str:
    """What people read."""
    rows = [
        [
            one.load.name,
            f"{one.requests:,}",
            f"{one.tokens:,}",
            f"{one.most_at_once:,}",
            f"{one.seconds:.0f}",
            ", ".join(f"{role} {value:.2f}" for role, value in sorted(one.cpu_s.items())),
            ", ".join(f"{role} {value:.0f}" for role, value in sorted(one.most_rss_mb.items())),
            "–" if one.busy_share is None else f"{one.busy_share:.0%}",
        ]
        for one in costs
    ]
    units = [
        [role, f"{per['second'] * 1e3:.1f}", f"{per['request'] * 1e6:.0f}", f"{per['token'] * 1e6:.2f}",
         f"{told['foretold_cpu_s'][role]:.2f}", f"{told['measured_cpu_s'][role]:.2f}"]
        for role, per in told["units_s"].items()
    ]  # fmt: skip
    head = ["process", "ms a second", "us a request", "us a token", "foretold of `both`, s", "measured, s"]
    loads = ["load", "requests", "tokens", "at once", "s", "CPU, s", "most memory, MiB", "machine busy"]
    return "\n".join(
        [
            "# Unit costs",
            "",
            table(loads, rows),
            "",
            "CPU, solved from the first three loads, and held against the fourth:",
            "",
            table(head, units),
            "",
            f"An open stream that has said nothing yet: {told['idle_stream_bytes'] / 1e3:.1f} kB; of an answer "
            f"under way {told['kept_bytes_per_token']:.0f} bytes a token more.",
            f"The master: {told['master_us_per_record']:.0f} us a record of 5 tokens that a worker sends it, all that "
            "a master does included.",
            f"On disk: {told['bytes_per_record']['tokens_1']:.0f} bytes a record of one token, "
            f"{told['bytes_per_token']:.2f} more a token.",
            "",
            f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        ]
    )


def main() -> None:
    """Measure, print, leave the figures in benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long requests leave, in each load")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args()
    costs = []
    for load in LOADS:
        print(f"{load.name} ...", file=sys.stderr, flush=True)
        costs.append(measure(load, options.seconds))
    told = figures(costs)
    text = shown(costs, told)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{datetime.now():%Y-%m-%d-%H%M}-unit-costs.json"
    result = {"twoclocks_version": __version__, "costs": [asdict(one) for one in costs], "figures": told}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nresults: {path} and .md")


if __name__ == "__main__":
    main()
