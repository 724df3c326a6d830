"""Units: a figure -> what a reader sees of it. They are formatted here and nowhere else."""

import math


def number(value: float | None, unit: str) -> str:
    """A figure as a reader sees it: seconds as milliseconds, bytes as MiB, a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "s":
        value *= 1e3
    if unit in ("requests", "tokens"):
        return f"{value:,.0f}"
    if unit == "share":
        return f"{value * 100:.1f} %"
    if unit == "bytes":
        value /= 2**20
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 10_000 else f"{value:,.0f}"


def held_against(share: float | None, required: float) -> tuple[str, str]:
    """A share and the one that it is held against, in as many digits as tell them apart."""
    told = asked = ""
    for digits in range(1, 9):
        told = "–" if share is None else f"{share * 100:.{digits}f} %"
        asked = f"{required * 100:.{digits}f} %"
        if math.isclose(float(asked[:-2]), required * 100) and (told != asked or share == required):
            break
    return told, asked


def signed(seconds: float | None) -> str:
    """A difference in ms, with its sign."""
    text = number(seconds, "s")
    return f"+{text}" if seconds is not None and seconds > 0 else text


def shown_unit(unit: str) -> str:
    """The unit that `number` shows."""
    return {"s": "ms", "bytes": "MiB", "share": "", "1": ""}.get(unit, unit)


def bucket(interval: dict[str, float | None] | None) -> str:
    """A percentile read from buckets, in ms: ``80 .. 100 (~94)``; its two ends are sure, the estimate is not."""
    if interval is None:
        return "–"
    lower, estimate, upper = (interval[key] for key in ("lower", "estimate", "upper"))
    if upper is None:
        return f"> {number(lower, 's')}"
    if estimate is None:
        return f"< {number(upper, 's')}"
    return f"{edge(lower or 0)} .. {edge(upper)} (~{_rounded(estimate)})"


def edge(seconds: float) -> str:
    """The bound of a bucket in ms, in four digits, never as a power of ten."""
    return f"{float(f'{seconds * 1e3:.4g}'):,.12g}"


def _rounded(seconds: float) -> str:
    """An estimate in ms, in three digits, never as a power of ten."""
    return f"{float(f'{seconds * 1e3:.3g}'):,.12g}"


def size(count: int) -> str:
    """Bytes as a reader sees them."""
    unit, scale = next(((u, n) for u, n in (("GiB", 2**30), ("MiB", 2**20)) if count >= n), ("KiB", 2**10))
    return f"{count / scale:,.2f} {unit}" if unit == "GiB" else f"{count / scale:,.1f} {unit}"
