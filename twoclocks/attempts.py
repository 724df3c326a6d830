"""Attempts: what became of what users asked for, where requests were sent again. Knows nothing of how that was done.

Every other figure of a run is one of attempts, each of which is a request with a record of its own.
"""

from typing import Any

import numpy as np
import pandas as pd

from twoclocks.load import Run
from twoclocks.metrics import distribution

DEFINITION = (
    "an ask is what a user wanted: a measured first attempt and its retries, by first_attempt_id; it is ok if its last "
    "attempt is. From the first intent: first or last token of the attempt that ended ok - intended_at of the first "
    "attempt, pauses included. All other figures are of attempts, each of which counts as a request"
)


def attempts(run: Run) -> dict[str, Any] | None:
    """How many attempts the asks took, and how long from the first intent; None where retries were off.

    Its rows: one for each number of attempts, then one of all asks.
    """
    rows = run.measured
    allowed = (run.experiment.get("retries") or {}).get("max") or 0
    if rows.empty or not (allowed or (rows["attempt"] > 1).any()):
        return None
    rows = rows.assign(ask=rows["first_attempt_id"].fillna(rows["request_id"]))
    by_ask = rows.sort_values("attempt").groupby("ask", sort=False)
    asks = by_ask.last().assign(first_intent=by_ask["intended_at"].first())
    asks["ttft"] += asks["sent_at"] - asks["first_intent"]
    asks["e2e"] += asks["sent_at"] - asks["first_intent"]
    counts = sorted(asks["attempt"].unique())
    return {
        "asks": len(asks),
        "attempts": len(rows),
        "ok": int((asks["status"] == "ok").sum()),
        "retried_share": float((asks["attempt"] > 1).mean()),
        "rows": [
            *(_row(int(count), asks[asks["attempt"] == count], len(asks)) for count in counts),
            _row(None, asks, len(asks)),
        ],
        "unit": "asks; attempts; share; s",
        "definition": DEFINITION,
    }


def _row(count: int | None, asks: pd.DataFrame, of: int) -> dict[str, Any]:
    ok = asks[asks["status"] == "ok"]
    return {
        "attempts": count,  # None: any number
        "asks": len(asks),
        "share": len(asks) / of,
        "ok": len(ok),
        "ttft_from_first_intent": distribution(ok["ttft"].to_numpy(dtype=np.float64)),
        "e2e_from_first_intent": distribution(ok["e2e"].to_numpy(dtype=np.float64)),
    }
