"""The collecting process: reads what the server says of itself while the load runs.

Its standard input carries a line each:

    a Job     what to do; answered after the first scrape
    scrape    one more scrape, now; answered
    stop [N]  the end, after which N requests have been sent: a last scrape once the server is idle, the last spans, an
              answer with what is missing. A second one cuts this short.

When its parent dies its input ends, and then it ends at once. Pages and GPU are read in threads of their own, so that
one that hangs delays neither the others nor the log.
"""

import contextlib
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import msgspec

from twoclocks.collect import SETTLE_S, Answer, Job, tail_limit
from twoclocks.endpoint import tls_context
from twoclocks.fetch import fetch_page, open_client
from twoclocks.gpu import open_gpu
from twoclocks.hosts import origin_of
from twoclocks.log_tail import open_tail
from twoclocks.masks import redact
from twoclocks.otlp_receiver import Receiver, SpanStore
from twoclocks.page import Key, PageReader, Series
from twoclocks.process_memory import ProcessMemory, tree

MAX_PAGE_BYTES = 32 * 1024 * 1024
MAX_SERIES = 100_000
"""Of one page, in all of a run: one that makes new series for ever would fill the disk, and the report's memory."""
PAGE_S = 10.0
SCRAPE_S = 20.0  # after which a page that is asked for is told to be late
TAIL_TURN_S = 0.2
IDLE_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Lines:
    """A file of JSON lines to which several threads append, each line whole.

    Once the disk does not take one, no more are written: the next would stand behind a torn line. `failure` tells it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # without a buffer, which would try again by itself
        self._lock = threading.Lock()
        self.failure: str | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        left = msgspec.json.encode(line) + b"\n"
        with self._lock:
            try:
                while left and self.failure is None:
                    left = left[self._file.write(left) :]
            except OSError as error:
                self.failure = f"{Path(self._file.name).name} cannot be written: {error.strerror}; it ends early"


class Scraper:
    """Scrapes one page again and again; writes only what changed, the whole page the first time."""

    def __init__(
        self, url: str, job: Job, opened: Callable[[str], httpx.Client], out: Lines, stage: str | None = None
    ) -> None:
        self.url, self.job, self.opened, self.out = url, job, opened, out
        self.client: httpx.Client | None = None
        self.named: dict[str, Any] = {"url": url} | ({"stage": stage} if stage is not None else {})
        self.page = PageReader()
        self.series: Series | None = None
        self.known: set[Key] = set()

    def scrape(self) -> str | None:
        """Append one line to server_samples.jsonl; return what went wrong, if anything."""
        line: dict[str, Any] = self.named | {"at": self._now()}
        failure: str | None = None
        try:
            text = self._text()
            line["until"] = self._now()
            series, types = self.page.read(text)
            new = series.keys() - self.known
            if len(self.known) + len(new) > MAX_SERIES:
                raise ValueError(f"a page that has told more than {MAX_SERIES:,} series by now")
            self.known |= new
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            failure = redact(f"{type(error).__name__}: {error}", self.job.secrets)[:500]
            line |= {"until": self._now(), "samples": []}
        else:
            before = self.series or {}
            changed = [(key, value) for key, value in series.items() if before.get(key) != value]
            line |= {"samples": [[name, self._shown(labels), value] for (name, labels), value in changed]}
            if self.series is None:
                line["types"] = types
            gone = [[name, self._shown(labels)] for name, labels in before.keys() - series.keys()]
            if gone:
                line["gone"] = gone
            self.series = series
        self.out.write(line | {"error": failure})
        return failure

    def _shown(self, labels: tuple[tuple[str, str], ...]) -> dict[str, str]:
        """A label may hold anything; names are for whoever reads the page by them, and stay as they are."""
        return {name: redact(value, self.job.secrets) for name, value in labels}

    def is_idle(self) -> bool:
        """Does the server say that nothing runs and nothing waits? True where it does not tell."""
        return not any(value for (name, _), value in (self.series or {}).items() if name in IDLE_GAUGES)

    def _now(self) -> float:
        return (time.monotonic_ns() - self.job.zero_ns) / 1e9

    def _text(self) -> str:
        headers = self.job.headers if origin_of(self.url) == origin_of(self.job.target_url) else {}
        self.client = self.client or self.opened(self.url)  # a proxy that cannot be used is told as a page's fault
        return fetch_page(self.client, self.url, max_bytes=MAX_PAGE_BYTES, seconds=PAGE_S, headers=headers)


class Background:
    """Does one thing whenever asked, in a thread of its own that dies with the process."""

    def __init__(self, task: Callable[[], str | None]) -> None:
        self.result: str | None = None
        self._task = task
        self._error: Exception | None = None
        self._asked, self._done = threading.Event(), threading.Event()
        self._done.set()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self) -> None:
        """Once more, unless it is still at it. Raises what the last time raised."""
        if self._error is not None:
            raise self._error
        if self._done.is_set():
            self._done.clear()
            self._asked.set()

    def wait(self, until: float) -> bool:
        """Whether it is done before ``until``, on time.monotonic()."""
        return self._done.wait(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            try:
                self.result = self._task()
            except Exception as error:  # noqa: BLE001 - raised again by ask()
                self._error = error
            self._done.set()


class Collecting:
    """All that the child has open."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.run_folder)
        self.job = job
        tls, wait_s = tls_context(job.tls_verify, job.tls_cert), min(PAGE_S, max(2.0, job.interval_s))

        def opened(url: str) -> httpx.Client:
            return open_client(url, verify=tls, timeout=wait_s)

        self.files = [samples := Lines((folder / "server_samples.jsonl").open("ab", buffering=0))]
        pages: list[tuple[str | None, str]] = [(None, url) for url in job.metrics_urls]
        self.scrapers = [Scraper(url, job, opened, samples, stage) for stage, url in [*pages, *job.stage_urls]]
        self.pages = [Background(scraper.scrape) for scraper in self.scrapers]
        self.tail = open_tail(job.log, folder / "server.log", job.secrets)
        sampler, no_gpu = open_gpu(job.gpu)
        self.gpu = None
        if sampler:
            sample = lambda: redact(sampler.sample(self.now()), job.secrets)  # noqa: E731  a label may hold anything
            self.gpu = Background(self._appending(sample, folder / "gpu_samples.jsonl"))
        self.process, no_process = self._open_process(folder / "process_samples.jsonl")
        self.spans = SpanStore(folder, job.services, self.now, job.secrets)
        self.receiver = Receiver(self.spans, job.otlp_host, job.otlp_port, job.otlp_grpc_port)
        self.log_failure = self.tail.failure if self.tail else None
        notes = [note for note in (*self.receiver.notes, self.log_failure, no_gpu, no_process) if note]
        self.notes: list[str] = redact(notes, job.secrets)

    def now(self) -> float:
        """Seconds on the run's clock."""
        return (time.monotonic_ns() - self.job.zero_ns) / 1e9

    def turn(self) -> None:
        """What is done each interval beside the pages. Waits for nothing."""
        if self.tail:
            self.tail.copy()
        for sampling in (self.gpu, self.process):
            if sampling:
                sampling.ask()

    def _open_process(self, path: Path) -> tuple[Background | None, str | None]:
        """(what samples the memory of the server's process, why there is none)."""
        if self.job.process is None:
            return None, None
        if not tree(self.job.process):
            return (
                None,
                f"collect.process: {self.job.process} is no process of this machine; its memory will be missing",
            )
        memory = ProcessMemory(self.job.process)
        return Background(self._appending(lambda: [memory.sample(self.now())], path)), None

    def _appending(self, sample: Callable[[], list[dict[str, Any]]], path: Path) -> Callable[[], None]:
        """What takes a sample and writes its rows."""
        self.files.append(out := Lines(path.open("ab", buffering=0)))

        def append() -> None:
            for row in sample():
                out.write(row)

        return append

    def ask_pages(self) -> None:
        """One more scrape of every page that is not still under way. Waits for nothing."""
        for page in self.pages:
            page.ask()

    def scrape(self, wait_s: float = SCRAPE_S) -> dict[str, str | None]:
        """One more scrape of every page, begun after now; what was wrong with each."""
        until = time.monotonic() + wait_s
        for page in self.pages:
            page.wait(until)
        self.ask_pages()
        late = f"no whole answer after {wait_s:g} s"
        return {
            scraper.url: page.result if page.wait(until) else late
            for scraper, page in zip(self.scrapers, self.pages, strict=True)
        }

    def settle(self, pause: Callable[[float], bool]) -> None:
        """Scrape until the server says that it is idle, and once more: its last histograms lag behind the last token.

        ``pause`` waits, and says whether there was nothing to be heard meanwhile.
        """
        until = time.monotonic() + SETTLE_S
        while self.pages and time.monotonic() < until:
            if not pause(min(0.5, self.job.interval_s)):
                return
            idle = all(scraper.is_idle() for scraper in self.scrapers)
            self.scrape(max(0.0, until - time.monotonic()))
            if idle:
                return

    def await_spans(self, sent: int | None, pause: Callable[[float], bool]) -> None:
        """Wait for the exporters' last batches: until there is one of each request, or none came for the tail's time.

        Not at all if none came during the run, since then the server exports none to us.
        """
        tail_s = self.job.otlp_tail_s
        until = self.now() + tail_limit(tail_s)
        while self.spans.last_at is not None and self.now() < min(self.spans.last_at + tail_s, until):
            if (sent is not None and self.spans.has_all(sent)) or not pause(TAIL_TURN_S):
                return
            if self.tail:
                self.tail.copy()

    def close(self) -> Answer:
        """The last of the log, the spans that were held back; what is missing."""
        notes = self.receiver.close()
        notes += [file.failure for file in self.files if file.failure is not None]
        if self.tail:
            self.tail.copy()
            self.tail.close()
            if self.tail.failure and self.tail.failure != self.log_failure:
                notes.append(self.tail.failure)
        return Answer(notes=redact(notes, self.job.secrets), foreign_spans=self.spans.foreign)


