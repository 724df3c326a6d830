"""Study findings: arms and their figures -> differences against the first target, claims, clocks, answers. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from twoclocks import intervals
from twoclocks.clocks import CLOCKS
from twoclocks.experiment import Claim, Where
from twoclocks.metrics import Floats, definition
from twoclocks.study import Study
from twoclocks.study_arms import Arm, Pooled
from twoclocks.study_figures import LATENCIES, Figure, by_clock, clocks, difference, ratio

Figures = Mapping[str, Figure]
COMPARED = (
    "ttft.mean", "ttft.p50", "ttft.p95", "tpot.mean", "itl.p50", "e2e.mean", "e2e.p50", "e2e.p95", "batch_latency.mean",
    "output_throughput", "request_throughput", "batch_throughput.mean", "saturation", "saturation.output_throughput",
    "memory.weights", "memory.kv_reserved", "memory.kv_used_peak", "kv_usage_peak", "memory.process_rss_peak",
)  # fmt: skip
SAME = 0.05
"""By how much a ratio may be off 1, to either side, for two figures to be called equivalent."""
VERDICTS = (
    "Ratio: this target / the first one. Paired: over the prompts that both answered, each draw with the same prompts "
    "on both sides. Not resolved: the difference is within the instrument's own error at this load. Equivalent: the "
    f"90 % interval of the ratio lies within a factor of {1 + SAME:g} of 1 (two one-sided tests at 5 %). Within "
    "chance: the 95 % interval holds 1. No interval: too few requests, or a figure that a run has only once."
)


def differences(arms: Sequence[Arm], pools: Sequence[Pooled], figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """A row a figure, a variant, and a target that is not the first of which there are figures."""
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(arm.variant for arm in arms):
        places = [place for place, arm in enumerate(arms) if arm.variant == variant and figures[place]]
        for first, other in ((places[0], other) for other in places[1:]):
            for name in COMPARED:
                if name in figures[first] and name in figures[other]:
                    row = _difference(name, *(((figures[place][name]), pools[place]) for place in (first, other)))
                    row |= {"variant": variant, "target": arms[other].target, "against": arms[first].target}
                    bar = max(_error_bar(arms[place], name) for place in (first, other))
                    rows.append(row | {"verdict": _verdict(row, figures[other][name], bar)})
    return rows


def against(
    name: str, first: tuple[Figure, Pooled], other: tuple[Figure, Pooled], level: float = 0.95
) -> tuple[intervals.Interval | None, int | None]:
    """(other / first with its interval, prompts if it is paired); None where a side has too few values."""
    metric, _, statistic = name.partition(".")
    if metric in LATENCIES and not (in_batches(first[1]) or in_batches(other[1])):
        sides = by_prompt(first[1].ok, metric), by_prompt(other[1].ok, metric)
        pairs = intervals.paired_ratio(*sides, statistic, level=level)
        if pairs is not None:
            return pairs, pairs.n
    return ratio(first[0], other[0], level), None


def in_batches(pool: Pooled) -> bool:
    """Whether chance befell several requests together: then each prompt's difference is not one by itself."""
    return bool(pool.measured.duplicated(["repeat", "drawn_with"]).any())


def _difference(name: str, first: tuple[Figure, Pooled], other: tuple[Figure, Pooled]) -> dict[str, Any]:
    (a, pool), (b, other_pool) = first, other
    metric, _, statistic = name.partition(".")
    times, prompts = against(name, first, other)
    narrow, _ = against(name, first, other, 0.9)
    if prompts is None:
        apart = difference(a, b)
    else:
        apart = intervals.paired_difference(by_prompt(pool.ok, metric), by_prompt(other_pool.ok, metric), statistic)
    minus = over = None
    if a.value is not None and b.value is not None:
        minus, over = b.value - a.value, b.value / a.value if a.value else None
    return {
        "figure": name, "label": b.label, "unit": b.unit, "definition": b.definition, "first": a.value,
        "other": b.value, "prompts": prompts,
        "difference": apart.estimate if apart else minus,
        "difference_low": apart.low if apart else None, "difference_high": apart.high if apart else None,
        "ratio": times.estimate if times else over,
        "ratio_low": times.low if times else None, "ratio_high": times.high if times else None,
        "equivalence": intervals.equivalent(narrow, SAME) if narrow else None,
    }  # fmt: skip


def by_prompt(ok: pd.DataFrame, metric: str) -> list[dict[str, Floats]]:
    """Prompt -> the values of the requests with it, a repeat each: what these scatter belongs in the interval."""
    return [
        {str(prompt): values.to_numpy(dtype=np.float64) for prompt, values in rows.groupby("prompt_id")[metric]}
        for _, rows in ok.groupby("repeat")
    ]


