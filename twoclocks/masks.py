"""What may be secret: found by its name in settings, and hidden wherever settings or a server's words are written down.

Pure. A server was sent the key, so it can say it back in any disguise; what is hidden here is what it says plainly, so
that an honest echo does not carry a key into a folder that is shared.
"""

import base64
import binascii
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

SECRET = re.compile(
    r"(?:^|[^a-z0-9])(authorization|api[-_]?key|access[-_]?key|token|secret|password|passwd|headers|cookie|credentials?)\b",
    re.IGNORECASE,
)
"""Names of what may be secret. api_key_env, api_key_file, max_tokens and the like are not among them."""
MIN_SECRET_CHARS = 8
"""A shorter word is no secret, and may stand anywhere."""
HIDDEN = "***"
_SECRET_NAME = re.compile(SECRET.pattern + "$", re.IGNORECASE)
_IN_PLACE_OF_A_SECRET = re.compile(r"\*\*\*|\$\{\w+\}|null|~|")
"""What --set may have as the value of a secret without telling it."""


def masked(tree: Any, *, is_secret: bool = False, hidden: list[str] | None = None) -> Any:
    """A tree of settings in which every value below a name of SECRET is replaced by ***.

    ``hidden`` is given the texts that were replaced.
    """
    told = [] if hidden is None else hidden
    if isinstance(tree, dict):
        return {
            key: masked(value, is_secret=is_secret or bool(SECRET.search(str(key))), hidden=told)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        shown = _masked_words(tree, told) if not is_secret and all(isinstance(word, str) for word in tree) else tree
        return [masked(value, is_secret=is_secret, hidden=told) for value in shown]
    if is_secret and tree is not None:
        told += [tree] if isinstance(tree, str) else []
        return HIDDEN
    if isinstance(tree, str) and tree.startswith("command:"):  # of collect.log
        return masked_command(tree, told)
    return tree


def masked_argv(argv: Sequence[str]) -> list[str]:
    """A command line without what may be secret: ``--api-key X``, ``--api-key=X``, ``HF_TOKEN=X``."""
    return _masked_words(argv, [])


def masked_command(text: str, hidden: list[str] | None = None) -> str:
    """The same of a command line in one text."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text  # which no command is made of either
    shown = _masked_words(words, [] if hidden is None else hidden)
    return text if shown == words else " ".join(shown)


def _masked_words(argv: Sequence[str], hidden: list[str]) -> list[str]:
    shown = []
    for before, word in zip(["", *argv], argv, strict=False):
        name, equals, value = word.partition("=")
        if equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={HIDDEN}")
            hidden.append(value)
        elif before.startswith("-") and _SECRET_NAME.search(before) and not word.startswith("-"):
            shown.append(HIDDEN)
            hidden.append(word)
        else:
            shown.append(word)
    return shown


def masked_word(word: str) -> str:
    """A command-line word without the value of what may be secret (--set target.headers.Authorization=...)."""
    return re.sub(r"=.*", f"={HIDDEN}", word, count=1, flags=re.DOTALL) if SECRET.search(word) else word


def tells_a_secret(override: str) -> bool:
    """Does this KEY=VALUE of a command line, which every user of the machine can read, tell what may be secret?"""
    value = override.partition("=")[2]
    return masked_word(override) != override and not _IN_PLACE_OF_A_SECRET.fullmatch(value)


def secret_words(values: Iterable[str], in_the_open: Iterable[str] = ()) -> tuple[str, ...]:
    """The words of these values that may be secret, the longest first: a key without its Bearer, a pair of Basic also
    decoded. No word of ``in_the_open``: what the settings show anyway is no secret.
    """
    words = {word for value in values for word in [*value.split(), *_pair(value)] if len(word) >= MIN_SECRET_CHARS}
    words -= {word for text in in_the_open for word in text.split()}
    return tuple(sorted(words, key=lambda word: (-len(word), word)))


def _pair(value: str) -> list[str]:
    """User and password of a header's ``Basic ...``, together and the password alone."""
    scheme, _, coded = value.partition(" ")
    if scheme.lower() != "basic":
        return []
    try:
        pair = base64.b64decode(coded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return []
    return [pair, pair.partition(":")[2]]


def texts(tree: Any) -> list[str]:
    """All texts in a tree, keys left out."""
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tree] if isinstance(tree, str) else [text for one in inside for text in texts(one)]


def _without(secret: str, text: str) -> str:
    text = text.replace(secret, HIDDEN)
    begun = text.rfind(secret[:MIN_SECRET_CHARS], len(text) - len(secret) if len(text) > len(secret) else 0)
    return text[:begun] + HIDDEN if begun >= 0 and secret.startswith(text[begun:]) else text


def redact(value: Any, secrets: Sequence[str]) -> Any:
    """A text, or a tree with texts in it, with *** in the place of each secret, also of one that the end of a text has
    cut off. Numbers stay as they are.
    """
    if not secrets:
        return value
    if isinstance(value, str):
        for secret in secrets:
            value = _without(secret, value)
        return value
    if isinstance(value, dict):
        return {redact(key, secrets): redact(one, secrets) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redact(one, secrets) for one in value]
    return value
