"""GPU figures: rows of gpu_samples.jsonl -> what each GPU did in the measuring window, and the energy of a token.

Pure functions over the rows that gpu.py wrote. Watts, joules, bytes, shares of 0..1; what was not told is None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from twoclocks.metrics import Floats

Row = Mapping[str, Any]

NOT_THROTTLED = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting"})
"""Reasons for a lower clock that are a choice, not a limit that was hit."""
COVERED = 0.5
"""Share of the window over which the energy must be known for energy per token to be given."""

DEFINITIONS = {
    "utilisation_mean": "share of the time in which a kernel ran, not how much of the GPU it used; mean of the samples",
    "memory_peak_bytes": "largest memory in use of the samples, of whatever process",
    "power_mean_w": "energy / the part of the window that it covers",
    "energy_j": "over covered_s of the window: rise of the GPU's counter, or power over time, as energy_source says",
    "joules_per_output_token": "mean power of all GPUs that were read x window / output tokens of the window",
    "throttled_share": "share of the samples in which the clock was held down by power, heat or another GPU",
}
"""What the figures mean; the others are as their names say."""


def gpu_figures(rows: Sequence[Row], window: tuple[float, float], output_tokens: float | None) -> list[dict[str, Any]]:
    """One entry a GPU, by host and index, and a last one (``gpu``: "all") with the energy of them all and of a token.

    Empty where no GPU was read inside the window.
    """
    gpus: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            key = (str(row.get("host") or ""), str(row.get("uuid") or row.get("gpu")))
            gpus.setdefault(key, []).append(row)
    figures = [_figures(sorted(own, key=lambda row: float(row["at"])), window) for own in gpus.values()]
    figures = [found for found in figures if found["samples"]]
    figures.sort(key=lambda found: (found["host"] or "", found["gpu"] if found["gpu"] is not None else -1))
    return [*figures, _all(figures, window, output_tokens)] if figures else []


def _figures(rows: Sequence[Row], window: tuple[float, float]) -> dict[str, Any]:
    inside = [row for row in rows if window[0] <= row["at"] <= window[1]]
    reasons = [row["throttle"] for row in inside if row.get("throttle") is not None]
    held = [[name for name in names if name not in NOT_THROTTLED] for names in reasons]
    utilisation, memory = _known(inside, "utilisation"), _known(inside, "memory_used_bytes")
    clock, temperature = _known(inside, "sm_clock_hz"), _known(inside, "temperature_c")
    return {
        **{name: rows[-1].get(name) for name in ("host", "gpu", "uuid", "name", "source")},
        "samples": len(inside),
        "utilisation_mean": _mean(utilisation),
        "utilisation_max": _max(utilisation),
        "memory_peak_bytes": _max(memory),
        "memory_total_bytes": rows[-1].get("memory_total_bytes"),
        "sm_clock_mean_hz": _mean(clock),
        "temperature_max_c": _max(temperature),
        **_energy(rows, window),
        "throttled_share": sum(map(bool, held)) / len(held) if held else None,
        "throttle_reasons": {
            name: sum(name in names for names in held) / len(held)
            for name in sorted({name for names in held for name in names})
        },
    }


def _energy(rows: Sequence[Row], window: tuple[float, float]) -> dict[str, Any]:
    """Energy in the window: the difference of the counter if it is told and never fell, else power over time."""
    at, counter = _series(rows, "energy_j")
    if len(at) > 1 and not (np.diff(counter) < 0).any():
        # an exporter tells an old value until it reads again (30 s by default): only the new ones have a time
        fresh = np.concatenate([[True], np.diff(counter) > 0])
        if fresh.sum() > 2:
            at, counter = at[fresh], counter[fresh]
        start, end = max(window[0], at[0]), min(window[1], at[-1])
        if end > start:
            energy = float(np.subtract(*np.interp([end, start], at, counter)))
            return _told(energy, "counter", end - start, at)
    at, power = _series(rows, "power_w")
    if len(at) > 1:
        start, end = max(window[0], at[0]), min(window[1], at[-1])
        if end > start:
            times = np.concatenate([[start], at[(at > start) & (at < end)], [end]])
            energy = float(np.trapezoid(np.interp(times, at, power), times))
            changes = np.concatenate([[True], np.diff(power) != 0])
            return _told(energy, "power over time", end - start, at[changes])
    return {"energy_j": None, "energy_source": None, "covered_s": 0.0, "power_mean_w": None, "refresh_s": None}


def _told(energy: float, source: str, covered: float, news_at: Floats) -> dict[str, Any]:
    """``refresh_s``: how often a new value was seen, by the median; the ends of the window are uncertain by that."""
    refresh = float(np.median(np.diff(news_at))) if len(news_at) > 1 else None
    mean = energy / covered
    return {
        "energy_j": energy,
        "energy_source": source,
        "covered_s": covered,
        "power_mean_w": mean,
        "refresh_s": refresh,
    }


def _all(figures: Sequence[dict[str, Any]], window: tuple[float, float], tokens: float | None) -> dict[str, Any]:
    """The GPUs together: energy and power as sums, None if one of them does not tell."""
    length = window[1] - window[0]
    known = all(found["energy_j"] is not None for found in figures)
    power = sum(found["power_mean_w"] for found in figures) if known else None
    covered = min(found["covered_s"] for found in figures)
    per_token = power is not None and tokens and length > 0 and covered >= COVERED * length
    return {
        "gpu": "all",
        "gpus": len(figures),
        "energy_j": sum(found["energy_j"] for found in figures) if known else None,
        "energy_source": " and ".join(sorted({str(found["energy_source"]) for found in figures})) if known else None,
        "covered_s": covered,
        "power_mean_w": power,
        "output_tokens": tokens,
        "joules_per_output_token": power * length / tokens if power is not None and tokens and per_token else None,
    }


def _series(rows: Sequence[Row], name: str) -> tuple[Floats, Floats]:
    """(times, values) where a value was told."""
    known = [(float(row["at"]), float(row[name])) for row in rows if row.get(name) is not None]
    at, values = np.array(known, dtype=np.float64).reshape(-1, 2).T
    return at, values


def _known(rows: Sequence[Row], name: str) -> Floats:
    return _series(rows, name)[1]


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _max(values: Floats) -> float | None:
    return float(values.max()) if len(values) else None
