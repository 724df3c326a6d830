"""What is asked of a server before the load: is it there, which model, which version. The control plane, over httpx."""

import httpx
import msgspec

from twoclocks.endpoint import request_headers, tls_context
from twoclocks.errors import TargetError
from twoclocks.experiment import Target

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
    verify = tls_context(target.tls_verify, target.tls_cert)
    with httpx.Client(base_url=base_url(target), headers=request_headers(target), verify=verify, timeout=10) as client:
        version = _version(client, target)
        return (target.model if target.model != "auto" else _first_model(client, target)), version


def _version(client: httpx.Client, target: Target) -> str | None:
    """Also the proof that something answers. Where there is no /version, its 404 is as good."""
    try:
        response = client.get("/version")
    except httpx.HTTPError as error:
        how = "start the server, or name another with -H http://HOST:PORT"
        if target.start is not None:
            how = "`twoclocks run` starts the server of target.start, Locust by itself does not"
        raise TargetError(f"{target.url}: not reachable ({_reason(error)}); {how}") from None
    try:
        version = msgspec.json.decode(response.content, type=dict[str, object]).get("version")
    except (msgspec.MsgspecError, RecursionError):
        return None
    return str(version) if response.is_success and version else None


def _first_model(client: httpx.Client, target: Target) -> str:
    how = "name it with --set target.model=NAME"
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise TargetError(f"{target.url}/v1/models: no answer ({_reason(error)}); {how}") from None
    if response.status_code in (401, 403):
        raise TargetError(
            f"{target.url}/v1/models: status {response.status_code}; put the API key into {target.api_key_env}"
        )
    if not response.is_success:
        raise TargetError(f"{target.url}/v1/models: status {response.status_code}; {how}")
    try:
        models = msgspec.json.decode(response.content)["data"]
        return str(models[0]["id"])
    except (msgspec.DecodeError, RecursionError, KeyError, IndexError, TypeError):
        raise TargetError(f"{target.url}/v1/models: names no model; {how}") from None


def _reason(error: httpx.HTTPError) -> str:
    # what httpx says of a header that it cannot send holds the header
    return (
        "a header that cannot be sent"
        if isinstance(error, httpx.LocalProtocolError)
        else str(error) or type(error).__name__
    )
