"""Evidence: the run folder of one level -> the counts by which `levels` judges it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twoclocks.figures import good_requests
from twoclocks.levels import Evidence, keeps_up
from twoclocks.load import Run, load_run
from twoclocks.metrics import Floats

FILLED = 0.95


def evidence(folder: Path) -> Evidence:
    """What the requests of a run say. Raises RunFolderError."""
    return evidence_of(load_run(folder))


def evidence_of(run: Run) -> Evidence:
    """The same of a run that has been read."""
    measured, good, kept_up = run.measured, good_requests(run), None
    load = run.experiment.get("load") or {}
    if load.get("shape") == "rate":
        began, ended = measured["intended_at"].to_numpy(), measured["ended_at"].to_numpy()
        rate = load.get("rate", 1)
        due = float(rate) if isinstance(rate, int | float) else None
        kept_up = not run.meta.get("not_sent") and kept_up_with(began, ended, run.window, dispersion(load), due)
        if kept_up and not filled(began, ended, run.window):
            kept_up = None
    return Evidence(requests=len(good), good=int(good.sum()), kept_up=kept_up)


def dispersion(load: Mapping[str, Any]) -> float:
    """Squared coefficient of variation of the gaps between arrivals: 0 for constant ones, 1 for a Poisson process."""
    arrivals = load.get("arrivals", "poisson")
    return {"constant": 0.0, "gamma": 1 / float(load.get("burstiness", 1))}.get(arrivals, 1.0)


def filled(began: Floats, ended: Floats, window: tuple[float, float]) -> bool:
    """Had an empty server filled up by the middle of the window?

    If not, requests that pile up look like requests that take long: then only a pile tells, not that there is none.
    """
    return not len(began) or float(np.quantile(ended - began, FILLED)) <= (window[1] - window[0]) / 2


def kept_up_with(
    began: Floats, ended: Floats, window: tuple[float, float], dispersion: float = 1.0, rate: float | None = None
) -> bool:
    """Did requests not pile up, from when an empty server had filled up to the window's end?

    It did not keep up if more piled up than chance explains (`keeps_up`), and fewer ended than are due at ``rate``
    requests/s: what piled up although more ended than that, more arrivals than their mean have brought. Filling up is
    taken to last as long as 95 % of the requests do, at most half the window.

    Chance is what the number in flight would vary by if each request took its time whatever the others do, with
    arrivals of this dispersion D at a rate r: r times the integral over u of p (1 - p) + D p^2, where p is the share
    of requests that take longer than u (Borovkov 1967). r times the integral of p is the mean in flight, taken here
    from the first quarter, before a pile would have grown; that of p (1 - p) is half the mean difference of two
    requests' times.
    """
    start, end = window
    if not len(began) or end <= start:
        return True
    took = ended - began
    start += min(float(np.quantile(took, FILLED)), (end - start) / 2)
    quarter = start + (end - start) / 4
    overlap = np.clip(np.minimum(ended, quarter) - np.maximum(began, start), 0.0, None)
    in_flight = float(overlap.sum()) / (quarter - start)
    arrived = int(((began >= start) & (began < end)).sum())
    finished = int(((ended >= start) & (ended < end)).sum())
    own = min(arrived / (end - start) * mean_difference(took) / 2, in_flight)
    variance = own + dispersion * (in_flight - own)
    return keeps_up(arrived, finished, variance) or (rate is not None and finished >= rate * (end - start))


def mean_difference(values: Floats) -> float:
    """The mean of |a - b| over all pairs (Gini's mean difference), from the sorted values."""
    count = len(values)
    weights = 2 * np.arange(1, count + 1) - count - 1
    return 2 * float((weights * np.sort(values)).sum()) / count**2
