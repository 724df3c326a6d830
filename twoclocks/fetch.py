"""An answer over HTTP, bounded in size and in time: what is asked of servers beside the load."""

import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import Any

import httpx

from twoclocks.hosts import shown
from twoclocks.http1 import QUOTED
from twoclocks.proxy import find_proxy

PLAIN = {"Accept-Encoding": "identity"}
"""What is packed could be a thousand times as large as what is counted."""


class _Deadline:
    """Shuts the connections of a request once its time is over: a head, too, can come a byte at a time for ever."""

    def __init__(self, seconds: float) -> None:
        self.over = threading.Event()
        self._opened: list[Any] = []
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, event: str, told: dict[str, Any]) -> None:
        """httpx's extension ``trace``, by which it tells what it has opened."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._opened.append(told["return_value"].get_extra_info("socket"))
            if self.over.is_set():
                self._shut()

    def _shut(self) -> None:
        self.over.set()
        for opened in self._opened:
            with contextlib.suppress(OSError):  # closed by now, or wrapped in TLS and therefore another
                socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not TLS's own, which would take its state away


class Moved(httpx.HTTPError):
    """The server names another address, which is not asked: load and key go where the experiment says."""


def open_client(url: str, **options: Any) -> httpx.Client:
    """A client for the address's host that goes the way that load goes: through the proxy that find_proxy names, and
    by nothing else of the environment (ALL_PROXY, a .netrc). Raises ValueError as find_proxy.
    """
    proxy = find_proxy(url)
    headers = {"Proxy-Authorization": proxy.authorization} if proxy and proxy.authorization else None
    through = httpx.Proxy(f"http://{shown(proxy.host)}:{proxy.port}", headers=headers) if proxy else None
    return httpx.Client(trust_env=False, proxy=through, **options)


def fetch(
    client: httpx.Client,
    url: str,
    *,
    max_bytes: int,
    seconds: float,
    headers: Mapping[str, str] = {},
    method: str = "GET",
) -> tuple[int, bytes]:
    """(status, the body, whole). Raises httpx.HTTPError, Moved among them, and ValueError.

    Where the head is not there after ``seconds``, however slowly it comes, it is httpx.ReadTimeout; where the body is
    not, ValueError. The connection is for this alone, so that it can be shut.
    """
    own, late = {**headers, **PLAIN, "Connection": "close"}, f"an answer that was not whole after {seconds:g} s"
    response = None
    with _Deadline(seconds) as deadline:
        try:
            with client.stream(
                method, url, headers=own, follow_redirects=False, extensions={"trace": deadline.watch}
            ) as response:
                body = _body(response, max_bytes)
        except httpx.TransportError:
            if not deadline.over.is_set():
                raise
            raise (ValueError(late) if response is not None else httpx.ReadTimeout(late)) from None
    if deadline.over.is_set():  # a body without length ends with its connection
        raise ValueError(late)
    return response.status_code, body


def _body(response: httpx.Response, max_bytes: int) -> bytes:
    if response.has_redirect_location:
        where = response.headers["location"][:QUOTED]  # whoever shows it hides keys, and then cuts
        raise Moved(f"status {response.status_code} leads to {where!r}, which is not followed; name that address")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ValueError("a compressed answer, which was not asked for")
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > max_bytes:
            raise ValueError(f"an answer of more than {max_bytes} bytes")
    return bytes(body)


def fetch_page(
    client: httpx.Client, url: str, *, max_bytes: int, seconds: float, headers: Mapping[str, str] = {}
) -> str:
    """The text of a page. Raises httpx.HTTPError and ValueError, also for any status but success."""
    status, body = fetch(client, url, max_bytes=max_bytes, seconds=seconds, headers=headers)
    if not 200 <= status < 300:
        raise ValueError(f"status {status}")
    return body.decode("utf-8", "replace")
