"""What a Locust user writes for a streaming endpoint: iter_lines, json.loads, and the clock at each line.

Shared by the two peers. What was seen goes to the file named in BENCH_OUT when Locust quits, in rows like those of
bare_reader.c.
"""

import array
import itertools
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

BODY = json.loads(Path(os.environ["BENCH_BODY"]).read_text())
rows = array.array("q")  # request number, events (0: sent), ns of time.monotonic_ns()
numbers = itertools.count()


def begin() -> tuple[int, dict[str, str]]:
    """The number of a new request, its headers; its time of sending is kept."""
    number = next(numbers)
    headers = {"X-Request-Id": f"{number:032x}"}
    rows.extend((number, 0, time.monotonic_ns()))
    return number, headers


def read(lines: Iterable[bytes], number: int) -> None:
    """Take the time of each line that carries a token."""
    for line in lines:
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                rows.extend((number, 1, time.monotonic_ns()))


def write() -> None:
    """Leave what was seen for the benchmark."""
    with Path(os.environ["BENCH_OUT"]).open("wb") as file:
        rows.tofile(file)
