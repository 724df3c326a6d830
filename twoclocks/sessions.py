"""Sessions: the turns of a request file -> conversations. Pure; knows nothing of when they are sent.

A line of a session stands in one of two forms, the same for all of its lines. Whole: `messages` is the history with the
recorded answers, then what is new, so that the line is a request of its own, too. New alone: `messages` (or `prompt`)
is what is new; the recorded answer to it, if there is one, is the line's `answer`.
"""

from collections.abc import Iterable
from itertools import pairwise, takewhile
from typing import Any

import msgspec

from twoclocks.errors import ExperimentError
from twoclocks.prompts import Prompt

Messages = list[dict[str, Any]]


def conversations(prompts: Iterable[Prompt], how: str) -> list[Prompt]:
    """The first turn of each conversation with its `later` ones, in the order in which they come first.

    ``how``: workload.sessions. A line without a session is a conversation of one turn, called by its id. Raises
    ExperimentError naming session and line for turns that are missing or double, and for a history that does not fit.
    """
    sessions: dict[tuple[str, int], list[Prompt]] = {}
    for position, prompt in enumerate(prompts):
        key = (prompt.id, position) if prompt.session is None else (prompt.session, -1)
        sessions.setdefault(key, []).append(prompt)
    return [_conversation(name, turns, how) for (name, _), turns in sessions.items()]


def _conversation(name: str, lines: list[Prompt], how: str) -> Prompt:
    if lines[0].session is None:
        turns = [msgspec.structs.replace(lines[0], session=name, turn=0)]
    else:
        turns = _in_order(name, lines)
    said = [_messages(name, turn) for turn in turns]
    if all(len(after) > len(before) and after[: len(before)] == before for before, after in pairwise(said)):
        said = [said[0], *(after[len(before) :] for before, after in pairwise(said))]
    else:
        _check_new_alone(name, turns, said, how)
    made: list[Prompt] = []
    for turn, messages in zip(turns, said, strict=True):
        if how == "own" and turn.body.get("n", 1) != 1:
            raise ExperimentError(f"{_where(name, turn)}: 'n': of several answers none is the one for the history")
        recorded = _answers(messages) if made else 0
        if recorded:
            made[-1] = msgspec.structs.replace(made[-1], answer=messages[:recorded])
        if recorded == len(messages):
            raise ExperimentError(f"{_where(name, turn)}: brings no new message")
        made.append(msgspec.structs.replace(turn, body=turn.body | {"messages": messages[recorded:]}))
    return msgspec.structs.replace(made[0], later=tuple(made[1:]))


def _in_order(name: str, lines: list[Prompt]) -> list[Prompt]:
    for line in lines:
        if line.turn is None:
            raise ExperimentError(f"{_where(name, line)}: has no 'turn', a whole number that is 0 for the first")
    turns = sorted(lines, key=_turn)
    for expected, turn in enumerate(turns):
        if turn.turn == expected - 1:
            before = turns[expected - 1].line
            raise ExperimentError(f"{_where(name, turn)}: is turn {turn.turn} once more, after line {before}")
        if turn.turn != expected:
            raise ExperimentError(f"{_where(name, turn)}: is turn {turn.turn}, and there is no turn {expected}")
    return turns


def _turn(line: Prompt) -> int:
    return line.turn or 0


def _messages(name: str, turn: Prompt) -> Messages:
    messages = turn.body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ExperimentError(f"{_where(name, turn)}: 'messages': expected a list of messages")
    return messages


def _check_new_alone(name: str, turns: list[Prompt], said: list[Messages], how: str) -> None:
    """Raises ExperimentError for messages that are no new ones alone, and for an answer that would be needed."""
    for before, turn, messages in zip(turns, turns[1:], said[1:], strict=False):
        if any(message.get("role") == "assistant" for message in messages):
            raise ExperimentError(
                f"{_where(name, turn)}: its messages hold an answer, and do not begin with those of turn {before.turn}"
            )
        if how == "recorded" and before.answer is None:
            raise ExperimentError(
                f"{_where(name, before)}: has no 'answer' for the history of turn {turn.turn}; "
                "workload.sessions: own takes what the model answers"
            )


def _answers(messages: Messages) -> int:
    """How many messages of the assistant they begin with."""
    return sum(1 for _ in takewhile(lambda message: message.get("role") == "assistant", messages))


def _where(name: str, turn: Prompt) -> str:
    return f"workload.sessions: session {name!r:.80}, line {turn.line}"