def _error_bar(arm: Arm, name: str) -> float:
    """The instrument's own error of a figure, seconds; 0 where it was not measured or is none of time."""
    return arm.error_bars.get(name.partition(".")[0], 0.0)


def _verdict(row: Mapping[str, Any], figure: Figure, bar: float) -> str:
    low, high, apart = row["ratio_low"], row["ratio_high"], row["difference"]
    if apart is not None and bar and abs(apart) <= bar:
        return "not resolved"
    if low is None or high is None:
        return "no interval"
    if row["equivalence"] == "equivalent":
        return "equivalent"
    if low <= 1 <= high:
        return "within chance"
    more, less = ("slower", "faster") if figure.is_duration else ("more", "less")
    return more if low > 1 else less


def claims(
    told: Sequence[Claim], arms: Sequence[Arm], pools: Sequence[Pooled], figures: Sequence[Figures], study: Study
) -> list[dict[str, Any]]:
    """A row a claim: what was published, apart from it what was measured here, and how the two stand to each other."""
    places = {(arm.target, arm.variant): place for place, arm in enumerate(arms)}
    skipped = {one.target: one.why for one in study.skipped}
    rows: list[dict[str, Any]] = []
    for claim in told:
        row: dict[str, Any] = {
            "says": claim.says, "figure": claim.figure, "source": claim.source, "conditions": claim.conditions,
            "published": claim.published, "published_unit": claim.unit, "is_ratio": claim.over is not None,
        }  # fmt: skip
        row |= dict.fromkeys(("of", "over", "value", "low", "high", "unit", "label", "same_direction", "holds", "why"))
        rows.append(row)
        sides: list[tuple[Figure, Pooled]] = []
        for key, where in (("of", claim.of), ("over", claim.over)):
            if where is None:
                continue
            place = places.get((where.target, where.variant))
            found = figures[place].get(claim.figure) if place is not None else None
            row[key] = {"target": where.target, "variant": where.variant}
            if place is None or found is None or found.value is None:
                why = _why_not(where, claim.figure, place, arms, figures, study, skipped)
                row["why"] = "; ".join(filter(None, (row["why"], why)))
                continue
            row[key] |= found.told()
            sides.append((found, pools[place]))
        if row["why"] is None:
            row |= _measured(claim, sides)
    return rows


def _measured(claim: Claim, sides: Sequence[tuple[Figure, Pooled]]) -> dict[str, Any]:
    of, _ = sides[0]
    found: dict[str, Any] = {"label": of.label, "value": of.value, "unit": of.unit}
    within = of.interval
    scale = published_scale(claim.unit, of.unit)
    if claim.over is not None:
        below, _ = sides[1]
        if not below.value or of.value is None:
            return found | {"value": None, "unit": None, "why": "the figure that it is set against is 0"}
        (within, _), scale = against(claim.figure, sides[1], sides[0]), 1.0
        found |= {"value": within.estimate if within else of.value / below.value, "unit": "x"}
        decided = within is None or not within.low <= 1 <= within.high
        found["same_direction"] = bool((found["value"] > 1) == (claim.published > 1)) if decided else None
    if within is not None:
        found |= {"low": within.low, "high": within.high}
        found["holds"] = None if scale is None else bool(within.low <= claim.published * scale <= within.high)
    return found


UNITS = {
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "seconds": 1.0},
    "tokens/s": {"tokens/s": 1.0, "tok/s": 1.0, "token/s": 1.0},
    "requests/s": {"requests/s": 1.0, "req/s": 1.0},
    "share": {"share": 1.0, "": 1.0, "%": 0.01},
    "bytes": {"bytes": 1.0, "B": 1.0, "MiB": 2.0**20, "GiB": 2.0**30, "MB": 1e6, "GB": 1e9},
    "requests": {"requests": 1.0, "": 1.0},
}


def published_scale(published: str, measured: str) -> float | None:
    """By what a published value is multiplied to stand in a measured unit; None for a unit that is not known."""
    return UNITS.get(measured, {}).get(published.strip())


def _why_not(
    where: Where, figure: str, place: int | None, arms: Sequence[Arm], figures: Sequence[Figures], study: Study,
    skipped: Mapping[str, str],
) -> str:  # fmt: skip
    """Why a figure that a claim needs is not there."""
    who = ", ".join(part for part in (where.target, where.variant) if part) or study.name
    if where.target in skipped:
        return f"{who} was skipped: {skipped[where.target]}"
    if place is None:
        return f"the study has no cell {who}"
    if not arms[place].cells:
        errors = [
            cell.error or f"it is {cell.status}"
            for cell in study.cells
            if (cell.target, cell.variant) == (where.target, where.variant)
        ]
        return f"{who} has no finished cell: {errors[-1] if errors else 'none was begun'}"
    return f"{who} does not tell {figure}"


