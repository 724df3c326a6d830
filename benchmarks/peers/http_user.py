"""Locust's HttpUser (the requests library), reading a stream with iter_lines."""

import sys
from pathlib import Path

from locust import HttpUser, constant, events, task

sys.path.insert(0, str(Path(__file__).parent))
from stream_lines import BODY, begin, read, write

PATH = "/v1/chat/completions"


class Streamer(HttpUser):
    """A closed loop of streams."""

    wait_time = constant(0)

    @task
    def stream(self) -> None:
        """One request."""
        number, headers = begin()
        with self.client.post(PATH, json=BODY, headers=headers, stream=True, catch_response=True) as response:
            read(response.iter_lines(), number)
            response.success()


events.quitting.add_listener(lambda **_: write())
