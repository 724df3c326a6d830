"""What may be secret: found by its name in settings, and hidden wherever settings or a server's words are written down.

Pure. A server was sent the key, so it can say it back in any disguise; what is hidden here is what it says plainly, so
that an honest echo does not carry a key into a folder that is shared.
"""

import base64
import binascii
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SECRET = re.compile(
    r"(?:(?:^|[^a-zA-Z0-9]|(?<=[a-z0-9])(?=[A-Z]))(?i:authorization|api[-_]?key|access[-_]?key|token|secret|password"
    r"|passwd|passphrase|headers|cookie|credentials?)\b"
    r"|(?<=[a-zA-Z0-9])(?<!(?i:cache))(?:[-_](?i:key)|Key)(?![\w.-]))"
)
"""Names of what may be secret. api_key_env, api_key_file, max_tokens, prompt_cache_key are not among them."""
MIN_SECRET_CHARS = 8
"""A shorter word is no secret, and may stand anywhere."""
HIDDEN = "***"
_SECRET_NAME = re.compile(f"(?:{SECRET.pattern})$")
_SCHEME = r"(?:(?:Bearer|Basic|Token)\s+)?"
_IN_PLACE_OF_A_SECRET = re.compile(rf"\*\*\*|{_SCHEME}\$\{{\w+(?::-)?\}}|null|~|")
"""What --set may have as the value of a secret without telling it."""
_LOGIN = re.compile(r"(?<=://)[^\s/?#@'\"]+(?=@)")
_USERS = ("-u", "--user", "--proxy-user")
_TOLD = re.compile(
    rf"((?:(?<![^\s'\"])(?=-)[\w-]*?{SECRET.pattern}[\s=]+|{SECRET.pattern}['\"]?\s*[:=]\s*"
    rf"|(?<![^\s'\"])(?:{'|'.join(_USERS)})[\s=]+(?=[^\s:]+:[^\s:])(?!\d+:\d+))['\"]?{_SCHEME})"
    r"([^\s'\";,&|]+(?:;\s*[^\s'\";=]+=[^\s'\";]+)*)"
)
"""In a text that a shell or a server reads: what names a secret, and the secret. A cookie has several pairs."""
_SCHEMAS = ("properties", "$defs", "definitions")
"""In a JSON schema the names below these are those of an answer's fields."""
_OF_A_SECRET_HEADER = re.compile(r"auth|cookie|key|token|secret|passw|passphrase|credential", re.IGNORECASE)
_LIKE_A_KEY = re.compile(r"(?=.*[a-zA-Z])(?=.*\d)[\w.~+=-]{16,}")


