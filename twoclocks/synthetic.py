"""Texts of given token lengths, for requests whose lengths matter and whose words do not: common words at random.

Pure: a key and a length give a text, the same one each time. Who counts tokens (a tokenizer.json, a server, nobody)
is the caller's affair. Used by the converters in requests/, before any run.
"""

import random
import string
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

CountTokens = Callable[[str], int]
"""How many tokens a text has, special ones left out."""

_TEXT = """
part place case week system program work number night point home water room mother area money story fact month lot right
study book eye job word issue side kind head house friend father power hour game line end law car city name team minute
idea body back parent face level office door health person art history party result change reason girl moment air force
boy age policy music market sense nation plan college effect use class control field role rate heart show leader light
voice mind price report son view town road arm value action season tax player record paper space ground form event
matter center site project star table need court oil cost figure street image phone data picture piece land product
doctor wall patient worker news test movie north love step baby type film tree source hair window energy period course
summer plant term letter choice rule south floor call church risk fire future bank west board rest fight top goal second
bed order author nature color store sound page race series animal factor east artist scene stock size fund media sign
thought list quality answer cup amount staff growth loss degree region box trade deal bill message glass skill stage
design sort truth song example leg dark river bird fish horse dog cat stone metal gold green blue red white black brown
orange bread milk sugar salt apple wine snow rain wind storm cloud sun moon forest farm bridge tower ship boat train
wheel engine key lock clock chair cloth coat hat ring
"""
WORDS = tuple(_TEXT.split())
"""256 words of one token each in vocabularies of some ten thousand entries and more (SmolLM2's: every one)."""

FEWEST_WORDS, FEWEST_STARTS = 32, 8
"""With fewer, texts that share nothing on purpose would often begin alike."""
CHECKED_AT_ONCE = 500
"""Words of one text that is counted: a server may refuse texts longer than its model's context."""


class Vocabulary(NamedTuple):
    """Words of one token each, however they are put together: a text of n words has n tokens."""

    words: tuple[str, ...]
    starts: tuple[str, ...]  # those of them that are one token at the very beginning, too
    joint: str  # between two words


def vocabulary(count: CountTokens | None = None) -> Vocabulary:
    """The words of which a tokenizer makes one token each; without one all of WORDS, as an estimate.

    Every pair of neighbours is tried, so that lengths are exact: a token across three words would be made from one
    across two. Raises ValueError for a tokenizer that has too few words, or joins some.
    """
    if count is None:
        return Vocabulary(WORDS, WORDS, " ")
    for candidates, joint in ((WORDS, " "), (tuple(string.ascii_lowercase), "")):  # letters: a token each, or a byte
        first = next((word for word in candidates if count(word) == 1), None)
        if first is None:
            continue
        words = tuple(word for word in candidates if count(f"{first}{joint}{word}") == 2)
        starts = tuple(word for word in words if count(word) == 1)
        enough = len(words) >= min(FEWEST_WORDS, len(candidates)) and len(starts) >= FEWEST_STARTS
        if enough and _adds_up(words, first, joint, count):
            return Vocabulary(words, starts, joint)
    raise ValueError("this tokenizer makes no single tokens of common English words or letters")


def _adds_up(words: tuple[str, ...], start: str, joint: str, count: CountTokens) -> bool:
    last, walk = start, _neighbours(words)
    while run := tuple(islice(walk, CHECKED_AT_ONCE)):
        if count(joint.join((start, last, *run))) != len(run) + 2:
            return False
        last = run[-1]
    return True


def _neighbours(words: tuple[str, ...]) -> Iterator[str]:
    """A walk in which each word stands beside each, itself too, in either order."""
    for index, word in enumerate(words):
        yield from (word, word)
        yield from chain.from_iterable((other, word) for other in words[index + 1 :])


def draw_words(vocabulary: Vocabulary, tokens: int, key: str) -> list[str]:
    """So many words of one token each; the first is good for the beginning of a text. The key is the seed."""
    if tokens < 1:
        return []
    # Random.random() is the one method whose sequence Python promises to keep
    draw, words, size = random.Random(key).random, vocabulary.words, len(vocabulary.words)
    first = vocabulary.starts[int(draw() * len(vocabulary.starts))]
    return [first, *[words[int(draw() * size)] for _ in range(tokens - 1)]]


def text(vocabulary: Vocabulary, tokens: int, key: str) -> str:
    """A text of so many tokens. One key gives one text; a shorter one of the same key is its beginning."""
    return vocabulary.joint.join(draw_words(vocabulary, tokens, key))
