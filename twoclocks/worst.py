"""Worst: a Run -> its worst requests, and of each how its chunks came."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from twoclocks import metrics
from twoclocks.load import Run
from twoclocks.metrics import Floats

BY = ("ttft", "tpot", "itl_max", "e2e")
"""Columns by which a request can be among the worst."""
EACH = 10
"""The worst by each of them."""
POINTS = 400
"""Points of a request's chunks at most: those around its longest gaps, and others evenly spaced."""


def worst(run: Run) -> list[dict[str, Any]]:
    """The worst measured requests that ended ok, by E2E: each with its figures in seconds, and by what it is worst."""
    ok = run.ok
    among: dict[int, list[str]] = {}
    for name in BY:
        for row in ok[name].nlargest(EACH).index.tolist():
            among.setdefault(row, []).append(name)
    told = ok.loc[list(among)].sort_values("e2e", ascending=False)
    columns = ("request_id", "prompt_id", "worker", "user", "sent_at", "prompt_tokens", "output_tokens", *BY)
    return [
        {name: told.at[row, name] for name in columns}
        | {"server_ttft": told.at[row, "server_ttft"], "unit": "s", "worst_by": among[row]}
        for row in told.index.tolist()
    ]


def chunk_timelines(run: Run, request_ids: Sequence[str]) -> dict[str, tuple[Floats, Floats]]:
    """Of each request: when its token chunks came, seconds since it was sent, and the tokens that had come by then."""
    rows = run.requests.index[run.requests["request_id"].isin(list(request_ids))]
    arrivals, sent_at = run.arrivals, run.requests["sent_at"].to_numpy()
    tokens = metrics.arrived_tokens(arrivals, run.requests["output_tokens"].to_numpy())
    found = {}
    for row in rows.tolist():
        ends = np.array([row, row + 1], dtype=arrivals.request.dtype)  # of another type, all of it would be copied
        first, last = np.searchsorted(arrivals.request, ends)
        seen = arrivals.is_token[first:last]
        at = arrivals.at[first:last][seen] - sent_at[row]
        kept = _kept(at)
        found[str(run.requests.at[row, "request_id"])] = (at[kept], np.cumsum(tokens[first:last][seen])[kept])
    return found


def _kept(at: Floats) -> Any:
    """Which points to draw: all, or those on both sides of the longest gaps and others between."""
    if len(at) <= POINTS:
        return np.arange(len(at))
    longest = np.argsort(np.diff(at))[-POINTS // 4 :]
    evenly = np.linspace(0, len(at) - 1, POINTS // 2).astype(np.int64)
    return np.unique(np.concatenate([longest, longest + 1, evenly]))
