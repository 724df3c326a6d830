"""Where requests go: address, head, TLS and proxy of a target, made once a run. No connection is opened here."""

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from twoclocks import __version__
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Target, Timeouts
from twoclocks.http1 import request_head
from twoclocks.masks import masked, secret_headers, secret_words, texts
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


MAX_KEY_BYTES = 16 * 1024


def request_headers(target: Target) -> dict[str, str]:
    """The user's headers and the API key from its file or the environment, which also the control plane sends.

    Raises ExperimentError for a key file that cannot be used.
    """
    headers = dict(target.headers)
    key = _key_in(target.api_key_file) if target.api_key_file else os.environ.get(target.api_key_env, "").strip()
    if key and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _key_in(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            key = file.read(MAX_KEY_BYTES + 1).decode("utf-8").strip()
    except OSError as error:
        raise ExperimentError(f"target.api_key_file: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ExperimentError(f"target.api_key_file: {path}: is no text") from None
    if not key or len(key.split()) > 1 or len(key) > MAX_KEY_BYTES:
        raise ExperimentError(f"target.api_key_file: {path}: expected the key, on one line, and nothing else")
    return key


def secrets_of(target: Target) -> tuple[str, ...]:
    """What no record may show, though the server may say it back: the key, and what is masked in the experiment.

    Raises ExperimentError as request_headers.
    """
    hidden: list[str] = []
    shown = masked(msgspec.to_builtins(msgspec.structs.replace(target, headers={})), hidden=hidden)
    return secret_words([*secret_headers(request_headers(target)), *hidden], in_the_open=texts(shown))


def make_endpoint(target: Target, timeouts: Timeouts) -> Endpoint:
    """Raises ExperimentError if the address, a header or the CA bundle cannot be used."""
    try:
        url = urlsplit(target.url)
    except ValueError:
        raise ExperimentError(f"target.url: expected http://HOST:PORT, found {target.url!r}") from None
    if url.hostname is None:
        raise ExperimentError(f"target.url: expected http://HOST:PORT, found {target.url!r}")
    secrets = secrets_of(target)
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
                secrets += secret_words([proxy.authorization])
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
        secrets=secrets,
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
