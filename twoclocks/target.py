"""What is asked of a server before the load: is it there, which model, which version. The control plane, over httpx."""

from urllib.parse import urlsplit

import httpx
import msgspec

from twoclocks.endpoint import request_headers, secrets_of, tls_context
from twoclocks.errors import ExperimentError, TargetError, plain
from twoclocks.experiment import Target
from twoclocks.fetch import Moved, fetch, open_client
from twoclocks.hosts import shown
from twoclocks.masks import redact
from twoclocks.proxy import find_proxy

MAX_ANSWER_BYTES = 1024 * 1024
ANSWER_S = 10.0
MAX_NAME_CHARS = 500
HAS_METRICS = {"vllm", "tgi", "sglang", "llamacpp", "pytorch", "other"}


def base_url(target: Target) -> str:
    """The address without a trailing /v1, to which every path is added."""
    return target.url.rstrip("/").removesuffix("/v1")


def metrics_urls(target: Target, setting: str | list[str]) -> list[str]:
    """The pages to scrape for `collect.metrics_url`."""
    if setting == "none":
        return []
    if setting == "auto":
        return [f"{base_url(target)}/metrics"] if target.server in HAS_METRICS else []
    return [setting] if isinstance(setting, str) else setting


def resolve(target: Target) -> tuple[str, str | None]:
    """(model to name in requests, server version or None). Raises TargetError if the server cannot be used."""
    with control_client(target) as client:
        version = _version(client, target)
        return (target.model if target.model != "auto" else _first_model(client, target)), version


def _version(client: httpx.Client, target: Target) -> str | None:
    """Also the proof that something answers. Where there is no /version, its 404 is as good."""
    try:
        status, body = fetch(client, "/version", max_bytes=MAX_ANSWER_BYTES, seconds=ANSWER_S)
    except (Moved, ValueError):
        return None  # no version that we could read, but somebody answers
    except httpx.HTTPError as error:
        how = "start the server, or name another with --url http://HOST:PORT (Locust: -H)"
        if target.start is not None:
            how = "`twoclocks run` starts the server of target.start, Locust by itself does not"
        how += _way(target)
        raise TargetError(f"{target.url}: not reachable ({_reason(error, target)}); {how}") from None
    try:
        version = msgspec.json.decode(body, type=dict[str, object]).get("version")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return str(version)[:MAX_NAME_CHARS] if 200 <= status < 300 and version else None


def _first_model(client: httpx.Client, target: Target) -> str:
    way = _way(target)
    how = f"name it with --set target.model=NAME{way}"
    try:
        status, body = fetch(client, "/v1/models", max_bytes=MAX_ANSWER_BYTES, seconds=ANSWER_S)
    except (httpx.HTTPError, ValueError) as error:
        raise TargetError(f"{target.url}/v1/models: no answer ({_reason(error, target)}); {how}") from None
    if status in (401, 403):
        where = f"the file {target.api_key_file}" if target.api_key_file else target.api_key_env
        raise TargetError(f"{target.url}/v1/models: status {status}; put the API key into {where + way}")
    if not 200 <= status < 300:
        raise TargetError(f"{target.url}/v1/models: status {status}; {how}")
    try:
        models = msgspec.json.decode(body)["data"]
        return str(models[0]["id"])[:MAX_NAME_CHARS]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, IndexError, TypeError):
        raise TargetError(f"{target.url}/v1/models: names no model; {how}") from None


def control_client(target: Target, timeout_s: float = ANSWER_S) -> httpx.Client:
    """Asks a target what is not load. Nothing that it answers makes this client ask anybody else."""
    verify = tls_context(target.tls_verify, target.tls_cert)
    try:
        return open_client(
            target.url, base_url=base_url(target), headers=request_headers(target), verify=verify, timeout=timeout_s
        )
    except ValueError as error:
        raise ExperimentError(f"target: {error}") from None


def _way(target: Target) -> str:
    """Of an answer that was a proxy's, or would have been."""
    proxy = find_proxy(target.url)
    if proxy is None:
        return ""
    host = urlsplit(target.url).hostname
    return f". It was asked through the proxy {shown(proxy.host)}:{proxy.port}: NO_PROXY={host} goes without"


def _reason(error: Exception, target: Target) -> str:
    # what httpx says of a header that it cannot send holds the header
    if isinstance(error, httpx.LocalProtocolError):
        return "a header that cannot be sent"
    return plain(redact(str(error) or type(error).__name__, secrets_of(target)))[:300]