def main() -> None:
    """Run as ``python -m twoclocks.collector``."""
    commands = _lines(sys.stdin.buffer)
    job = msgspec.json.decode(next(commands), type=Job)
    collecting = Collecting(job)
    sent: int | None = None

    def pause(seconds: float) -> bool:
        return _wait(commands, seconds) is None

    collecting.turn()
    _answer(Answer(pages=collecting.scrape(), notes=collecting.notes))
    due = time.monotonic()
    while True:
        due = max(due + job.interval_s, time.monotonic())
        command = _wait(commands, due - time.monotonic())
        if command == b"":
            collecting.close()
            return  # the parent is gone
        collecting.turn()
        if command == b"scrape\n":
            _answer(Answer(pages=collecting.scrape()))
            continue
        collecting.ask_pages()
        if command is not None:
            _, _, count = command.strip().partition(b" ")
            sent = int(count) if count else None
            break
    collecting.settle(pause)
    collecting.await_spans(sent, pause)
    _answer(collecting.close())


def _answer(answer: Answer) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is there to hear it, which the next read will tell
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of standard input as they come; empty for ever after its end."""
    while True:
        yield stream.readline()


def _wait(commands: Iterator[bytes], timeout_s: float) -> bytes | None:
    """The next command, None if there was none in time, empty if the parent is gone."""
    readable, _, _ = select.select([sys.stdin.buffer], [], [], max(0.0, timeout_s))
    return next(commands) if readable else None


if __name__ == "__main__":
    main()
