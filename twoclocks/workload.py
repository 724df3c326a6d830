"""What to send: request files -> prompts -> an endless sequence of plans, one a request.

Pure: reads the request file once, then only arithmetic. The stream client takes a Plan and knows nothing of workloads.
"""

import itertools
import math
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment

OURS = {"id", "expected_output_tokens", "session", "turn", "at"}
"""Keys of a request line that are for us; every other one is sent to the server as it stands."""


class Prompt(msgspec.Struct, frozen=True):
    """One line of a request file: an id, and the fields of the request body that it brings."""

    id: str
    body: dict[str, Any]
    session: str | None = None
    turn: int | None = None
    expected_output_tokens: int | None = None
    at: float | None = None  # seconds since the beginning of the trace that it is from


class Plan(msgspec.Struct, frozen=True):
    """One request, ready to be sent: everything that can be made before the clock starts is made."""

    request_id: str
    prompt: Prompt
    body: bytes
    max_tokens: int | None = None  # that the body allows


def load_prompts(path: Path, api: str) -> list[Prompt]:
    """The prompts of a JSON Lines request file, in file order.

    A line is ``{"id", "messages" | "prompt", ...}``. ``messages`` fits api "chat", ``prompt`` fits both (for chat it
    becomes one user message). Raises ExperimentError naming file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # only \n ends a line; texts may hold raw U+2028
    except OSError as error:
        raise ExperimentError(f"{path}: request file cannot be read: {error.strerror}") from None
    prompts = [_prompt(line, number, path, api) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ExperimentError(f"{path}: holds no request; each line is one, such as {{'id': 'a', 'prompt': 'Hello'}}")
    return prompts


def _prompt(line: bytes, number: int, path: Path, api: str) -> Prompt:
    where = f"{path} line {number}"
    try:
        raw = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ExperimentError(f"{where}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ExperimentError(f"{where}: expected an object, found {type(raw).__name__}")
    body = {key: value for key, value in raw.items() if key not in OURS}
    if api == "chat" and "messages" not in body and isinstance(body.get("prompt"), str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    needed = "messages" if api == "chat" else "prompt"
    if not body.get(needed):
        raise ExperimentError(f"{where}: has no '{needed}', which target.api '{api}' needs")
    session, turn, expected = raw.get("session"), raw.get("turn"), raw.get("expected_output_tokens")
    at = raw.get("at")
    if at is not None and not (type(at) in (int, float) and 0 <= at < math.inf):
        raise ExperimentError(f"{where}: 'at': expected seconds since the beginning of the trace, found {at!r:.40}")
    return Prompt(
        id=str(raw.get("id", number)),
        body=body,
        session=None if session is None else str(session),
        turn=turn if isinstance(turn, int) else None,
        expected_output_tokens=expected if isinstance(expected, int) else None,
        at=at,
    )


def request_body(prompt: Prompt, experiment: Experiment, model: str) -> dict[str, Any]:
    """The body of a request. ``target.extra_body`` wins over all, a prompt over the defaults."""
    target, workload = experiment.target, experiment.workload
    if target.api == "tgi-generate":
        return _tgi_body(prompt, experiment)
    body: dict[str, Any] = {"model": model, "max_tokens": workload.max_tokens, "stream": target.stream}
    # usage in the stream is asked for everywhere; a running count on each chunk only where it is known to be accepted,
    # since strict servers answer 400 to fields that they do not know
    if target.stream:
        body["stream_options"] = {"include_usage": True}
        if target.server == "vllm":
            body["stream_options"]["continuous_usage_stats"] = True
    elif target.server == "sglang":
        body["return_meta_info"] = True
    if workload.ignore_eos:
        body["ignore_eos"] = True
    return body | prompt.body | target.extra_body


def _tgi_body(prompt: Prompt, experiment: Experiment) -> dict[str, Any]:
    """TGI's own form: the prompt as `inputs`, the rest as `parameters`; `details` bring the token counts at the end."""
    parameters = {"max_new_tokens": experiment.workload.max_tokens, "details": True}
    fields = {name: value for name, value in prompt.body.items() if name not in ("prompt", "max_tokens")}
    if "max_tokens" in prompt.body:
        parameters["max_new_tokens"] = prompt.body["max_tokens"]
    body = {"inputs": prompt.body["prompt"], "parameters": parameters | fields}
    return body | experiment.target.extra_body


def order_prompts(prompts: list[Prompt], order: str, seed: int) -> Iterator[Prompt]:
    """The prompts again and again, without end: in file order, in a new shuffle each round, or drawn at random."""
    rng = random.Random(seed)
    while True:
        if order == "random":
            yield rng.choice(prompts)
        else:
            yield from rng.sample(prompts, len(prompts)) if order == "shuffled" else prompts


def plans(
    experiment: Experiment, prompts: list[Prompt], model: str, *, share: int = 0, shares: int = 1
) -> Iterator[Plan]:
    """An endless sequence of plans; worker ``share`` of ``shares`` gets every ``shares``-th prompt of the one order."""
    bodies: dict[int, tuple[bytes, int | None]] = {}  # by identity, since ids of a user's file may repeat
    order = "in-order" if experiment.load.shape == "trace" else experiment.workload.order
    ordered = order_prompts(prompts, order, experiment.workload.seed)
    for prompt in itertools.islice(ordered, share, None, shares):
        made = bodies.get(id(prompt))
        if made is None:
            body = request_body(prompt, experiment, model)
            made = bodies[id(prompt)] = (msgspec.json.encode(body), _max_tokens(body))
        request_id, (encoded, max_tokens) = secrets.token_hex(16), made
        if experiment.target.server == "sglang":  # which reads its id from the body, not from a header
            encoded = b'%b,"rid":"%b"}' % (encoded[:-1], request_id.encode())
        yield Plan(request_id, prompt, encoded, max_tokens)


def _max_tokens(body: dict[str, Any]) -> int | None:
    parameters = body.get("parameters")
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if asked is None and isinstance(parameters, dict):
        asked = parameters.get("max_new_tokens")
    return asked if isinstance(asked, int) else None
