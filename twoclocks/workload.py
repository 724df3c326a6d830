"""What to send: request files -> prompts -> an endless sequence of plans, one a request.

Pure: reads the request files once, then only arithmetic. The stream client takes a Plan and knows nothing of workloads.
"""

import itertools
import random
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, Workload
from twoclocks.prompts import SALT_LENGTH, Prompt, load_prompts, salt_line
from twoclocks.sessions import conversations

ENCODED_BYTES = 1 << 28
"""Encoded bodies that are kept for their next turn. Beyond them a body is encoded each time that it is sent."""


class Plan(msgspec.Struct, frozen=True):
    """One request, ready to be sent: everything that can be made before the clock starts is made."""

    request_id: str
    prompt: Prompt
    body: bytes
    max_tokens: int | None = None  # that the body allows
    hang_up_s: float | None = None  # after the send, however far the answer has come
    patience_s: float | None = None  # after the send, if no token has come
    wait_s: float = 0.0  # from the end of the turn before it until it is due
    later: int = 0  # turns of its conversation after this one
    then: Callable[[str], "Plan"] | None = None  # the next turn, made of this one's answer; to be called once


def repeated(plan: Plan) -> Plan:
    """The same once more, under an id of its own; a salt that was drawn from the first id stays as it is."""
    request_id = secrets.token_hex(16)
    body = plan.body.replace(plan.request_id.encode(), request_id.encode())  # where a server reads it there
    return msgspec.structs.replace(plan, request_id=request_id, body=body)


def load_workload(experiment: Experiment) -> list[Prompt]:
    """The prompts of ``workload.requests``, or of every part of ``workload.mix`` with ids NAME/ID.

    With ``workload.sessions`` the first turn of each conversation, which holds its later ones. Raises ExperimentError,
    also for a prompt that ``workload.salt`` cannot begin.
    """
    workload, api = experiment.workload, experiment.target.api
    prompts: list[Prompt] = [] if workload.mix else load_prompts(Path(workload.requests), api)
    for number, part in enumerate(workload.mix):
        name = part.prefix
        defaults = {} if part.max_tokens is None else {"max_tokens": part.max_tokens}
        prompts += [
            msgspec.structs.replace(
                prompt,
                id=f"{name}/{prompt.id}",
                body=defaults | prompt.body,
                session=None if prompt.session is None else f"{name}/{prompt.session}",
                part=number,
            )
            for prompt in load_prompts(Path(part.requests), api)
        ]
    if workload.sessions != "none":
        prompts = conversations(prompts, workload.sessions)
    if workload.salt != "none":
        for prompt in prompts:
            salted(prompt, "")
    return prompts


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
        if target.server in ("vllm", "pytorch"):
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


def order_prompts(prompts: list[Prompt], order: str, seed: int | str) -> Iterator[Prompt]:
    """The prompts again and again, without end: in file order, in a new shuffle each round, or drawn at random."""
    rng = random.Random(seed)
    while True:
        if order == "random":
            yield rng.choice(prompts)
        else:
            yield from rng.sample(prompts, len(prompts)) if order == "shuffled" else prompts


def order_mix(prompts: list[Prompt], workload: Workload) -> Iterator[Prompt]:
    """Each time a part of the mix, drawn by its weight, and of that part the next prompt in an order of its own."""
    orders = [
        order_prompts(
            [prompt for prompt in prompts if prompt.part == number], workload.order, f"{workload.seed}/{number}"
        )
        for number in range(len(workload.mix))
    ]
    bounds = list(itertools.accumulate(part.weight for part in workload.mix))
    rng = random.Random(workload.seed)
    while True:
        yield next(rng.choices(orders, cum_weights=bounds)[0])


def hang_ups(workload: Workload, drawing: str = "hang-ups") -> Iterator[float | None]:
    """Of one request after the other, how long after its send the user hangs up, in seconds; None: not at all.

    The times do not depend on ``workload.cancel_share``: with a greater share the same requests are hung up, and more.
    """
    after = workload.cancel_after_s
    low, high = after if isinstance(after, list) else (after, after)
    rng = random.Random(f"{workload.seed}/{drawing}")
    while True:
        drawn, at = rng.random(), rng.uniform(low, high)
        yield at if drawn < workload.cancel_share else None


