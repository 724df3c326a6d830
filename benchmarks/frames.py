"""What it costs to pass records from workers to the master: CPU a record on either side, and how many a master takes.

    python benchmarks/frames.py --workers 2 --seconds 5 --tokens 128

Workers make frames of one finished record as fast as they are acknowledged, over Locust's own sockets on the loopback;
the master takes, counts and writes them, as a run's master does. All share this machine's cores.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from locust.rpc import Message, rpc

from twoclocks.frames import Frame, Inbox, Outbox
from twoclocks.record import Record, encode_record


def a_line(tokens: int) -> bytes:
    """A record of that many tokens, 20 ms apart."""
    return encode_record(
        Record(
            request_id="0" * 32, target="vllm", prompt_id="sharegpt-12345", user=1, worker=1, phase="measure",
            intended_at=123.456789, sent_at=123.456799, written_at=123.45689, first_byte_at=123.58, ended_at=126.2,
            chunk_us=[123_456, *[20_113] * (tokens + 1)], chunk_kinds=[("role", 1), ("content", tokens), ("usage", 1)],
            timestamp_source="kernel", max_tokens=tokens, prompt_tokens=200, output_tokens=tokens, token_source="usage",
            finish_reason="length", http_status=200, status="ok",
        )
    )  # fmt: skip


def work(port: int, name: str, line: bytes, seconds: float, told: Any) -> None:
    """A worker that has always as many records as the master takes."""
    client, outbox = rpc.Client("127.0.0.1", port, name), Outbox("r")
    cpu, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        while outbox.held_bytes < 4 * 1024 * 1024:
            outbox.put(line)
        for frame in outbox.due(time.monotonic()):
            client.send(Message("twoclocks_frame", msgspec.structs.asdict(frame), name))
        outbox.acknowledge(client.recv().data["number"], time.monotonic())
    client.send(Message("quit", None, name))
    told.put({"cpu_s": time.process_time() - cpu, "put": outbox.lines, "repeated": outbox.repeated})


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")  # a socket library does not survive a fork
    line, told = a_line(options.tokens), fresh.Queue()
    server = rpc.Server("127.0.0.1", 0)
    names = [f"w{number}" for number in range(options.workers)]
    workers = [fresh.Process(target=work, args=(server.port, name, line, options.seconds, told)) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        file = os.open(Path(folder) / "requests.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for worker in workers:
            worker.start()
        inboxes, there = {name: Inbox() for name in names}, set(names)
        cpu, began = time.process_time(), time.monotonic()
        while there:
            name, message = server.recv_from_client()
            if message.type == "quit":
                there.discard(name)
                continue
            frame = msgspec.convert(message.data, Frame)
            if inboxes[name].take(frame):
                os.write(file, frame.lines)
            server.send_to_client(Message("twoclocks_ack", {"run": "r", "number": inboxes[name].number}, name))
        elapsed, cpu = time.monotonic() - began, time.process_time() - cpu
        size = os.fstat(file).st_size
    lines, sides = sum(inbox.lines for inbox in inboxes.values()), [told.get() for _ in names]
    assert size == lines * len(line)
    result = {
        "workers": options.workers,
        "tokens_a_record": options.tokens,
        "bytes_a_record": len(line),
        "records_per_s": round(lines / elapsed),
        "master_cpu_us_a_record": round(cpu / lines * 1e6, 2),
        "master_cpu_share": round(cpu / elapsed, 2),
        "worker_cpu_us_a_record": round(sum(side["cpu_s"] for side in sides) / lines * 1e6, 2),
        "repeated_frames": sum(side["repeated"] for side in sides),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
