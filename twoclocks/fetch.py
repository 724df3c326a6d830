"""A page over HTTP, bounded in size and in time, for the collectors."""

import time
from collections.abc import Mapping

import httpx


def fetch(client: httpx.Client, url: str, *, max_bytes: int, seconds: float, headers: Mapping[str, str] = {}) -> str:
    """The text of a page, whole, however slowly it comes. Raises httpx.HTTPError and ValueError."""
    deadline = time.monotonic() + seconds
    body = bytearray()
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"a page of more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"a page that was not whole after {seconds:g} s")
    return body.decode("utf-8", "replace")
