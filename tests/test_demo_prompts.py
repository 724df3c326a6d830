"""requests/demo.jsonl: the prompts every first run sends must be sound, varied and short enough for a small server."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[1] / "requests" / "demo.jsonl"
MAX_TOKENS = 1400
"""Leaves room for a template and an answer in a context of 2048."""


def requests() -> list[dict[str, Any]]:
    return [json.loads(line) for line in DEMO.read_bytes().removesuffix(b"\n").split(b"\n")]


def text_of(request: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in request["messages"])


def pessimistic_tokens(text: str) -> float:
    """2.5 characters a token in ASCII; elsewhere a token a byte, the worst that a byte-level tokenizer does."""
    return sum(1 / 2.5 if character.isascii() else len(character.encode()) for character in text)


def test_about_a_hundred_with_unique_ids_and_nothing_but_messages() -> None:
    ids = [request["id"] for request in requests()]

    assert ids == [f"demo-{number:03d}" for number in range(1, len(ids) + 1)]
    assert 90 <= len(ids) <= 120
    assert all(set(request) == {"id", "messages"} for request in requests())
    assert len({text_of(request) for request in requests()}) == len(ids)


@pytest.mark.parametrize("request_", requests(), ids=lambda request: request["id"])
def test_a_request_is_a_chat_that_ends_with_the_user_and_fits(request_: dict[str, Any]) -> None:
    roles = [message["role"] for message in request_["messages"]]
    turns = roles[1:] if roles[0] == "system" else roles

    assert turns == (["user", "assistant"] * len(turns))[: len(turns)]
    assert turns[-1] == "user"
    assert all(set(message) == {"role", "content"} and message["content"].strip() for message in request_["messages"])
    assert pessimistic_tokens(text_of(request_)) <= MAX_TOKENS


def test_the_set_is_varied() -> None:
    """Scripts, lengths and shapes that a streaming client must be able to carry are all there."""
    texts = [text_of(request) for request in requests()]
    everything = "".join(texts)
    scripts = {unicodedata.name(character, "?").split()[0] for character in everything if character.isalpha()}
    roles = [[message["role"] for message in request["messages"]] for request in requests()]

    assert scripts >= {"LATIN", "GREEK", "CYRILLIC", "ARABIC", "DEVANAGARI", "HIRAGANA", "CJK", "HANGUL"}
    assert any(len(character.encode()) == 4 for character in everything)
    assert "\u200d" in everything
    assert any(unicodedata.combining(character) for character in everything)
    assert 6 <= sum(len(text) >= 1500 for text in texts) <= 8
    assert sum(len(text) < 100 for text in texts) >= 20
    assert sum("```" in text for text in texts) >= 8
    assert sum(role[0] == "system" for role in roles) >= 3
    assert sum("assistant" in role for role in roles) >= 3


def test_non_ascii_stands_raw() -> None:
    assert "日本語".encode() in DEMO.read_bytes()
    assert max(ord(character) for character in text_of({"messages": [{"content": DEMO.read_text("utf-8")}]})) > 0xFFFF
