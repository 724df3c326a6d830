"""Turns: what became of the sessions of a run, turn by turn. Knows nothing of how they were played."""

from typing import Any

import numpy as np
import pandas as pd

from twoclocks.load import Run
from twoclocks.metrics import Floats
from twoclocks.prefix_cache import OBSERVED, cached_share, has_sessions

MOST_TURNS = 20
"""Turns that have a row of their own; the ones after them share the last row."""


def sessions(run: Run) -> dict[str, Any] | None:
    """How many were begun, and which of their turns were not sent; None for a run without sessions."""
    if not has_sessions(run):
        return None
    return {
        "begun": int(run.measured["session"].nunique()),
        "turns_sent": len(run.measured),
        "turns_not_sent": run.meta.get("turns_not_sent"),  # why -> how many; None where the run never came to its end
        "unit": "sessions; turns",
        "definition": "sessions of which a turn was sent in the measuring window; turns of those sessions that were "
        "not sent: failed: after a turn that did not end ok; left: after one that its user left; stopped: at the end "
        "of the window, of the user or of load.requests; max_in_flight: so many requests were under way",
    }


def by_turn(run: Run) -> list[dict[str, Any]]:
    """A row a turn: its requests, their TTFT, their prompts and how much of them came from the prefix cache."""
    if not has_sessions(run):
        return []
    turn = run.measured["turn"].fillna(0).clip(upper=MOST_TURNS)
    return [_row(int(number), rows, run.measured) for number, rows in run.measured.groupby(turn)]


def _row(number: int, rows: pd.DataFrame, measured: pd.DataFrame) -> dict[str, Any]:
    ok = rows[rows["status"] == "ok"]
    ttft = ok["ttft"].dropna().to_numpy(dtype=np.float64)
    return {
        "turn": number,
        "and_later": number == MOST_TURNS and bool((measured["turn"] > MOST_TURNS).any()),
        "requests": len(rows),
        "ok": len(ok),
        "ttft_p50": _quantile(ttft, 0.5),
        "ttft_p95": _quantile(ttft, 0.95),
        "prompt_tokens_mean": float(ok["prompt_tokens"].mean()),
        "cached_share": cached_share(ok),
        "unit": "s; tokens; share",
        "definition": "measured requests of this turn, counted from 0; TTFT, prompt tokens and cached share of those "
        f"that ended ok. {OBSERVED}",
    }


def _quantile(values: Floats, q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None
