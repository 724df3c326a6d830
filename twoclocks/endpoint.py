"""Where requests go: address, head, TLS and proxy of a target, made once a run. No connection is opened here."""

import os
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from twoclocks import __version__
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Target, Timeouts
from twoclocks.http1 import request_head
from twoclocks.proxy import Proxy, find_proxy

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "tgi-generate": "/generate_stream"}


class Endpoint(msgspec.Struct, frozen=True):
    """Where requests go and what every one of them carries; made once a run."""

    target: str
    host: str
    port: int
    head: bytes
    tls: ssl.SSLContext | None
    proxy: Proxy | None
    timeouts: Timeouts
    stream: bool = True
    secrets: tuple[str, ...] = ()  # what no record may show, though a server may say it back


def request_headers(target: Target) -> dict[str, str]:
    """The user's headers and the API key from the environment, which also the control plane sends."""
    headers = dict(target.headers)
    key = os.environ.get(target.api_key_env, "").strip()
    if key and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {key}"
    return headers


MIN_SECRET_CHARS = 8
"""A shorter word of a header is no secret, and may stand anywhere."""


def secret_words(values: Iterable[str]) -> tuple[str, ...]:
    """The words of these headers' values that may be secret, the longest first: a key without its Bearer."""
    words = {word for value in values for word in value.split() if len(word) >= MIN_SECRET_CHARS}
    return tuple(sorted(words, key=lambda word: (-len(word), word)))


def make_endpoint(target: Target, timeouts: Timeouts) -> Endpoint:
    """Raises ExperimentError if the address, a header or the CA bundle cannot be used."""
    try:
        url = urlsplit(target.url)
    except ValueError:
        raise ExperimentError(f"target.url: expected http://HOST:PORT, found {target.url!r}") from None
    if url.hostname is None:
        raise ExperimentError(f"target.url: expected http://HOST:PORT, found {target.url!r}")
    secrets = [*request_headers(target).values()]
    base = url.path.rstrip("/").removesuffix("/v1")
    headers = {
        "User-Agent": f"twoclocks/{__version__}",
        "Accept": "text/event-stream" if target.stream else "application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        **request_headers(target),
    }
    try:
        proxy = find_proxy(target.url)
        path = base + (PATHS[target.api] if target.stream else PATHS[target.api].removesuffix("_stream"))
        if proxy is not None and url.scheme == "http":  # a proxy wants the whole address; TLS goes through a tunnel
            path = f"http://{url.netloc}{path}"
            if proxy.authorization:
                headers["Proxy-Authorization"] = proxy.authorization
                secrets.append(proxy.authorization)
        head = request_head(url.netloc, path, headers)
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise ExperimentError(f"target: {error}") from None
    return Endpoint(
        target=target.name or target.server,
        host=url.hostname,
        port=port,
        head=head,
        tls=tls_context(target.tls_verify, target.tls_cert) if url.scheme == "https" else None,
        proxy=proxy,
        timeouts=timeouts,
        stream=target.stream,
        secrets=secret_words(secrets),
    )


def tls_context(verify: bool | str, certificate: str | None = None) -> ssl.SSLContext:
    """How TLS connections are checked, and the client certificate they show. Raises ExperimentError."""
    try:
        context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    except (OSError, ssl.SSLError) as error:
        raise ExperimentError(f"target.tls_verify: {verify!r} cannot be used as a CA bundle: {error}") from None
    try:
        if certificate is not None:
            context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        raise ExperimentError(f"target.tls_cert: {certificate!r} holds no certificate and key: {error}") from None
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def token_counter(path: str | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text with a tokenizer.json, or None without one. Raises ExperimentError."""
    if path is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ExperimentError("target.tokenizer: needs the package tokenizers: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  what the library raises is documented as nothing closer
        raise ExperimentError(f"target.tokenizer: {path} is no tokenizer.json: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
