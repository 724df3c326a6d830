"""The collectors, seen from the run: what they have to do, what they say, and the handle on their process.

The process itself is twoclocks.collector. It is one of its own, because reading what a server says takes longer than
the gap between two tokens; so this module imports nothing that it needs for that.
"""

import select
import subprocess
import sys

import msgspec

ANSWER_S = 30.0
SETTLE_S = 5.0  # in which a server should become idle
END_S = 15.0  # for all else at the end: a last page, spans that were held back, a log command that is slow to go


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child has to do."""

    run_folder: str
    zero_ns: int  # the run's zero on time.monotonic_ns(), which all processes of a machine share
    metrics_urls: list[str]
    stage_urls: list[tuple[str, str]] = []  # (stage, one of its pages)
    interval_s: float
    headers: dict[str, str]  # the key among them, for the target alone
    secrets: list[str] = []  # what no file may show
    target_url: str = ""
    tls_verify: bool | str
    tls_cert: str | None = None
    otlp_host: str = "127.0.0.1"
    otlp_port: int | None = None
    otlp_grpc_port: int | None = None
    otlp_tail_s: float = 0.0
    services: dict[str, str] = {}  # service.name of spans -> stage
    log: str = "none"
    gpu: str | list[str] = "none"
    process: int | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says."""

    pages: dict[str, str | None] = {}  # URL -> what was wrong with its last scrape
    notes: list[str] = []  # what the user should know
    foreign_spans: int = 0  # of requests that this run did not send


def tail_limit(tail_s: float) -> float:
    """How long the end of a run waits for spans at most, though they may keep coming."""
    return 3 * tail_s


class Collectors:
    """The parent's handle on the child process."""

    def __init__(self, job: Job) -> None:
        # a session of its own, so that Ctrl-C in the terminal ends the load first and the last scrape still happens
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twoclocks.collector"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.job = job
        first = self._ask(msgspec.json.encode(job), ANSWER_S)
        self.errors = self._pages(first)
        """What the first scrape of each page said was wrong; None where it was read."""
        self.notes = first.notes if first else []
        """What cannot be collected, and why."""
        self.foreign_spans = 0

    def scrape(self) -> dict[str, str | None]:
        """One more scrape, now; what was wrong with each page."""
        return self._pages(self._ask(b"scrape", ANSWER_S))

    def stop(self, sent: int | None = None) -> list[str]:
        """Ask for the last scrape and the last spans, and wait until they are written; what the user should know.

        ``sent``: how many requests the run has sent, so that there is no wait once the spans of all are there. Ctrl-C
        meanwhile ends the waiting, not the writing.
        """
        patience = SETTLE_S + tail_limit(self.job.otlp_tail_s) + END_S
        try:
            answer = self._ask(b"stop" if sent is None else b"stop %d" % sent, patience)
        except KeyboardInterrupt:
            answer = self._ask(b"stop", END_S)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.communicate()  # also closes the pipes
        self.foreign_spans = answer.foreign_spans if answer else 0
        return answer.notes if answer else ["the collecting process ended early; what the server told may be cut short"]

    def _pages(self, answer: Answer | None) -> dict[str, str | None]:
        urls = [*self.job.metrics_urls, *(url for _, url in self.job.stage_urls)]
        gone = "the collecting process has ended, or did not answer"
        return answer.pages if answer else dict.fromkeys(urls, gone)

    def _ask(self, line: bytes, patience: float) -> Answer | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.process.kill()  # what it may still answer would be taken for the answer to something else
            return None
        answer = self.process.stdout.readline()
        return msgspec.json.decode(answer, type=Answer) if answer else None
