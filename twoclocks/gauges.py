"""Gauges: running, waiting and KV cache usage, from a server_samples.jsonl that grows. Knows nothing of Locust."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from twoclocks.growing import Growing
from twoclocks.server_names import GAUGES

PAGE_BYTES = 256 * 1024
"""Of server_samples.jsonl, read at one refresh."""

_NAMES = {name for names in GAUGES.values() for name in names}


class _Page(msgspec.Struct):
    """What is read of a line of server_samples.jsonl, which holds only what has changed."""

    url: str
    at: float
    samples: list[tuple[str, dict[str, str], float | None]] = []
    gone: list[tuple[str, dict[str, str]]] = []
    error: str | None = None
    stage: str | None = None


_page = msgspec.json.Decoder(_Page)


class ServerGauges:
    """Follows the file; of the pages of the server itself, not of what stands in front of it."""

    def __init__(self, path: Path) -> None:
        self._file = Growing(path)
        self._values: dict[str, dict[tuple[str, str], float]] = {}  # gauge name -> (url, labels) -> value

    def read(self) -> dict[str, float]:
        """Gauge of GAUGES -> its newest value, of all engines together; none that is not known."""
        for _ in self.new():
            pass
        return self._now()

    def new(self, about: int = PAGE_BYTES) -> Iterator[tuple[float, dict[str, float]]]:
        """(when, gauge -> value of all engines together, of KV cache usage the highest) of each new scrape.

        Nothing is known at one that failed.
        """
        for line in self._file.read(about).splitlines():
            with contextlib.suppress(msgspec.MsgspecError):  # a line of another kind has no gauges to show
                page = _page.decode(line)
                if page.stage is None:
                    self._take(page)
                    yield page.at, {} if page.error is not None else self._now()

    @property
    def behind(self) -> int:
        """Bytes that have not been read."""
        return self._file.behind

    def _take(self, page: _Page) -> None:
        for name, labels, value in page.samples:
            if name in _NAMES and value is not None and math.isfinite(value):
                self._values.setdefault(name, {})[page.url, str(labels)] = value
        for name, labels in page.gone:
            self._values.get(name, {}).pop((page.url, str(labels)), None)

    def _now(self) -> dict[str, float]:
        known = {
            gauge: next((name for name in names if self._values.get(name)), None) for gauge, names in GAUGES.items()
        }
        return {
            gauge: (max if gauge == "kv_cache_usage" else sum)(self._values[name].values())
            for gauge, name in known.items()
            if name is not None
        }
