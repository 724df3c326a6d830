"""An answer over HTTP, bounded in size and in time: what is asked of servers beside the load."""

import time
from collections.abc import Mapping

import httpx

from twoclocks.http1 import QUOTED

PLAIN = {"Accept-Encoding": "identity"}
"""What is packed could be a thousand times as large as what is counted."""


class Moved(httpx.HTTPError):
    """The server names another address, which is not asked: load and key go where the experiment says."""


def fetch(
    client: httpx.Client,
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    headers: Mapping[str, str] = {},
    method: str = "GET",
) -> tuple[int, bytes]:
    """(status, the body, whole, however slowly it comes). Raises httpx.HTTPError, Moved among them, and ValueError."""
    deadline = time.monotonic() + seconds
    body = bytearray()
    with client.stream(method, url, headers={**headers, **PLAIN}, follow_redirects=False) as response:
        if response.has_redirect_location:
            where = response.headers["location"][:QUOTED]  # whoever shows it hides keys, and then cuts
            raise Moved(f"status {response.status_code} leads to {where!r}, which is not followed; name that address")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise ValueError("a compressed answer, which was not asked for")
        for piece in response.iter_raw():
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"an answer of more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"an answer that was not whole after {seconds:g} s")
    return response.status_code, bytes(body)


def fetch_page(
    client: httpx.Client, url: str, *, max_bytes: int, seconds: float, headers: Mapping[str, str] = {}
) -> str:
    """The text of a page. Raises httpx.HTTPError and ValueError, also for any status but success."""
    status, body = fetch(client, url, max_bytes=max_bytes, seconds=seconds, headers=headers)
    if not 200 <= status < 300:
        raise ValueError(f"status {status}")
    return body.decode("utf-8", "replace")
