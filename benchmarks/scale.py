"""How many cores, workers, masters and gigabits a number of streams takes, computed from measured unit costs.

    python benchmarks/scale.py [--streams 1000000] [--rate 20] [--answer 250]

Measured is `Units` alone, by `unit_costs.py`; the rest is arithmetic. docs/scale.md tells the formulas.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Units:
    """Measured on one machine: benchmarks/results/2026-11-21-2001-unit-costs.json, rounded. Another has others."""

    token_us: float = 7.7  # CPU of the process that sends, for a token that arrives alone, at 250 streams
    request_us: float = 331.0  # and for all that a request takes beside its tokens
    process_ms_per_s: float = 10.5  # of a process that sends next to nothing
    process_mb: float = 61.9  # MiB
    stream_bytes: float = 10_300.0  # of a stream that is open and has said nothing
    kept_bytes: float = 457.0  # of a token that has come, until its answer ends
    record_bytes: float = 727.0  # of a record without tokens
    record_token_bytes: float = 4.84  # with gaps of four or five digits; of more digits, more
    master_us: float = 28.7  # CPU of a master for a record of 5 tokens that a worker sends it
    exporter_record_us: float = 14.7  # CPU of its exporter
    exporter_token_us: float = 0.255


@dataclass(frozen=True)
class Chosen:
    """Chosen, or given by others; not measured."""

    load: float = (
        0.5  # of a core, in the mean: what of it workers and masters may use, so that their loop is seldom late
    )
    event_bytes: int = 305  # of a token as vLLM sends it with its running usage, chunked coding included
    packet_bytes: int = 78  # Ethernet, IPv4 and TCP with time stamps, around each event; and of a bare acknowledgement
    ports: int = 28_232  # of one address of ours to one of the server's: Linux's own range, 32768 to 60999


@dataclass(frozen=True)
class Plan:
    """What it takes. All of it computed."""

    tokens_per_s: float
    requests_per_s: float
    cores: float  # that the workers use
    workers: int  # processes, of a core each
    streams_per_worker: float
    memory_gb: float
    down_gbit_s: float
    up_gbit_s: float
    addresses: int
    records_mb_s: float
    master_cores: float
    exporter_cores: float
    masters: int  # so that neither a master nor its exporter falls behind
    disk_gb_per_h: float


def plan(streams: float, rate: float, answer: float, units: Units, chosen: Chosen) -> Plan:
    """``streams`` always open, each of ``rate`` tokens/s, in answers of ``answer`` tokens; the wait for the first one
    is left out, which makes it a little too dear.
    """
    tokens_per_s = streams * rate
    requests_per_s = tokens_per_s / answer
    busy = (tokens_per_s * units.token_us + requests_per_s * units.request_us) / 1e6
    workers = math.ceil(busy / (chosen.load - units.process_ms_per_s / 1e3))
    record = units.record_bytes + units.record_token_bytes * answer
    exporter = (requests_per_s * units.exporter_record_us + tokens_per_s * units.exporter_token_us) / 1e6
    held = streams * (units.stream_bytes + units.kept_bytes * answer / 2)  # half of an answer has come in the mean
    return Plan(
        tokens_per_s=tokens_per_s,
        requests_per_s=requests_per_s,
        cores=busy + workers * units.process_ms_per_s / 1e3,
        workers=workers,
        streams_per_worker=streams / workers,
        memory_gb=(held + workers * units.process_mb * 2**20) / 1e9,
        down_gbit_s=tokens_per_s * (chosen.event_bytes + chosen.packet_bytes) * 8 / 1e9,
        up_gbit_s=tokens_per_s * chosen.packet_bytes / 2 * 8 / 1e9,  # an acknowledgement for two packets
        addresses=math.ceil(streams / chosen.ports),
        records_mb_s=requests_per_s * record / 1e6,
        master_cores=requests_per_s * units.master_us / 1e6,
        exporter_cores=exporter,
        masters=math.ceil(max(requests_per_s * units.master_us / 1e6, exporter) / chosen.load),
        disk_gb_per_h=requests_per_s * record * 3600 / 1e9,
    )


def shown(made: Plan) -> str:
    """A table as Markdown."""
    rows = [
        ("tokens/s", f"{made.tokens_per_s:,.0f}"),
        ("requests/s", f"{made.requests_per_s:,.0f}"),
        ("cores that the workers use", f"{made.cores:,.1f}"),
        ("workers, a core each", f"{made.workers:,}"),
        ("streams of a worker, and so its file handles", f"{made.streams_per_worker:,.0f}"),
        ("memory of the workers, GB", f"{made.memory_gb:,.1f}"),
        ("network towards the tester, Gbit/s", f"{made.down_gbit_s:,.2f}"),
        ("network towards the server, acknowledgements, Gbit/s", f"{made.up_gbit_s:,.2f}"),
        ("addresses of the tester, for one address of the server's", f"{made.addresses:,}"),
        ("records to the masters, MB/s", f"{made.records_mb_s:,.1f}"),
        ("cores that masters use, at least", f"{made.master_cores:,.2f}"),
        ("cores that their exporters use", f"{made.exporter_cores:,.2f}"),
        ("masters, each with its exporter", f"{made.masters:,}"),
        ("records on disk, GB/h", f"{made.disk_gb_per_h:,.0f}"),
    ]
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=float, default=1e6, help="open at a time (%(default)g)")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of each (%(default)g)")
    parser.add_argument("--answer", type=float, default=250.0, help="tokens of an answer (%(default)g)")
    options = parser.parse_args()
    print(shown(plan(options.streams, options.rate, options.answer, Units(), Chosen())))


if __name__ == "__main__":
    main()
