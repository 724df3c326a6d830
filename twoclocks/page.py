"""A page of /metrics -> the value of each series. Pure: text in, numbers out.

Scraped once a second, a page of vLLM costs more to parse than all else that the collector does, yet from one scrape to
the next only some values differ. A PageReader keeps the lines of the last page and reads the changed values alone.
"""

import re

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, tuple[tuple[str, str], ...]]
Series = dict[Key, float]

MAX_LINES = 300_000
"""Of a page: a hundred thousand series, and what is said of them. A million take minutes and most of a GB to read."""
MAX_LINE_CHARS = 64 * 1024
"""Reading a line takes a hundred times its length."""

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*"'
_PLAIN = re.compile(
    rf"([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{{(?:{_LABEL}(?:,{_LABEL})*,?)?\}})?)"
    r" ([+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?|Inf)|NaN)"
)
"""A sample line whose parts cannot be mistaken: a name with its labels, one blank, one number; no time stamp."""


def parse_page(text: str) -> tuple[Series, dict[str, str]]:
    """(value of each series, type of each family) of a Prometheus text exposition. Raises ValueError."""
    series: Series = {}
    types: dict[str, str] = {}
    try:
        for family in text_string_to_metric_families(text):
            types[family.name] = family.type
            for sample in family.samples:
                series[sample.name, tuple(sorted(sample.labels.items()))] = float(sample.value)
    except (
        IndexError,
        OverflowError,
    ) as error:  # what the parser makes of an empty name, and float() of a huge integer
        raise ValueError(f"not readable as an exposition: {error}") from None
    return series, types


class PageReader:
    """Reads a page again and again: ``read`` gives what ``parse_page`` gives, sooner."""

    def __init__(self) -> None:
        self._lines: list[str] = []  # of the last page, if all of them were plain
        self._keys: dict[int, Key] = {}  # line -> the series whose value stands there
        self._series: Series = {}
        self._types: dict[str, str] = {}

    def read(self, text: str) -> tuple[Series, dict[str, str]]:
        """(value of each series, type of each family). Raises ValueError."""
        if text.count("\n") > MAX_LINES:
            raise ValueError(f"a page of more than {MAX_LINES:,} lines")
        lines = text.split("\n")
        if max(map(len, lines)) > MAX_LINE_CHARS:
            raise ValueError(f"a page with a line of more than {MAX_LINE_CHARS:,} characters")
        if self._same_but_values(lines):
            return dict(self._series), self._types
        self._lines = []
        numbered: list[str] = []
        values: dict[int, float] = {}
        for number, line in enumerate(lines):
            plain = _PLAIN.fullmatch(line)
            if plain:
                values[number] = float(plain[2])
                numbered.append(f"{plain[1]} {number}")
            elif not line or line.startswith("#"):
                numbered.append(line)
            else:
                return parse_page(text)
        # What a line means hangs on the lines before it (a TYPE, a name that ends a family) but never on its value. So
        # each value is replaced by the number of its line: the parser then says which line holds which series.
        places, self._types = parse_page("\n".join(numbered))
        self._keys = {int(number): key for key, number in places.items()}
        self._series = {key: values[int(number)] for key, number in places.items()}
        self._lines = lines
        return dict(self._series), self._types

    def _same_but_values(self, lines: list[str]) -> bool:
        """Take over the new values, if nothing but values changed since the last page."""
        if not self._lines or len(lines) != len(self._lines):
            return False
        new: list[tuple[int, float]] = []
        for number, (line, before) in enumerate(zip(lines, self._lines, strict=True)):
            if line != before:
                plain = _PLAIN.fullmatch(line)
                if plain is None or not before.startswith(plain[1] + " "):
                    return False
                new.append((number, float(plain[2])))
        for number, value in new:
            if number in self._keys:  # else a later line of the page tells the same series again
                self._series[self._keys[number]] = value
        self._lines = lines
        return True
