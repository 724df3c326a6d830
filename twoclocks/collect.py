"""The collectors: a child process that reads what the server says of itself while the load runs.

A process of its own, because parsing a page of metrics takes longer than the gap between two tokens. The first line of
its standard input says what to do, and is answered after the first scrape; a line `scrape` asks for one more, and is
answered too; after a line `stop` it ends, with a last scrape once the server is idle; when its parent dies it ends at
once, since then its input does.
"""

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from twoclocks.endpoint import tls_context

MAX_PAGE_BYTES = 32 * 1024 * 1024
PAGE_S = 10.0
ANSWER_S = 30.0
SETTLE_S = 5.0
IDLE_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child has to do."""

    run_folder: str
    zero_ns: int  # the run's zero on time.monotonic_ns(), which all processes of a machine share
    metrics_urls: list[str]
    interval_s: float
    headers: dict[str, str]  # the key among them, for the target alone
    target_url: str = ""
    tls_verify: bool | str
    tls_cert: str | None = None
    log_path: str | None


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def parse_page(text: str) -> tuple[Series, dict[str, str]]:
    """(value of each series, type of each family) of a Prometheus text exposition. Raises ValueError."""
    series: Series = {}
    types: dict[str, str] = {}
    for family in text_string_to_metric_families(text):
        types[family.name] = family.type
        for sample in family.samples:
            series[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return series, types


class Scraper:
    """Scrapes one page again and again; writes only what changed, the whole page the first time."""

    def __init__(self, url: str, job: Job, client: httpx.Client, out: BinaryIO) -> None:
        self.url, self.job, self.client, self.out = url, job, client, out
        self.series: Series | None = None

    def scrape(self) -> str | None:
        """Append one line to server_samples.jsonl; return what went wrong, if anything."""
        line: dict[str, Any] = {"url": self.url, "at": self._now()}
        failure: str | None = None
        try:
            text = self._page()
            line["until"] = self._now()
            series, types = parse_page(text)
        except (httpx.HTTPError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"[:500]
            line |= {"until": self._now(), "samples": []}
        else:
            before = self.series or {}
            changed = [(key, value) for key, value in series.items() if before.get(key) != value]
            line |= {"samples": [[name, dict(labels), value] for (name, labels), value in changed]}
            if self.series is None:
                line["types"] = types
            gone = [[name, dict(labels)] for name, labels in before.keys() - series.keys()]
            if gone:
                line["gone"] = gone
            self.series = series
        self.out.write(msgspec.json.encode(line | {"error": failure}) + b"\n")
        self.out.flush()
        return failure

    def is_idle(self) -> bool:
        """Does the server say that nothing runs and nothing waits? True where it does not tell."""
        return not any(value for (name, _), value in (self.series or {}).items() if name in IDLE_GAUGES)

    def _now(self) -> float:
        return (time.monotonic_ns() - self.job.zero_ns) / 1e9

    def _page(self) -> str:
        deadline = time.monotonic() + PAGE_S
        headers = self.job.headers if origin_of(self.url) == origin_of(self.job.target_url) else {}
        with self.client.stream("GET", self.url, headers=headers) as response:
            response.raise_for_status()
            body = b""
            for piece in response.iter_bytes():
                body += piece
                if len(body) > MAX_PAGE_BYTES:
                    raise ValueError(f"a page of more than {MAX_PAGE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"a page that was not whole after {PAGE_S:g} s")
        return body.decode("utf-8", "replace")


class LogTail:
    """Copies what is appended to a server's log into the run folder; follows rotation and truncation."""

    def __init__(self, source: Path, copy: Path) -> None:
        self.source = source
        self.out = copy.open("ab", buffering=0)
        self.file: BinaryIO | None = None
        self._open(at_end=True)

    def _open(self, *, at_end: bool) -> None:
        try:
            self.file = self.source.open("rb")
        except OSError:
            self.file = None  # not there yet, or between two rotations; tried again at the next copy
            return
        if at_end:
            self.file.seek(0, 2)

    def copy(self) -> None:
        """Copy all that is new."""
        if self.file is not None:
            self.out.write(self.file.read())
            if not self._was_replaced():
                return
            self.file.close()
        self._open(at_end=False)
        if self.file is not None:
            self.out.write(self.file.read())

    def close(self) -> None:
        """Nothing more will be copied."""
        self.out.close()
        if self.file is not None:
            self.file.close()

    def _was_replaced(self) -> bool:
        assert self.file is not None
        try:
            now = self.source.stat()
        except OSError:
            return False
        mine = Path(f"/dev/fd/{self.file.fileno()}").stat()
        return now.st_ino != mine.st_ino or now.st_size < self.file.tell()


