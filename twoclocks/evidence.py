"""Evidence: the run folder of one level -> the counts by which `levels` judges it."""

from pathlib import Path

import numpy as np

from twoclocks.levels import Evidence, keeps_up
from twoclocks.load import Run, load_run
from twoclocks.metrics import Floats
from twoclocks.summary import good_requests


def evidence(folder: Path) -> Evidence:
    """What the requests of a run say. Raises RunFolderError."""
    return evidence_of(load_run(folder))


def evidence_of(run: Run) -> Evidence:
    """The same of a run that has been read."""
    measured, good, kept_up = run.measured, good_requests(run), None
    if (run.experiment.get("load") or {}).get("shape") == "rate":
        began, ended = measured["intended_at"].to_numpy(), measured["ended_at"].to_numpy()
        kept_up = not run.meta.get("not_sent") and kept_up_with(began, ended, run.window)
    return Evidence(requests=len(good), good=int(good.sum()), kept_up=kept_up)


def kept_up_with(began: Floats, ended: Floats, window: tuple[float, float]) -> bool:
    """Did requests not pile up, from when the first answers were due back to the window's end?

    The time in which a server that was empty fills up is left out: the median time of a request, at most half the
    window. The mean in flight is that of the first quarter of what remains, before a pile would have grown.
    """
    start, end = window
    if not len(began) or end <= start:
        return True
    start += min(float(np.median(ended - began)), (end - start) / 2)
    quarter = start + (end - start) / 4
    overlap = np.clip(np.minimum(ended, quarter) - np.maximum(began, start), 0.0, None)
    arrived = int(((began >= start) & (began < end)).sum())
    finished = int(((ended >= start) & (ended < end)).sum())
    return keeps_up(arrived, finished, float(overlap.sum()) / (quarter - start))
