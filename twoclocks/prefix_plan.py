"""Prefix plan: what share of the prompts that were sent a perfect prefix cache could have answered.

Pure. While a run lasts each process only counts what it sends; at the end the master makes the texts of it once more.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from twoclocks.prompts import SALT_LENGTH, Prompt, salt_line

MOST_KEPT = 1 << 25
"""Characters of the model's own answers that a process keeps; sessions that begin beyond them are left out."""
MOST_PLAYS = 100_000
"""Sessions that a process keeps, some 300 bytes each."""
MOST_CHARACTERS = 1 << 26
"""Of the distinct texts that are compared at the end; what was first sent beyond them is left out."""

Key = tuple[int, int]
"""Part of the mix, and line of its file: names a prompt, also where a user's ids repeat."""


class Play(msgspec.Struct):
    """What was sent of one conversation."""

    first: Key
    turns: int = 1
    answers: list[str] = []  # of the model itself, where they are in the history


class Sent(msgspec.Struct):
    """What one process sent."""

    counts: dict[Key, int] = {}  # requests of their own
    plays: dict[str, Play] = {}  # by the name of the played session
    kept: int = 0  # characters of answers
    left_out: int = 0  # requests

    def add(self, prompt: Prompt, answer: str | None = None, *, session: bool = False) -> None:
        """A request that was sent; ``answer``: the model's own to it, if the next turn brings it back."""
        key = (prompt.part, prompt.line)
        if not session:
            self.counts[key] = self.counts.get(key, 0) + 1
            return
        name = prompt.session or ""
        play = self.plays.get(name)
        if play is not None:
            play.turns += 1
        elif prompt.turn or self.kept >= MOST_KEPT or len(self.plays) >= MOST_PLAYS:
            self.left_out += 1
            return
        else:
            play = self.plays[name] = Play(key)
        if answer is not None:
            play.answers.append(answer)
            self.kept += len(answer)


class Intended(msgspec.Struct, frozen=True):
    """The share of the prompt characters that a perfect prefix cache could answer, and of what."""

    share: float | None  # None: nothing was sent
    characters: int  # of all prompts
    new_characters: int  # of those that were new when they came
    requests: int
    left_out: int  # requests beyond the bounds of this module, which are in no figure here


class _Said(NamedTuple):
    """The last prompt of a conversation, which begins with all its prompts before it."""

    text: str
    prompts: int  # so many
    characters: int  # of them all
    own: list[tuple[int, int]]  # where in the text an answer of the model itself stands
    times: int  # that just this was sent


def intended(prompts: Iterable[Prompt], sent: Iterable[Sent], warmup: Sent, salt: str) -> Intended:
    """The share of the prompt characters of ``sent`` that a perfect prefix cache could answer, 0 to 1.

    ``prompts``: those of the workload, with their later turns. ``warmup``: what was sent before and does not count
    itself. ``salt``: the ``workload.salt``; with a salt a request no conversation begins like another.

    A perfect cache is empty at first, holds all that was ever sent and what the model itself answered, by the
    character, and has each prompt before the next one comes: a bound for a real one, which holds whole blocks and
    forgets. What a chat template adds is not counted.

    The formula: 1 - (characters that are new when they come) / (all characters). The new ones are the nodes of the
    prompts' prefix tree, whatever their order, without those of own answers; in sorted order each prompt adds what
    follows its longest common prefix with the one before it. Costs a sort and n binary searches.
    """
    sent = list(sent)
    known = {(prompt.part, prompt.line): prompt for prompt in prompts}
    line = "" if salt == "none" else salt_line("0" * SALT_LENGTH)
    before = list(_said(known, [warmup], line))
    room, said, left_out = MOST_CHARACTERS, list[_Said](), sum(one.left_out for one in sent)
    for one in _said(known, sent, line):
        room -= len(one.text)
        if room < 0:
            left_out += one.prompts * one.times
        else:
            said.append(one)
    total = sum(one.characters * one.times for one in said)
    if salt == "request":
        new = sum(_new(one, 0) * one.times for one in said)
    else:
        new = _nodes([*before, *said]) - _nodes(before)
    share = 1 - new / total if total else None
    return Intended(share, total, new, sum(one.prompts * one.times for one in said), left_out)


def _said(known: dict[Key, Prompt], sent: Iterable[Sent], line: str) -> Iterator[_Said]:
    """Each conversation that was begun, as far as it came; requests of their own are conversations of one turn."""
    for one in sent:
        for key, times in one.counts.items():
            yield _conversation(known[key], 1, [], times, line)
        for play in one.plays.values():
            yield _conversation(known[play.first], play.turns, play.answers, 1, line)


def _conversation(first: Prompt, turns: int, answers: list[str], times: int, line: str) -> _Said:
    text, own = line + _text(first.body), list[tuple[int, int]]()
    characters = len(text)
    for number, (before, turn) in enumerate(zip((first, *first.later), first.later[: turns - 1], strict=False)):
        begin = len(text)
        if number < len(answers):
            text += _message({"role": "assistant", "content": answers[number]})
            own.append((begin, len(text)))
        else:
            text += "".join(map(_message, before.answer or []))
        text += _text(turn.body)
        characters += len(text)
    return _Said(text, turns, characters, own, times)


def _nodes(said: list[_Said]) -> int:
    """Nodes of the prefix tree, those of own answers left out."""
    nodes, before = 0, ""
    for one in sorted(said):
        nodes += _new(one, _common_prefix(before, one.text))
        before = one.text
    return nodes


def _new(said: _Said, known: int) -> int:
    """Characters of a text that follow a known beginning and are no answer of the model itself."""
    return len(said.text) - known - sum(max(0, end - max(begin, known)) for begin, end in said.own)


def _text(body: dict[str, Any]) -> str:
    """A prompt as a cache sees it: the contents one after the other, each closed by its role, pictures by address."""
    messages = body.get("messages")
    return "".join(map(_message, messages if isinstance(messages, list) else [{"content": body.get("prompt")}]))


def _message(message: dict[str, Any]) -> str:
    return _content(message.get("content")) + f"\0{message.get('role')}\0"


def _content(content: Any) -> str:
    return content if isinstance(content, str) else msgspec.json.encode(content).decode()


def _common_prefix(one: str, other: str) -> int:
    """Characters that both begin with."""
    same, differ = 0, min(len(one), len(other)) + 1  # the first `same` are equal, the first `differ` are not
    while differ - same > 1:
        middle = (same + differ) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            differ = middle
    return same