def main() -> None:
    """Run as ``python -m twoclocks.collect``."""
    commands = _lines(sys.stdin.buffer)
    job = msgspec.json.decode(next(commands), type=Job)
    folder = Path(job.run_folder)
    tail = LogTail(Path(job.log_path), folder / "server.log") if job.log_path else None
    tls, timeout = tls_context(job.tls_verify, job.tls_cert), max(2.0, job.interval_s)
    with (
        httpx.Client(verify=tls, timeout=timeout) as client,
        (folder / "server_samples.jsonl").open("ab") as out,
    ):
        scrapers = [Scraper(url, job, client, out) for url in job.metrics_urls]
        _answer({scraper.url: scraper.scrape() for scraper in scrapers})
        due = time.monotonic()
        while True:
            due = max(due + job.interval_s, time.monotonic())  # a slow page delays the next scrape
            command = _wait(commands, due - time.monotonic())
            if tail:
                tail.copy()
            if command == b"":
                return  # the parent is gone
            errors = {scraper.url: scraper.scrape() for scraper in scrapers}
            if command == b"scrape\n":
                _answer(errors)
            if command == b"stop\n":
                break
        settled_by = time.monotonic() + SETTLE_S
        # finish-time histograms lag behind the last token: scrape until the server says that it is idle, and once more
        while scrapers and time.monotonic() < settled_by:
            time.sleep(min(0.5, job.interval_s))
            idle = all(scraper.is_idle() for scraper in scrapers)
            for scraper in scrapers:
                scraper.scrape()
            if idle:
                break
        if tail:
            tail.copy()
            tail.close()


def _answer(errors: dict[str, str | None]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(errors) + b"\n")
    sys.stdout.buffer.flush()


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of standard input as they come; empty for ever after its end."""
    while True:
        yield stream.readline()


def _wait(commands: Iterator[bytes], timeout_s: float) -> bytes | None:
    """The next command, None if there was none in time, empty if the parent is gone."""
    readable, _, _ = select.select([sys.stdin.buffer], [], [], max(0.0, timeout_s))
    return next(commands) if readable else None


class Collectors:
    """The parent's handle on the child process."""

    def __init__(self, job: Job) -> None:
        # a session of its own, so that Ctrl-C in the terminal ends the load first and the last scrape still happens
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twoclocks.collect"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.urls = job.metrics_urls
        self.errors = self._ask(msgspec.json.encode(job))
        """What the first scrape of each page said was wrong; None where it was read."""

    def scrape(self) -> dict[str, str | None]:
        """One more scrape, now; what was wrong with each page."""
        return self._ask(b"scrape")

    def _ask(self, line: bytes) -> dict[str, str | None]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = b""
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], ANSWER_S)[0]:
                answer = self.process.stdout.readline()
            else:
                self.process.kill()  # what it may still answer would be taken for the answer to something else
        except BrokenPipeError:
            pass  # told below: it is not there to answer
        if not answer:
            return dict.fromkeys(self.urls, "the collecting process has ended, or did not answer")
        errors: dict[str, str | None] = msgspec.json.decode(answer)
        return errors

    def stop(self) -> None:
        """Ask for the last scrape and wait until it is written."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"stop\n")
            self.process.stdin.flush()
            self.process.wait(SETTLE_S + 15)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
        self.process.communicate()  # also closes the pipes


if __name__ == "__main__":
    main()
