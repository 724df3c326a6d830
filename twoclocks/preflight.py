"""Preflight: one short request to a server -> which of its clocks it shows, before any load is sent.

Over httpx, in any process: how long the answer took is of no interest here, only what it tells.
"""

import math
import time
from typing import Any

import httpx
import msgspec

from twoclocks.client import TGI_HEADERS
from twoclocks.clocks import METRICS
from twoclocks.dialect import Body, Stream, read_answer, read_stream
from twoclocks.endpoint import PATHS, make_endpoint
from twoclocks.errors import TargetError, plain
from twoclocks.experiment import Experiment, Server, Target, Timeouts, Workload
from twoclocks.fetch import PLAIN, fetch, fetch_page
from twoclocks.join import Timing, in_band
from twoclocks.masks import redact
from twoclocks.page import parse_page
from twoclocks.prompts import Prompt
from twoclocks.record import TOKEN_KINDS
from twoclocks.target import control_client, metrics_urls, resolve
from twoclocks.workload import plans

TOKENS = 4
MAX_PAGE_BYTES = 8 * 1024 * 1024
PAGE_S = 5.0
ANSWER_S = 60.0
"""For so few tokens of a server that may have to wake up first."""
MAX_ANSWER_BYTES = 1024 * 1024


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells of itself when it is asked once."""

    url: str
    server: Server  # as the experiment has it
    named: Server | None = None  # what it calls itself, in /v1/models; None: a word that is none of ours
    model: str | None = None
    version: str | None = None
    unreachable: str | None = None  # why it cannot be used at all
    refused: str | None = None  # why it did not answer the request
    page: str | None = None  # why /metrics could not be read
    series: int | None = None  # on its /metrics
    tokens: int | None = None  # chunks with content, reasoning or a tool call; None: no answer
    has_usage: bool = False  # does the answer say how many tokens it has?
    told: list[str] = []  # durations of clocks.METRICS inside the answer
    told_by: str | None = None  # whose words these are


def look_at_server(target: Target) -> ServerFacts:
    """Ask it for its model, its /metrics and a short answer. Raises ExperimentError for an address that is none."""
    endpoint = make_endpoint(target, Timeouts())  # what is wrong with address, headers or certificates is told at once
    known = ServerFacts(url=target.url, server=target.server)
    try:
        model, version = resolve(target)
    except TargetError as error:
        return msgspec.structs.replace(known, unreachable=str(error))
    with control_client(target, PAGE_S) as client:
        told = {"named": _named(client), **_page(client, target), **_answer(client, target, model)}
    # some say the key back when they refuse it
    shown = redact(told | {"model": model, "version": version}, endpoint.secrets)
    return msgspec.structs.replace(known, **shown)


def _named(client: httpx.Client) -> Server | None:
    """Who owns the first model: vLLM, SGLang and llama.cpp put their own name there.

    Other names are not taken for the server's: gateways in front of anything say "openai".
    """
    try:
        _, body = fetch(client, "/v1/models", max_bytes=MAX_ANSWER_BYTES, seconds=PAGE_S)
        owner = msgspec.json.decode(body)["data"][0]["owned_by"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return owner if owner in ("vllm", "sglang", "llamacpp") else None


def _page(client: httpx.Client, target: Target) -> dict[str, Any]:
    for url in metrics_urls(target, "auto"):
        try:
            return {"series": len(parse_page(fetch_page(client, url, max_bytes=MAX_PAGE_BYTES, seconds=PAGE_S))[0])}
        except (httpx.HTTPError, ValueError) as error:
            return {"page": _one_line(error)}
    return {}


def _answer(client: httpx.Client, target: Target, model: str) -> dict[str, Any]:
    path = PATHS[target.api] if target.stream else PATHS[target.api].removesuffix("_stream")
    asked = Prompt(id="preflight", body={"messages": [{"role": "user", "content": "Hello"}]})
    plan = next(plans(Experiment(target=target, workload=Workload(max_tokens=TOKENS)), [asked], model))
    body, deadline = bytearray(), time.monotonic() + ANSWER_S
    own = {"Content-Type": "application/json", "X-Request-Id": plan.request_id, **PLAIN}
    try:
        with client.stream("POST", path, content=plan.body, headers=own, timeout=ANSWER_S) as response:
            for piece in response.iter_raw():
                body += piece
                if len(body) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    return {"refused": f"its answer to a request for {TOKENS} tokens did not end"}
    except httpx.HTTPError as error:
        return {"refused": _one_line(error)}
    if response.status_code != 200:
        return {
            "refused": f"status {response.status_code} for {path}: {_one_line(body[:200].decode(errors='replace'))}"
        }
    whole = Body(bytes(body), [0], [len(body)])
    stream: Stream = read_stream(whole) if target.stream else read_answer(whole)
    if stream.error or not stream.kinds:
        return {"refused": _one_line(stream.error or stream.malformed or "an answer without any token")}
    in_headers = {name: value for name, value in response.headers.items() if name in TGI_HEADERS}
    timing = in_band(stream.server or in_headers or None, stream.output_tokens or 0)
    told = isinstance(timing, Timing)
    return {
        "tokens": sum(kind in TOKEN_KINDS for kind in stream.kinds),
        "has_usage": stream.token_source in ("usage", "per-chunk usage"),
        "told": [name for name in METRICS if told and not math.isnan(getattr(timing, name))],
        "told_by": timing.server if isinstance(timing, Timing) else None,
    }


def _one_line(words: object) -> str:
    return " ".join(plain(words).split())[:300] or type(words).__name__
