"""What is asked of an engine, read from the body of an OpenAI request; what cannot be done is refused in one line.

Pure, standard library only. Both the in-process runs and the static batching server take their requests from here.
"""

import math
from dataclasses import dataclass, field
from typing import Any

UNUSED = ("model", "stream", "stream_options", "user", "store", "metadata")
"""Fields of a body that say nothing to an engine."""
DEFAULT_MAX_TOKENS = 128


class Refused(Exception):
    """A request that the engine cannot take; the message is one line."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; all requests of a batch in plain PyTorch share one."""

    temperature: float = 0.0  # 0: the most likely token, always
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None


@dataclass(frozen=True)
class Ask:
    """One request."""

    id: str
    messages: list[dict[str, Any]] | None  # go through the chat template
    prompt: str | list[int] | None  # taken as it is; token ids or text
    max_tokens: int
    ignore_eos: bool = False
    sampling: Sampling = Sampling()


@dataclass
class Answer:
    """What became of a request. Times are time.monotonic_ns()."""

    id: str
    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)  # an end token is the last one, where it ended the answer
    steps: list[tuple[int, int]] = field(default_factory=list)  # when, and how many tokens came then
    finish_reason: str | None = None  # stop: an end token came; length: max_tokens
    text: str = ""
    cached_tokens: int | None = None
    ended_ns: int = 0
    error: str | None = None  # why there is no answer
    error_kind: str | None = None


def ask_from(request_id: str, body: Any) -> Ask:
    """The request in a body. Raises Refused for what is malformed, or would be answered otherwise than asked."""
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object")
    messages, prompt = body.get("messages"), body.get("prompt")
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
    ):
        raise Refused("messages: expected a list of objects with role and content")
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)
    if prompt is not None and not is_ids and not isinstance(prompt, str):
        raise Refused("prompt: expected one text, or the ids of its tokens")
    if (messages is None) == (prompt is None):
        raise Refused("expected either messages or a prompt")
    if body.get("n") not in (None, 1):
        raise Refused("n: one answer a request is all that this engine gives")
    known = {"messages", "prompt", "n", "max_tokens", "max_completion_tokens", "ignore_eos"}
    known |= {"temperature", "top_p", "top_k", "seed", *UNUSED}
    for key, value in body.items():
        if key not in known and value is not None and value != [] and value is not False:
            raise Refused(f"{key!r:.60} is not known here; known: {', '.join(sorted(known - set(UNUSED)))}")
    asked = body.get("max_completion_tokens")
    ignore_eos = body.get("ignore_eos") or False
    if type(ignore_eos) is not bool:
        raise Refused("ignore_eos: expected true or false")
    return Ask(
        id=request_id,
        messages=messages,
        prompt=prompt,
        max_tokens=_whole(body, "max_tokens", DEFAULT_MAX_TOKENS, 1) if asked is None else _whole(
            body, "max_completion_tokens", DEFAULT_MAX_TOKENS, 1
        ),
        ignore_eos=ignore_eos,
        sampling=_sampling(body),
    )  # fmt: skip


def _sampling(body: dict[str, Any]) -> Sampling:
    temperature, top_p = _number(body, "temperature", 0.0), _number(body, "top_p", 1.0)
    if temperature < 0:
        raise Refused("temperature: expected 0 or more")
    if not 0 < top_p <= 1:
        raise Refused("top_p: expected a share above 0, 1 at most")
    seed = body.get("seed")
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
        raise Refused("seed: expected a whole number")
    if temperature == 0:
        return Sampling()  # nothing else bears on the most likely token
    top_k = body.get("top_k")
    return Sampling(temperature, top_p, 0 if top_k == -1 else _whole(body, "top_k", 0, 0), seed)


def _whole(body: dict[str, Any], key: str, default: int, least: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not least <= value < 2**31:
        raise Refused(f"{key}: expected a whole number from {least} on, found {value!r:.40}")
    return value


def _number(body: dict[str, Any], key: str, default: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Refused(f"{key}: expected a number, found {value!r:.40}")
    return float(value)


def encode(tokenizer: Any, ask: Ask, context: int | None) -> list[int]:
    """The ids of a request's tokens: messages through the tokenizer's chat template, a prompt as it is.

    Raises Refused where that cannot be done, and for more than ``context`` tokens together with the answer's.
    """
    if ask.messages is not None:
        try:
            text = tokenizer.apply_chat_template(ask.messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # noqa: BLE001  a template is a program of its own, which may raise anything
            raise Refused(f"the model's chat template does not take these messages: {one_line(error)}") from None
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(ask.prompt).input_ids if isinstance(ask.prompt, str) else list(ask.prompt or [])
        if not isinstance(ask.prompt, str) and not all(0 <= one < len(tokenizer) for one in ids):
            raise Refused(f"prompt: ids of tokens go from 0 to {len(tokenizer) - 1}")
    if not ids:
        raise Refused("the prompt is empty")
    if context is not None and len(ids) + ask.max_tokens > context:
        raise Refused(
            f"the prompt has {len(ids)} tokens and the answer may have {ask.max_tokens}; "
            f"the model's context holds {context}"
        )
    return list(ids)


def one_line(error: BaseException) -> str:
    """What an error says, in at most 300 characters of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