def masked(tree: Any, *, is_secret: bool = False, hidden: list[str] | None = None) -> Any:
    """A tree of settings in which every value below a name of SECRET is replaced by ***.

    ``hidden`` is given the texts that were replaced.
    """
    told = [] if hidden is None else hidden
    if isinstance(tree, dict):
        return {
            key: _masked_fields(value, told)
            if key in _SCHEMAS and isinstance(value, dict) and not is_secret
            else masked(value, is_secret=is_secret or bool(SECRET.search(str(key))), hidden=told)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        shown = _masked_words(tree, told) if not is_secret and all(isinstance(word, str) for word in tree) else tree
        return [masked(value, is_secret=is_secret, hidden=told) for value in shown]
    if is_secret and tree is not None:
        told += [str(tree)] if isinstance(tree, str | int) else []
        return HIDDEN
    if isinstance(tree, str):
        return masked_command(tree, told) if tree.startswith("command:") else _without_login(tree, told)  # collect.log
    return tree


def _masked_fields(schema: dict[str, Any], hidden: list[str]) -> dict[str, Any]:
    """A schema's fields: a description of a password is no password."""
    return {
        name: masked(field, is_secret=not isinstance(field, dict) and bool(SECRET.search(str(name))), hidden=hidden)
        for name, field in schema.items()
    }


def masked_argv(argv: Sequence[str]) -> list[str]:
    """A command line without what may be secret: ``--api-key X``, ``--api-key=X``, ``HF_TOKEN=X``."""
    return _masked_words(argv, [])


def masked_command(text: str, hidden: list[str] | None = None) -> str:
    """The same of a command line in one text."""
    try:
        words = shlex.split(text)
    except ValueError:
        return _masked_text(text, [] if hidden is None else hidden)  # no command is made of it, but a message
    shown = _masked_words(words, [] if hidden is None else hidden)
    return text if shown == words else " ".join(f"'{word}'" if " " in word else word for word in shown)


def _masked_words(argv: Sequence[str], hidden: list[str]) -> list[str]:
    shown = []
    for before, word in zip(["", *argv], argv, strict=False):
        name, equals, value = word.partition("=")
        is_login = before in _USERS and ":" in word and not re.fullmatch(r"\d+:\d+", word)  # not docker's ids
        if equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={HIDDEN}")
            hidden.append(value)
        elif is_login or (before.startswith("-") and _SECRET_NAME.search(before) and not word.startswith("-")):
            shown.append(HIDDEN)
            hidden.append(word)
        else:
            shown.append(_masked_text(word, hidden))
    return shown


def _masked_text(text: str, hidden: list[str]) -> str:
    """What a word tells a shell, or a server, in its own syntax: ``Authorization: Bearer X``, ``serve --api-key X``."""

    def hide(found: re.Match[str]) -> str:
        hidden.append(found[2])
        return found[1] + HIDDEN

    return _TOLD.sub(hide, _without_login(text, hidden))


def _without_login(text: str, hidden: list[str]) -> str:
    """Without what stands before the @ of an address."""
    hidden += _LOGIN.findall(text)
    return _LOGIN.sub(HIDDEN, text)


def masked_word(word: str) -> str:
    """A command-line word without the value of what may be secret (--set target.headers.Authorization=...)."""
    if SECRET.search(word):
        return re.sub(r"=.*", f"={HIDDEN}", word, count=1, flags=re.DOTALL)
    return _masked_text(word, [])


def tells_a_secret(override: str) -> bool:
    """Does this KEY=VALUE of a command line, which every user of the machine can read, tell what may be secret?"""
    value = override.partition("=")[2]
    return masked_word(override) != override and not _IN_PLACE_OF_A_SECRET.fullmatch(value)


def secret_headers(headers: Mapping[str, str]) -> list[str]:
    """What may be secret of headers: all of one that is named so or has a login's form; of others, which may route or
    label, what looks like a key. A model's name looks like one.
    """
    found = []
    for name, value in headers.items():
        if _OF_A_SECRET_HEADER.search(name) or re.match(r"(?:Bearer|Basic|Token)\s", value):
            found.append(value)
        elif "model" not in name.lower():
            found += filter(_LIKE_A_KEY.fullmatch, value.split())
    return found


def secret_words(values: Iterable[str], in_the_open: Iterable[str] = ()) -> tuple[str, ...]:
    """The words of these values that may be secret, the longest first: a key without its Bearer, a pair of Basic also
    decoded, the values of a cookie. No word of ``in_the_open``: what the settings show anyway is no secret.
    """
    words = {word for value in values for word in [*_words(value), *_pair(value)] if len(word) >= MIN_SECRET_CHARS}
    words -= {word for text in in_the_open for word in _words(text)}
    return tuple(sorted(words, key=lambda word: (-len(word), word)))


def _words(value: str) -> list[str]:
    """Between blanks, and within those between what parts a list; no name that has a value behind it."""
    return [*value.split(), *re.findall(r"[^\s=;,:\"']+(?![^\s=;,:\"']|=)", value)]


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


def pattern(secret: str) -> str:
    """A regular expression for it; without a digit it may be a word of a language, which longer ones hold."""
    return re.escape(secret) if re.search(r"\d", secret) else rf"(?<!\w){re.escape(secret)}(?!\w)"


def _without(secret: str, text: str) -> str:
    if secret[:MIN_SECRET_CHARS] not in text:
        return text
    text = re.sub(pattern(secret), HIDDEN, text)
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