def new_salt() -> str:
    """The salt of a run, which its master draws and every worker is told."""
    return secrets.token_hex(SALT_LENGTH // 2)


def salted(prompt: Prompt, line: str) -> Prompt:
    """The prompt with a line before its first text, which for a chat is that of the first message.

    What the chat template itself puts before the first message stays the same for all. A picture in a first message
    comes after the line. Raises ExperimentError for a prompt of token ids or a first message without content.
    """
    changed: dict[str, Any] = {}
    if "messages" in prompt.body:
        messages = prompt.body["messages"]
        first = messages[0] if isinstance(messages, list) and isinstance(messages[0], dict) else {}
        content = first.get("content")
        if isinstance(content, str):
            content = line + content
        elif isinstance(content, list):
            content = [{"type": "text", "text": line}, *content]
        else:
            raise ExperimentError(f"workload.salt: the first message of prompt {prompt.id!r:.80} has no content")
        changed["messages"] = [first | {"content": content}, *messages[1:]]
    if "prompt" in prompt.body:
        if not isinstance(prompt.body["prompt"], str):
            raise ExperimentError(f"workload.salt: prompt {prompt.id!r:.80} is no text; set workload.salt: none")
        changed["prompt"] = line + prompt.body["prompt"]
    return msgspec.structs.replace(prompt, body=prompt.body | changed)


def plans(
    experiment: Experiment,
    prompts: list[Prompt],
    model: str,
    *,
    share: int = 0,
    shares: int = 1,
    salt: str | None = None,
) -> Iterator[Plan]:
    """An endless sequence of plans; worker ``share`` of ``shares`` gets every ``shares``-th prompt of the one order.

    ``salt``: that of the run, SALT_LENGTH digits, for ``workload.salt: run``; one of its own if not given. A request's
    own salt is the beginning of its request_id. With ``workload.sessions`` each is the first turn of a conversation,
    and ``Plan.then`` gives the next.
    """
    workload = experiment.workload
    if workload.mix:
        ordered = order_mix(prompts, workload)
    else:
        order = "in-order" if experiment.load.shape == "trace" else workload.order
        ordered = order_prompts(prompts, order, workload.seed)
    salt_of_run = salt or new_salt()
    if workload.sessions != "none":
        numbered = itertools.islice(enumerate(ordered), share, None, shares)
        return (_conversation(experiment, prompt, model, number, salt_of_run) for number, prompt in numbered)
    leaving = hang_ups(workload)
    return _plans(
        experiment, itertools.islice(zip(ordered, leaving, strict=False), share, None, shares), model, salt_of_run
    )


def _plans(
    experiment: Experiment, prompts: Iterable[tuple[Prompt, float | None]], model: str, salt_of_run: str
) -> Iterator[Plan]:
    # Each body is encoded once with a placeholder, at which it is cut; a salt then joins the pieces.
    placeholder = None if experiment.workload.salt == "none" else new_salt()
    bodies: dict[int, tuple[list[bytes], int | None]] = {}  # by identity, since ids of a user's file may repeat
    room = ENCODED_BYTES
    for prompt, hang_up_s in prompts:
        made = bodies.get(id(prompt))
        if made is None:
            made = _encode(prompt, experiment, model, placeholder)
            size = sum(map(len, made[0]))
            if size <= room:
                bodies[id(prompt)] = made
                room -= size
        request_id, (pieces, max_tokens) = secrets.token_hex(16), made
        own = request_id[:SALT_LENGTH] if experiment.workload.salt == "request" else salt_of_run
        encoded = _with_id(own.encode().join(pieces), request_id, experiment)
        yield Plan(request_id, prompt, encoded, max_tokens, hang_up_s, _patience_s(experiment.workload))


def _conversation(experiment: Experiment, first: Prompt, model: str, number: int, salt_of_run: str) -> Plan:
    """The first turn of a conversation that is number ``number`` of the order, and with it the ones after it.

    The history is kept as encoded messages, so that a turn encodes what is new in it alone. All turns have the salt of
    the first, or nothing of the history could come from a cache, and the record's session is NAME#SALT, unique.
    """
    workload, rng = experiment.workload, random.Random(f"{experiment.workload.seed}/{number}")
    first_id = secrets.token_hex(16)
    own_salt = first_id[:SALT_LENGTH]
    if workload.salt != "none":
        first = salted(first, salt_line(own_salt if workload.salt == "request" else salt_of_run))
    turns = [
        msgspec.structs.replace(turn, session=f"{first.session}#{own_salt}", later=()) for turn in (first, *first.later)
    ]
    leaving = hang_ups(workload, f"hang-ups/{number}")
    said: list[bytes] = []

    def plan(index: int, request_id: str, wait_s: float) -> Plan:
        turn = turns[index]
        said.extend(map(msgspec.json.encode, turn.body["messages"]))
        body = request_body(turn, experiment, model) | {"messages": msgspec.Raw(b"[%b]" % b",".join(said))}
        encoded = _with_id(msgspec.json.encode(body), request_id, experiment)

        def then(answer: str) -> Plan:
            own = [{"role": "assistant", "content": answer}]
            said.extend(map(msgspec.json.encode, own if workload.sessions == "own" else turn.answer or []))
            return plan(index + 1, secrets.token_hex(16), _think_s(workload, rng))

        later = len(turns) - 1 - index
        told = (_max_tokens(body), next(leaving), _patience_s(workload), wait_s, later)
        return Plan(request_id, turn, encoded, *told, then if later else None)

    return plan(0, first_id, 0.0)


def _think_s(workload: Workload, rng: random.Random) -> float:
    if workload.think == "exponential" and workload.think_s:
        return rng.expovariate(1 / workload.think_s)
    return workload.think_s


def _patience_s(workload: Workload) -> float | None:
    return None if workload.patience_s == "none" else workload.patience_s


def _with_id(body: bytes, request_id: str, experiment: Experiment) -> bytes:
    """The encoded body with its id where the server reads it there and not from a header."""
    return b'%b,"rid":"%b"}' % (body[:-1], request_id.encode()) if experiment.target.server == "sglang" else body


def _encode(
    prompt: Prompt, experiment: Experiment, model: str, placeholder: str | None
) -> tuple[list[bytes], int | None]:
    """A body, cut where its salt belongs, and the max_tokens that it allows."""
    if placeholder is None:
        body = request_body(prompt, experiment, model)
        return [msgspec.json.encode(body)], _max_tokens(body)
    body = request_body(salted(prompt, salt_line(placeholder)), experiment, model)
    return msgspec.json.encode(body).split(placeholder.encode()), _max_tokens(body)


def _max_tokens(body: dict[str, Any]) -> int | None:
    parameters = body.get("parameters")
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if asked is None and isinstance(parameters, dict):
        asked = parameters.get("max_new_tokens")
    return asked if isinstance(asked, int) else None
