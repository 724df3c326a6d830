"""The live view: its figures from lines that the test writes, and what a run prints to a terminal and to a file."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
import threading

import pytest
from fake_server import FakeServer, plain_answer
from locust_runs import LOCUST, ROOT, read, run
from make_run import record, write_folder
from rich.console import Console

from twoclocks.experiment import Load
from twoclocks.gauges import ServerGauges
from twoclocks.live import LONGEST, Figures, Moment, due_rate, lines, load_words, progress
from twoclocks.load import load_run
from twoclocks.record import encode_record


def ended(at, ttft_ms=100, tokens=3, **fields):
    chunks = {"chunk_us": [ttft_ms * 1000, 20_000, 20_000], "chunk_kinds": [("content", 3)], "output_tokens": tokens}
    return encode_record(record(ended_at=at, **chunks | fields))


def text(load, moment, figures, server=None, title="a run") -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(lines(title, load, moment, figures, server or {}))
    return captured.get()


def test_figures_are_those_of_the_last_ten_seconds():
    figures = Figures()
    old = [ended(at, ttft_ms=900) for at in range(10)]
    new = [ended(10.5 + 0.09 * n, ttft_ms=100 + n) for n in range(100)]
    figures.add(b"".join([ended(1, phase="warmup"), *old, *new]), "requests.jsonl")
    recent = figures.recent(now=20.0, began=2.0)

    assert (figures.ok, figures.failed, figures.warmup) == (110, 0, 1)
    assert (recent.requests_per_s, recent.tokens_per_s) == (10.0, 30.0)
    assert recent.ttft_p50 == pytest.approx(0.150, abs=1e-3)
    assert recent.ttft_p95 == pytest.approx(0.194, abs=1e-3)
    assert recent.tpot_p50 == pytest.approx(0.02)
    assert figures.recent(now=4.0, began=2.0).requests_per_s == pytest.approx(108 / 2)  # ended since second 2


def test_time_per_token_is_that_of_the_report(tmp_path):
    """Of chunks of several tokens, and of several choices, whose tokens come at the same time."""
    answers = {
        "several tokens": {
            "chunk_us": [50_000, 50_000, 60_000, 60_000],
            "chunk_kinds": [("role", 1), ("content", 3)],
            "chunk_tokens": [0, 4, 4, 4],
            "output_tokens": 12,
        },
        "several choices": {
            "chunk_us": [100_000, 0, 20_000, 0, 20_000, 0],
            "chunk_kinds": [("content", 6)],
            "chunk_choice": [(0, 1), (1, 1)] * 3,
            "output_tokens": 6,
        },
    }
    for name, fields in answers.items():
        one = record(**fields)
        figures = Figures()
        figures.add(encode_record(one), "requests.jsonl")
        reported = load_run(write_folder(tmp_path / name, [one])).requests["tpot"].item()

        assert figures.recent(2.0, 0.0).tpot_p50 == pytest.approx(reported), name


def test_memory_is_bounded_and_a_higher_rate_is_still_told_right():
    figures = Figures()
    for number in range(2 * LONGEST):
        figures.add(ended(number / 1000), "requests.jsonl")

    assert len(figures._newest) == LONGEST
    assert figures.recent(now=2 * LONGEST / 1000, began=0.0).requests_per_s == pytest.approx(1000, rel=0.01)


def test_failures_have_no_latency_and_their_last_kind_is_shown_unharmed():
    figures = Figures()
    figures.add(ended(1, status="error", error_kind="[red]x\x1b[2J"), "requests.jsonl")
    shown = text(Load(), Moment(2.0, 0.0, None, 8, 3), figures, title="[bold]evil\x07")

    assert figures.recent(2.0, 0.0).ttft_p50 is None
    assert "0 ok, 1 failed (last: [red]x\N{REPLACEMENT CHARACTER}[2J)" in shown
    assert "[bold]evil\N{REPLACEMENT CHARACTER}" in shown
    assert "\x1b" not in shown


def test_the_load_generator_watches_itself():
    figures = Figures()
    for worker, lag in ((0, 0.001), (1, 0.25)):
        line = {"worker": worker, "reader": "native", "loop_lag_s": [0.0, lag], "at": 1.0}
        figures.add(json.dumps(line).encode() + b"\n", "self_samples.jsonl")

    assert "native reader, loop at most 250 ms late" in text(Load(), Moment(2.0, 0.0, None, 8, None), figures)


def test_gauges_are_read_as_the_file_grows(tmp_path):
    path = tmp_path / "server_samples.jsonl"
    gauges = ServerGauges(path)
    assert gauges.read() == {}

    def page(**values):
        names = {"running": "vllm:num_requests_running", "kv": "vllm:kv_cache_usage_perc", "x": "x_total"}
        samples = [[names[name], {"engine": engine}, v] for name, (engine, v) in values.items()]
        return json.dumps({"url": "u", "at": 1.0, "until": 1.0, "samples": samples, "error": None}) + "\n"

    first = page(running=("0", 3), x=("0", None), kv=("0", 0.5)) + page(running=("1", 4)) + page(kv=("1", 0.75))
    path.write_text(first + "not whole")
    assert gauges.read() == {"running": 7, "kv_cache_usage": 0.75}
    path.write_text(first + page(running=("1", 0)) + "[1]\n")  # the rest has not changed, and is not told again
    assert gauges.read() == {"running": 3, "kv_cache_usage": 0.75}


@pytest.mark.parametrize(
    ("load", "at", "words"),
    [
        (Load(users=8), 30, "8 users, 3 in flight"),
        (Load(shape="steps", steps=[(1, 10), (8, 20)]), 15, "level 2 of 2, 8 users, 3 in flight"),
        (Load(shape="rate", rate=[(0, 0), (10, 20)]), 5, "10 requests/s due, 3 in flight"),
        (Load(shape="batch", batch=16), 5, "batches of 16, 3 in flight"),
    ],
)
def test_what_is_asked_just_now(load, at, words):
    assert load_words(load, Moment(100.0 + at, 100.0, None, 8, 3)) == words


def test_the_rate_that_is_due():
    points = [(10.0, 5.0), (20.0, 15.0), (20.0, 2.0), (30.0, 2.0)]

    assert [due_rate(points, at) for at in (0, 10, 15, 20, 99)] == [5, 5, 10, 2, 2]
    assert due_rate(7, 3) == 7


def test_time_left_or_requests():
    figures = Figures()
    figures.add(ended(1) * 30, "requests.jsonl")

    assert progress(Load(), Moment(1.0, None, None, 0, 0), figures) == (0.0, "warming up")
    assert progress(Load(duration_s=40), Moment(15.0, 5.0, None, 1, 1), figures) == (0.25, "10 of 40 s, 30 s left")
    assert progress(Load(requests=60), Moment(15.0, 5.0, None, 1, 1), figures)[0] == 0.5
    assert progress(Load(drain_s=30), Moment(70.0, 5.0, 65.0, 1, 1), figures)[1].startswith("running streams may go on")


def in_a_terminal(tmp_path, *words, **variables) -> str:
    """What Locust prints to a terminal of 110 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    alone = ("collect.otlp_port=none", "collect.otlp_grpc_port=none", "collect.gpu=none", f"output={tmp_path}")
    settings = [word for setting in alone for word in ("--set", setting)]
    command = [LOCUST, "-f", str(ROOT / "load_test.py"), "--only-summary", "--headless", *settings, *words]
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"} | variables
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        killer = threading.Timer(100, process.kill)
        killer.start()
        printed = b""
        try:
            while part := os.read(ours, 65536):
                printed += part
        except OSError:  # the other end is closed
            pass
        finally:
            killer.cancel()
            os.close(ours)
    assert process.returncode == 0, printed.decode(errors="replace")
    return printed.decode()


def test_a_terminal_shows_it_and_is_left_as_it_was(tmp_path):
    with FakeServer(lambda body: plain_answer(3, gap_s=0.02)) as server:
        printed = in_a_terminal(tmp_path, "-H", server.url, "-u", "2", "-t", "4", "--no-report")
    _, meta = read(tmp_path)

    assert meta["status"] == "finished"
    assert "of 4 s" in printed
    assert "tokens/s" in printed
    assert printed.count("\x1b[?25l") == printed.count("\x1b[?25h") == 1  # the cursor is hidden, and comes back
    assert "measuring for 4 s" in printed
    assert printed.rindex("run folder: ") > printed.rindex("\x1b[?25h")


def test_ci_and_files_stay_quiet(tmp_path):
    with FakeServer(lambda body: plain_answer(3)) as server:
        words = ("-H", server.url, "-u", "1", "-t", "1", "--no-report")
        in_ci = in_a_terminal(tmp_path / "ci", *words, CI="true")
        _, in_a_file = run(tmp_path / "file", *words)

    for printed in (in_ci, in_a_file):
        assert "measuring for 1 s" in printed
        assert "\x1b[?25l" not in printed
        assert "last 10 s" not in printed
