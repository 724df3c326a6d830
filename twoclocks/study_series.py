"""Study series: what the plots of a study show, as rows: cells in time, curves over load, memory over n. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twoclocks import curves
from twoclocks.evidence import evidence_of
from twoclocks.study_arms import Arm
from twoclocks.study_figures import Figure

Figures = Mapping[str, Figure]
DRIFT = ("ttft.p50", "e2e.mean", "output_throughput", "saturation.output_throughput")
"""Figures that are followed from cell to cell."""
USED = ("memory.kv_used_peak", "kv_usage_peak")
"""The KV cache really used, the better figure first."""


def drift(arms: Sequence[Arm], figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """A row a finished cell, in the order in which they were run, with what it measured by itself."""
    rows = [
        {
            "number": cell.number, "target": arm.target, "variant": arm.variant, "repeat": cell.repeat,
            "started_at_unix": cell.started_at_unix,
            "values": {name: of[name].by_repeat[place] for name in DRIFT if name in of},
        }
        for arm, of in zip(arms, figures, strict=True)
        for place, cell in enumerate(arm.cells)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["started_at_unix"] or 0.0, row["number"]))


def by_order(arms: Sequence[Arm]) -> str:
    """The targets in the order in which their cells were run, such as A, B, A; runs on end of one stand once."""
    cells = sorted((cell.number, arm.target or arm.name) for arm in arms for cell in arm.cells)
    names = [name for _, name in cells]
    return ", ".join(name for before, name in zip([None, *names], names, strict=False) if name != before)


def lines(arms: Sequence[Arm], figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Load curves, one a sweep, or one a target whose variants are rates: over, unit, levels and knee as of curves."""
    found = [
        {"target": arm.target or arm.name, "variant": arm.variant, "repeat": cell.repeat}
        | {key: sweep[key] for key in ("over", "unit", "levels", "knee")}
        for arm in arms
        if arm.sweeps
        for cell, sweep in zip(arm.cells, arm.sweeps, strict=True)
    ]
    for target in dict.fromkeys(arm.target for arm in arms):
        places = [place for place, arm in enumerate(arms) if arm.target == target and _rate(arm) is not None]
        levels = sorted((_level(arms[place], figures[place]) for place in places), key=lambda row: row["value"])
        if len({row["value"] for row in levels}) > 1:
            knee = curves.knee("rate", levels, {})
            line = {"target": target or "all", "variant": "", "repeat": None, "over": "rate", "unit": "requests/s"}
            found.append(line | {"levels": levels, "knee": knee})
    return found


def _rate(arm: Arm) -> float | None:
    """The rate that an arm offers, if it offers one."""
    load = arm.experiment.get("load") or {}
    rate = load.get("rate")
    return float(rate) if load.get("shape") == "rate" and isinstance(rate, int | float) else None


def _level(arm: Arm, figures: Figures) -> dict[str, Any]:
    """An arm as a level of a sweep: figures of all its repeats; it kept up if it did in every one."""
    row: dict[str, Any] = {"value": _rate(arm), "number": arm.cells[0].number, "error": None, "status": "finished"}
    kept_up = [evidence_of(run).kept_up for run in arm.runs]
    row["kept_up"] = False if False in kept_up else None if None in kept_up else True
    names = {"achieved": "request_throughput", "tokens_per_s": "output_throughput", "goodput": "goodput"}
    names |= {f"{name}_{p}": f"{name}.{p}" for name in ("ttft", "tpot", "e2e") for p in ("p50", "p95", "p99")}
    return row | {key: figures[name].value if name in figures else None for key, name in names.items()}


def memory_bars(arms: Sequence[Arm], figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Weights, KV cache reserved and KV cache used of each arm that tells any of them, bytes; None where not told.

    Weights on disk are another quantity, and stand apart from those in memory.
    """
    keys = ("weights", "weights_on_disk", "kv_reserved", "kv_used_peak")
    rows = [
        {"name": arm.name} | {key: of[f"memory.{key}"].value if f"memory.{key}" in of else None for key in keys}
        for arm, of in zip(arms, figures, strict=True)
    ]
    return [row for row in rows if any(row[key] is not None for key in keys)]


def sharing(arms: Sequence[Arm], figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """KV cache used at its peak over the number of sequences at once: by requests of n choices, and by n requests.

    ``share_saved``: 1 - used by n choices of one request / used by n separate requests; None where one of both was not
    measured, or where the n were seen to use less than one alone (``missed``): the gauge has missed most of them, as
    it does of a beam search, whose every step is a request that may have ended when the gauge is set.
    Only where the study has requests of several choices.
    """
    rows: list[dict[str, Any]] = []
    for arm, of in zip(arms, figures, strict=True):
        name = next((name for name in USED if name in of), None)
        if name is None:
            continue
        choices, at_once = parallel(arm)
        rows.append(
            {
                "target": arm.target, "variant": arm.variant, "how": decoding(arm), "choices": choices,
                "requests": at_once, "sequences": choices * at_once, "used": of[name].value, "unit": of[name].unit,
                "definition": of[name].definition, "share_saved": None,
            }
        )  # fmt: skip
    if not any(row["choices"] > 1 for row in rows):
        return []

    def by_requests(row: dict[str, Any], number: int) -> float:
        """What so many requests of one choice used on the same target; nan where none were measured."""
        wanted = (row["target"], row["unit"], 1, number)
        keys = ("target", "unit", "choices", "sequences")
        used = [other["used"] for other in rows if tuple(other[key] for key in keys) == wanted]
        return float(np.mean(used)) if used else math.nan

    for row in rows:
        separate, alone = by_requests(row, row["sequences"]), by_requests(row, 1)
        row["missed"] = row["choices"] > 1 and row["used"] < alone
        if row["choices"] > 1 and separate > 0 and not row["missed"]:
            row["share_saved"] = 1 - row["used"] / separate
    targets = list(dict.fromkeys(row["target"] for row in rows))
    return sorted(rows, key=lambda row: (targets.index(row["target"]), row["choices"] > 1, row["sequences"]))


def decoding(arm: Arm) -> str:
    """How an arm asked for its choices: beam search, or sampling."""
    body = (arm.experiment.get("target") or {}).get("extra_body") or {}
    return "beam search" if body.get("use_beam_search") else "sampling"


def parallel(arm: Arm) -> tuple[int, int]:
    """(choices of a request, requests at once) that an arm asked for: n of its body; users or the size of a batch."""
    target, load = arm.experiment.get("target") or {}, arm.experiment.get("load") or {}
    asked = (target.get("extra_body") or {}).get("n")
    at_once = load.get("batch") if load.get("shape") == "batch" else load.get("users")
    return (asked if isinstance(asked, int) else 1), (at_once if isinstance(at_once, int) else 1)
