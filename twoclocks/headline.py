"""Headline: a summary -> the words and numbers that the report's page shows first, and those of its own tables."""

from collections.abc import Sequence
from typing import Any

from twoclocks.units import held_against, number

SPREAD = {
    "n": "n", "p10": "p10", "p25": "p25", "p50": "p50", "p75": "p75", "p90": "p90", "p95": "p95", "p99": "p99",
    "p99.9": "p99.9",
}  # fmt: skip
WORST = {
    "ttft": ("TTFT, ms", "s"),
    "server_ttft": ("server TTFT, ms", "s"),
    "tpot": ("TPOT, ms", "s"),
    "itl_max": ("longest gap, ms", "s"),
    "e2e": ("E2E, ms", "s"),
    "output_tokens": ("output tokens", "tokens"),
    "prompt_tokens": ("prompt tokens", "tokens"),
    "sent_at": ("sent at, s", "1"),
}
"""Columns of the table of the worst requests: heading, unit."""


def cards(summary: dict[str, Any]) -> list[dict[str, str | None]]:
    """The numbers to see first: value, what it is, its interval, and how it stands to the SLO."""
    figures = summary["figures"]
    failed = f"{figures['failed']['value']:,} failed, {figures['cancelled']['value']:,} cut off"
    left = figures["hung_up"]["value"] + figures["gave_up"]["value"]
    failed += f", {left:,} left by their users" if left else ""
    made = [
        _card(summary, "ok", f"requests ok of {figures['requests']['value']:,} ({failed})"),
        _card(summary, "ttft", "ms TTFT, median", "p50"),
        _card(summary, "ttft", "ms TTFT, p99", "p99"),
        _card(summary, "tpot", "ms per output token (TPOT), median", "p50"),
        _card(summary, "itl", "ms inter-token latency (ITL), p99", "p99"),
        _card(summary, "e2e", "ms for a whole answer (E2E), median", "p50"),
        _card(summary, "output_throughput", "output tokens/s"),
        _card(summary, "request_throughput", "requests/s"),
    ]
    if "goodput_share" in figures:
        slo = summary["slo"]
        card = _card(summary, "goodput_share", "of the requests met the SLO")
        share, needed = held_against(figures["goodput_share"]["value"], slo["required_share"])
        card |= {"value": share, "slo": f"{'✓ reaches' if slo['met'] else '✗ misses'} the {needed} asked for"}
        made.append(card | {"met": "yes" if slo["met"] else "no"})
    return made


def columns(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same numbers of several runs, a row a number; None where a run has none."""
    of_runs = [{card["label"]: card for card in cards(summary)[1:]} for summary in summaries]
    labels = list(dict.fromkeys(label for of_run in of_runs for label in of_run))
    return [{"label": label, "cards": [of_run.get(label) for of_run in of_runs]} for label in labels]


def _card(summary: dict[str, Any], name: str, label: str, key: str = "value") -> dict[str, str | None]:
    figure, unit = summary["figures"][name], summary["figures"][name]["unit"]
    value, limit = figure.get(key), ((summary["slo"] or {}).get("limits") or {}).get(name)
    card: dict[str, str | None] = {"value": number(value, unit), "label": label, "slo": None, "met": None}
    card["interval"] = span(summary, name, "mean" if key == "value" else key)
    if limit is not None and value is not None:
        words = ("within", "✓") if value <= limit else ("above", "✗")
        card |= {"slo": f"{words[1]} {words[0]} the SLO's {limit * 1e3:g} ms", "met": "yes" if value <= limit else "no"}
    return card


def span(summary: dict[str, Any], name: str, statistic: str) -> str:
    """The interval of a figure, both ends; nothing where there is none."""
    told = summary["intervals"].get(name, {}).get(statistic)
    if told is None:
        return ""
    unit = summary["figures"][name]["unit"]
    return f"{number(told['low'], unit)} .. {number(told['high'], unit)}"


def stall_words(told: dict[str, Any]) -> list[str]:
    """What a reader has to bear, a line each."""
    n, wait, waits = told["answers"], told["reading_wait"], told["reading_waits"]
    stalls = "; ".join(
        f"over {row['over'] * 1e3:,.0f} ms: {number(row['share'], 'share')} ({row['answers']:,})"
        for row in told["stalls"]
    )
    lines = [f"Answers with a stall, of {n:,}: {stalls}."]
    if told["longest"] is not None:
        lines.append(f"Longest stall: {number(told['longest'], 's')} ms, in request {told['longest_request_id'][:12]}.")
    pace = told["words_per_s"] * told["tokens_per_word"]
    lines.append(
        f"A reader at {told['words_per_s']:g} words/s, who begins with the first token, waits for words in "
        f"{number(waits['share'], 'share')} of the answers ({waits['answers']:,}): {number(wait['mean'], 's')} ms in "
        f"the mean of all answers, p95 {number(wait['p95'], 's')} ms, at most {number(wait['max'], 's')} ms. "
        f"That is {pace:.3g} tokens/s at {told['tokens_per_word']:.3g} tokens a word ({told['tokens_per_word_from']})."
    )
    return lines
