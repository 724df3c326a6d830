"""The exporting process: reads a run folder as it grows, and shows the run so far to Prometheus, or sends it as OTLP.

Its standard input carries a line each: a Job, and at the run's end `end`. From then on it waits for one more scrape,
if there has been any, at most Job.linger_s. When its parent dies its input ends, and then it ends at once.
"""

import io
import logging
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec
from prometheus_client import make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from twoclocks.bounded_input import BoundedInput
from twoclocks.errors import RunFolderError
from twoclocks.export import Job
from twoclocks.families import families
from twoclocks.growing import STAND_BACK, Growing
from twoclocks.metrics import slo_limits
from twoclocks.otlp_metrics import EXPORT_MS, Pusher, interval_s
from twoclocks.totals import Meta, Totals

TURN_S = 1.0
PAGE_BYTES = 8 * 1024 * 1024
"""Read of a file at once: half a million chunks."""
CLIENT_S = 5.0
"""How long a client may be silent, and how long it may take to ask."""
MAX_CLIENTS = 16


class Exporting(Collector):
    """The run so far. Safe to be asked by many threads."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.run_folder)
        self.job = job
        self.totals = Totals(slo_limits({"slo": job.slo}), is_open=job.is_open)
        self.ended = False
        self.scrapes = 0
        self._meta = folder / "run.json"
        self._requests, self._self = Growing(folder / "requests.jsonl"), Growing(folder / "self_samples.jsonl")
        self._lock = threading.Lock()

    def catch_up(self) -> None:
        """Count what is new in the run folder."""
        with self._lock:
            if self.ended:
                return
            # read before run.json, which is therefore not older: it tells which of them count
            for file, add in ((self._requests, self.totals.add_requests), (self._self, self.totals.add_self)):
                while page := file.read(PAGE_BYTES):
                    self.totals.meta = msgspec.json.decode(self._meta.read_bytes(), type=Meta)
                    add(page)
            self.totals.meta = msgspec.json.decode(self._meta.read_bytes(), type=Meta)

    def finish(self) -> None:
        """Count the rest, and show the end from now on."""
        self.catch_up()
        with self._lock:
            self.ended = True

    def collect(self) -> list[Metric]:
        """What Prometheus is shown."""
        self.scrapes += 1
        return self.now()

    def now(self) -> list[Metric]:
        """All that is counted by now."""
        self.catch_up()
        with self._lock:
            return list(families(self.totals, self.job.about, ended=self.ended))


class Handler(WSGIRequestHandler):
    """One request a connection; says nothing of it."""

    def setup(self) -> None:
        """A client that says nothing, or something without end, is hung up."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(BoundedInput(self.connection, CLIENT_S, CLIENT_S))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class Server(ThreadingMixIn, WSGIServer):
    """Serves one page at a socket that listens already, to a few clients at a time."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, exporting: Exporting) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address = listener, listener.getsockname()
        self.server_name, self.server_port = "localhost", listener.getsockname()[1]
        self.exporting = exporting
        self.room = threading.BoundedSemaphore(MAX_CLIENTS)
        self.was_scraped = self.told_the_end = False
        self.setup_environ()
        self.set_app(make_wsgi_app(exporting))

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Is there room for one more?"""
        return self.room.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a client to its end, and note what it was told."""
        ended, before = self.exporting.ended, self.exporting.scrapes
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()
        self.was_scraped |= self.exporting.scrapes > before
        self.told_the_end |= ended and self.exporting.scrapes > before

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or says nothing is no matter of the run's."""


class Pushing:
    """Sends the run so far as OTLP, again and again, in a thread of its own: who takes it may be slow, or not there."""

    def __init__(self, exporting: Exporting) -> None:
        self.exporting = exporting
        self.pusher = Pusher(round(exporting.job.began_unix * 1e9))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it would tell of each message that is not taken
        self._thread.start()

    def end(self) -> None:
        """A last time."""
        self._over.set()
        self._thread.join(EXPORT_MS / 1e3 * 2)

    def _run(self) -> None:
        told = False
        while True:
            is_last = self._over.wait(interval_s())
            if not self.pusher.push(self.exporting.now(), time.time_ns()) and not told:
                sys.stderr.write(
                    "twoclocks: OTLP metrics are not taken; OTEL_EXPORTER_OTLP_ENDPOINT and "
                    "OTEL_EXPORTER_OTLP_PROTOCOL say where they are sent and how\n"
                )
                told = True
            if is_last:
                self.pusher.close()
                return


def main() -> None:
    """Run as ``python -m twoclocks.exporter``."""
    os.nice(STAND_BACK)
    parent = io.FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: what is read ahead, select() would not see
    job = msgspec.json.decode(parent.readline(), type=Job)
    exporting = Exporting(job)
    server = None
    if job.socket is not None:
        server = Server(socket.socket(fileno=job.socket), exporting)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    pushing = Pushing(exporting) if job.otlp else None
    while not (said := _said(parent, TURN_S)):
        exporting.catch_up()
    if said == b"gone":
        return
    exporting.finish()
    if pushing is not None:
        pushing.end()
    until = time.monotonic() + job.linger_s
    while server is not None and server.was_scraped and not server.told_the_end and time.monotonic() < until:
        if _said(parent, 0.05):
            return


def _said(parent: io.FileIO, timeout_s: float) -> bytes:
    """The next line of the parent, empty if there was none in time, `gone` after its end."""
    readable, _, _ = select.select([parent], [], [], timeout_s)
    return (parent.readline().strip() or b"gone") if readable else b""


if __name__ == "__main__":
    try:
        main()
    except (OSError, msgspec.MsgspecError, RunFolderError) as error:
        sys.exit(f"twoclocks: the exporter has ended: {' '.join(str(error).split())}")