NOT_TOLD = "not told"


def two_clocks(arm: Arm, pool: Pooled) -> list[dict[str, Any]]:
    """The same metric by both clocks: of the same requests one by one where the server tells of single requests.

    Else the mean over the scraped window by its /metrics, weighted by its observations over all repeats; else the
    client's alone.
    """
    rows: list[dict[str, Any]] = []
    for metric, (label, function) in LATENCIES.items():
        clock = clocks(pool.ok, metric)
        told = pool.ok if clock is None else by_clock(pool.ok, metric, clock)
        told = told[told[metric].notna()]
        if told.empty:
            continue
        window = _window(arm, metric) if clock is None else None
        for statistic in ("mean", "p50", "p95", "p99"):
            reduce = intervals.STATISTICS[statistic]
            row: dict[str, Any] = {
                "metric": metric, "label": f"{label} {statistic}", "unit": "s", "tool_n": len(told),
                "tool": float(reduce(told[metric])), "server_n": None, "server": None, "source": None,
                "server_definition": NOT_TOLD, "tool_definition": definition(function),
            }  # fmt: skip
            if clock is not None:
                row |= {"server_n": len(told), "server": float(reduce(told[f"server_{metric}"]))}
                row |= {
                    "source": f"{', '.join(clock)}; the same requests",
                    "server_definition": CLOCKS[clock][metric].text,
                }
            elif window is not None and statistic == "mean":
                row |= window
            rows.append(row)
    if pool.gaps.seconds.size and (window := _window(arm, "itl")):
        gaps = pool.gaps.seconds
        row = {"metric": "itl", "label": "ITL mean", "unit": "s", "tool_n": len(gaps), "tool": float(gaps.mean())}
        rows.append(row | {"tool_definition": "chunk gaps of the requests that ended ok"} | window)
    return rows


def _window(arm: Arm, metric: str) -> dict[str, Any] | None:
    """The mean by the server's /metrics over the scraped windows of all repeats: what it counted / how often."""
    rows = [
        row for summary in arm.summaries for row in summary["server_window"]
        if row["metric"] == metric and row["server_n"] and row["server_mean"] is not None
    ]  # fmt: skip
    if not rows or len({row["server_definition"] for row in rows}) > 1:
        return None
    count = sum(row["server_n"] for row in rows)
    return {
        "server_n": count,
        "server": sum(row["server_n"] * row["server_mean"] for row in rows) / count,
        "source": "/metrics over the scraped window; all that it answered, warm-up perhaps too",
        "server_definition": rows[0]["server_definition"],
    }


def answers(arms: Sequence[Arm], pools: Sequence[Pooled]) -> list[dict[str, Any]]:
    """Prompt by prompt the answers of two targets side by side, where they were kept; of each the first repeat's.

    Latencies are means over all answers to the prompt; ``differ_at``: the first character in which they differ.
    """
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(arm.variant for arm in arms):
        places = [place for place, arm in enumerate(arms) if arm.variant == variant and arm.runs]
        if len(places) != 2:
            continue
        kept = [pools[place].ok[pools[place].ok["output_text"].notna()] for place in places]
        common = [prompt for prompt in dict.fromkeys(kept[0]["prompt_id"]) if prompt in set(kept[1]["prompt_id"])]
        for prompt in common:
            one, two = (table[table["prompt_id"] == prompt] for table in kept)
            texts = [str(table["output_text"].iloc[0]) for table in (one, two)]
            e2e = [float(table["e2e"].mean()) for table in (one, two)]
            values = [table["e2e"].to_numpy(dtype=np.float64) for table in (one, two)]
            apart = intervals.difference([values[0]], [values[1]], "mean")
            rows.append(
                {
                    "variant": variant,
                    "prompt_id": prompt,
                    "targets": [arms[place].target for place in places],
                    "answers": texts,
                    "distinct": [int(table["output_text"].nunique()) for table in (one, two)],
                    "n": [len(one), len(two)],
                    "differ_at": differ_at(*texts),
                    "e2e": e2e,
                    "difference": e2e[1] - e2e[0],
                    "difference_low": apart.low if apart else None,
                    "difference_high": apart.high if apart else None,
                    "ratio": e2e[1] / e2e[0] if e2e[0] else None,
                    "ttft": [float(table["ttft"].mean()) for table in (one, two)],
                    "output_tokens": [float(table["output_tokens"].mean()) for table in (one, two)],
                }
            )
    return rows


def differ_at(one: str, other: str) -> int | None:
    """The place of the first character in which two texts differ; None if they are the same."""
    if one == other:
        return None
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
