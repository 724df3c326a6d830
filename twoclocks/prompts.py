"""Prompts: the lines of a request file, read once and checked. Pure; knows nothing of what is made of them."""

import math
from pathlib import Path
from typing import Any

import msgspec

from twoclocks.errors import ExperimentError

DEMO = "requests/demo.jsonl"
"""The request file of an experiment that names none."""
OURS = {
    "id", "session", "turn", "at", "expected_output_tokens", "expected_prompt_tokens", "expected_cached_tokens", "made",
    "answer",
}  # fmt: skip
"""Keys of a request line that are for us; every other one is sent to the server as it stands."""


SALT_LENGTH = 12
"""Hexadecimal digits, 48 bits: two requests in ten million have the same with a chance of 1 in 6."""


class Prompt(msgspec.Struct, frozen=True):
    """One line of a request file: an id, and the fields of the request body that it brings."""

    id: str
    body: dict[str, Any]
    session: str | None = None
    turn: int | None = None
    expected_output_tokens: int | None = None
    at: float | None = None  # seconds since the beginning of the trace that it is from
    part: int = 0  # which part of the mix it is from
    line: int = 0  # of its file, from 1
    answer: list[dict[str, Any]] | None = None  # the recorded messages that answer it, for the next turn's history
    later: tuple["Prompt", ...] = ()  # the turns after it, each with its new messages alone; sessions.conversations


def load_prompts(path: Path, api: str) -> list[Prompt]:
    """The prompts of a JSON Lines request file, in file order. All are held: memory is that of the file.

    A line is ``{"id", "messages" | "prompt", ...}``. ``messages`` fits api "chat", ``prompt`` fits all (for chat it
    becomes one user message). Raises ExperimentError naming file and line.
    """
    try:
        with path.open("rb") as file:  # a binary file splits at \n alone; texts may hold raw U+2028
            prompts = [_prompt(line, number, path, api) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ExperimentError(
            f"{path.absolute()}: request file cannot be read: {error.strerror}; requests/README.md tells of them"
        ) from None
    if not prompts:
        raise ExperimentError(f"{path}: holds no request; each line is one, such as {{'id': 'a', 'prompt': 'Hello'}}")
    return prompts


def _prompt(line: bytes, number: int, path: Path, api: str) -> Prompt:
    where = f"{path} line {number}"
    try:
        raw = msgspec.json.decode(line)
    except UnicodeDecodeError:
        raise ExperimentError(f"{where}: is not UTF-8; save the file in that encoding") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ExperimentError(f"{where}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ExperimentError(f"{where}: expected an object, found {type(raw).__name__}")
    body = {key: value for key, value in raw.items() if key not in OURS}
    if api == "chat" and "messages" not in body and isinstance(body.get("prompt"), str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    needed = "messages" if api == "chat" or (api == "in-process" and "messages" in body) else "prompt"
    if not body.get(needed):
        raise ExperimentError(f"{where}: has no '{needed}', which target.api '{api}' needs")
    session, turn, expected = raw.get("session"), raw.get("turn"), raw.get("expected_output_tokens")
    at = raw.get("at")
    if at is not None and not (type(at) in (int, float) and 0 <= at < math.inf):
        raise ExperimentError(f"{where}: 'at': expected seconds since the beginning of the trace, found {at!r:.40}")
    answer = raw.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise ExperimentError(f"{where}: 'answer': expected the text of the recorded answer, found {answer!r:.40}")
    return Prompt(
        id=str(raw.get("id", number)),
        body=body,
        session=None if session is None else str(session),
        turn=turn if isinstance(turn, int) else None,
        expected_output_tokens=expected if isinstance(expected, int) else None,
        at=at,
        line=number,
        answer=None if answer is None else [{"role": "assistant", "content": answer}],
    )


def salt_line(salt: str) -> str:
    """What stands before a salted prompt."""
    return f"[{salt}]\n"
