"""The HTTP proxy that the environment asks for (http_proxy, https_proxy, no_proxy), as curl and httpx read it."""

import base64
import socket
import urllib.request
from urllib.parse import unquote, urlsplit

import msgspec

MAX_REPLY_BYTES = 16 * 1024


class Proxy(msgspec.Struct, frozen=True):
    """Where a proxy listens, and what it wants to see of us."""

    host: str
    port: int
    authorization: str | None = None  # value of Proxy-Authorization; never shown


class ProxyRefused(OSError):
    """The proxy did not open a tunnel."""


def find_proxy(url: str) -> Proxy | None:
    """The proxy for this address, or None. Raises ValueError for a proxy address that cannot be used."""
    parts = urlsplit(url)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.netloc):
        return None
    address = urllib.request.getproxies().get(parts.scheme)
    if not address:
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme != "http" or proxy.hostname is None:
        raise ValueError(
            f"{parts.scheme}_proxy: only http:// proxies can be used; set no_proxy={parts.hostname} to go without"
        )
    authorization = None
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(proxy.hostname, proxy.port or 80, authorization)


def open_tunnel(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Ask the proxy at the other end to connect this socket to host:port, for TLS. Raises ProxyRefused and OSError."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    authorization = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    sock.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{authorization}\r\n".encode("latin-1"))
    reply = b""
    while not reply.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)  # what follows the head is the server's, so that not a byte of it may be taken
        if not byte or len(reply) > MAX_REPLY_BYTES:
            raise ProxyRefused("the proxy closed the connection, or answered without end")
        reply += byte
    status = reply.split(b"\r\n", 1)[0].decode("latin-1")
    if not status.startswith(("HTTP/1.1 2", "HTTP/1.0 2")):
        raise ProxyRefused(f"the proxy refused: {status[:80]}")
