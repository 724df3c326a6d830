"""Locust's FastHttpUser (geventhttpclient), reading a stream with iter_lines."""

import sys
from pathlib import Path

from locust import FastHttpUser, constant, events, task

sys.path.insert(0, str(Path(__file__).parent))
from stream_lines import BODY, begin, read, write

PATH = "/v1/chat/completions"


class Streamer(FastHttpUser):
    """A closed loop of streams."""

    wait_time = constant(0)

    @task
    def stream(self) -> None:
        """One request."""
        number, headers = begin()
        lines = self.client.iter_lines(PATH, "POST", json=BODY, headers=headers)
        read((line.encode() for line in lines), number)


events.quitting.add_listener(lambda **_: write())
