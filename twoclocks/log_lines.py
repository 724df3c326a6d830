"""Log lines: what stands around a server's own words, taken off; and when a line was written.

Pure. Terminal colours, the prefixes of container runtimes and journals, JSON around a message, Docker's files of JSON.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime, tzinfo
from typing import Any, NamedTuple

import msgspec

PREFIX_CHARS = 300
"""How far before a server's own words the time of their line may stand."""
NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
"""A figure as servers print them, of bounded length."""
MAX_JSON_CHARS = 4 * 1024 * 1024

_ANSI = re.compile(r"\x1b(?:\[[0-9;:?]{0,32}[A-Za-z]|\][^\x07\x1b]{0,256}\x07?|[()][A-Z0-9])|\x00")
_STAMP = re.compile(
    r"(?<![0-9-])(?:([0-9]{4})[-/])?([01][0-9])[-/]([0-3][0-9])[T ]([0-2][0-9]:[0-5][0-9]:[0-6][0-9])"
    r"(?:[.,]([0-9]{1,9}))?(Z|[+-][0-9]{2}:?[0-9]{2})?(?![0-9])"
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_JOURNAL = re.compile(rf"\b({'|'.join(_MONTHS)}) {{1,2}}([0-9]{{1,2}}) ([0-2][0-9]:[0-5][0-9]:[0-6][0-9])\b")


class Line(NamedTuple):
    """A log line by its parts."""

    text: str  # the message
    time: str | None  # told beside the message; times inside it are the reader's to find, with `time_before`
    json: dict[str, Any] | None  # the object that the line is, if it is one


def messages(lines: Iterable[str]) -> Iterator[Line]:
    """Each line without what was put around it."""
    for line in lines:
        yield _unwrapped(_clean(line), None)


def time_before(text: str, start: int) -> str | None:
    """The time that stands before a place of a message, ISO 8601, without year and zone where it says none.

    Of several, one with a zone, as container runtimes add it, tells most; then one with a year; then the nearest.
    """
    prefix = text[max(0, start - PREFIX_CHARS) : start]
    stamps = list(_STAMP.finditer(prefix))
    if stamps:
        best = max(reversed(stamps), key=lambda stamp: (stamp[6] is not None, stamp[1] is not None))
        year, month, day, clock, fraction, zone = best.groups()
        date = f"{year}-{month}-{day}" if year else f"{month}-{day}"
        if zone and len(zone) == len("+0000"):
            zone = f"{zone[:3]}:{zone[3:]}"
        return f"{date}T{clock}{'.' + fraction[:6].ljust(6, '0') if fraction else ''}{zone or ''}"
    if journal := _JOURNAL.search(prefix):
        name, day, clock = journal.groups()
        return f"{_MONTHS.index(name) + 1:02d}-{int(day):02d}T{clock}"
    return None


def unix_times(text: str, near: float, tz: tzinfo) -> list[float]:
    """What a time of `time_before` may mean in Unix seconds, ascending; none if there is no such time.

    One, or two in the hour that comes twice where summer time ends. ``tz`` is the zone of a time that says none; a
    missing year is the one that puts it nearest to ``near``.
    """
    if text[2] != "-":
        return _folds(text, tz)
    year = datetime.fromtimestamp(near, tz).year
    found = [times for each in (year - 1, year, year + 1) if (times := _folds(f"{each}-{text}", tz))]
    return min(found, key=lambda times: abs(times[0] - near), default=[])


def _folds(text: str, tz: tzinfo) -> list[float]:
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is not None:
            return [when.timestamp()]
        return sorted({when.replace(tzinfo=tz, fold=fold).timestamp() for fold in (0, 1)})
    except ValueError:
        return []  # such as 29 February in a year that has none


def _clean(line: str) -> str:
    line = line.rstrip("\r\n")
    return _ANSI.sub("", line) if "\x1b" in line or "\x00" in line else line


def _unwrapped(text: str, outer_time: str | None) -> Line:
    found = _json(text)
    if found is None:
        return Line(text, outer_time, None)
    told = (found.get(key) for key in ("asctime", "timestamp", "time", "@timestamp"))
    at = outer_time or next((time_before(each, PREFIX_CHARS) for each in told if isinstance(each, str)), None)
    if isinstance(inner := found.get("log"), str):  # Docker's file: the server's line is inside
        return _unwrapped(_clean(inner), at)
    message = found.get("message", found.get("msg"))
    return Line(message if isinstance(message, str) else "", at, found)


def _json(text: str) -> dict[str, Any] | None:
    """The JSON object that a line is, whatever short prefix stands before it; None where it is none."""
    start = text.find("{", 0, PREFIX_CHARS)
    if start < 0 or len(text) > MAX_JSON_CHARS or not text.rstrip().endswith("}"):
        return None
    try:
        found = msgspec.json.decode(text[start:])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
