"""Study tables: a study's summary -> its tables, as text that HTML, markdown and terminal share.

Texts here are as they came; whoever shows them escapes them for where they go.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twoclocks.curves import not_bracketed
from twoclocks.study_findings import NOT_TOLD, VERDICTS, published_scale
from twoclocks.units import number, shown_unit

DASH = "–"


@dataclass(frozen=True)
class Table:
    """A table of finished text. Its first column and those that ``words`` names hold words, the others figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""
    definitions: dict[str, str] = field(default_factory=dict)
    words: tuple[int, ...] = ()

    def is_words(self, column: int) -> bool:
        """Does a column hold words?"""
        return column == 0 or column in self.words


GROUPS: dict[str, tuple[str, ...]] = {
    "Requests and throughput": (
        "requests", "requests.ok", "requests.failed", "requests.cancelled", "request_throughput", "output_throughput",
        "stream_throughput.mean", "goodput", "goodput_share",
    ),
    "Time to first token (TTFT)": ("ttft.mean", "ttft.p50", "ttft.p95", "ttft.p99"),
    "Time per output token (TPOT)": ("tpot.mean", "tpot.p50", "tpot.p95", "tpot.p99"),
    "Inter-token latency (ITL), chunk gaps": ("itl.mean", "itl.p50", "itl.p95", "itl.p99"),
    "Request duration (E2E)": ("e2e.mean", "e2e.p50", "e2e.p95", "e2e.p99"),
    "Batches": (
        "batch_latency.mean", "batch_latency.p50", "batch_latency_per_request.mean", "batch_throughput.mean",
    ),
    "Over load": (
        "saturation", "saturation.output_throughput", "saturation.request_throughput", "saturation.goodput",
    ),
    "Memory": (
        "memory.weights", "memory.weights_on_disk", "memory.kv_reserved", "memory.kv_used_peak", "kv_usage_peak",
        "memory.process_rss_peak", "memory.process_pss_peak", "memory.allocator_peak", "memory.gpu_used_peak",
    ),
    "What the server says of the same requests": (
        "server_ttft.mean", "server_ttft.p50", "server_ttft.p95", "server_queue.mean", "server_prefill.mean",
        "server_tpot.mean", "server_e2e.mean", "server_e2e.p50",
    ),
}  # fmt: skip
"""Table -> its figures, a column each where any arm has it."""
SHORT_NAMES = ("mean", "p50", "p95", "p99")


def figure_tables(summary: dict[str, Any]) -> list[Table]:
    """The figures of all arms, a table a group, a row an arm."""
    tables = []
    for title, names in GROUPS.items():
        used = [name for name in names if any(name in arm["figures"] for arm in summary["arms"])]
        arms = [arm for arm in summary["arms"] if any(name in arm["figures"] for name in used)]
        if not used:
            continue
        of_one = len({name.partition(".")[0] for name in used}) == 1 and used[0].partition(".")[2] in SHORT_NAMES
        samples = [next(arm["figures"][name] for arm in arms if name in arm["figures"]) for name in used]
        headings = [
            with_unit(name.partition(".")[2] if of_one else one["label"], one["unit"])
            for name, one in zip(used, samples, strict=True)
        ]
        meanings = {
            meaning: label
            for name in used for arm in arms if name in arm["figures"]
            for meaning, label in [(arm["figures"][name]["definition"], arm["figures"][name]["label"])]
        }  # fmt: skip
        rows = [[arm["name"], *(estimate(arm["figures"].get(name)) for name in used)] for arm in arms]
        definitions = {name_of(label) if of_one else label: meaning for meaning, label in meanings.items()}
        if len(definitions) < len(meanings):  # the same name means different things in different arms
            definitions = {f"{label} ({place})": text for place, (text, label) in enumerate(meanings.items(), 1)}
        tables.append(Table(title, ["", *headings], rows, definitions=definitions))
    return tables


OVERVIEW = {
    "requests.ok": "ok", "requests.failed": "failed", "output_throughput": "tokens/s", "ttft.p50": "TTFT p50",
    "ttft.p95": "p95", "tpot.p50": "TPOT p50", "e2e.mean": "E2E mean", "e2e.p95": "p95", "batch_latency.mean": "batch",
    "saturation.output_throughput": "most tokens/s",
}  # fmt: skip


def overview(summary: dict[str, Any]) -> Table:
    """A row an arm, without intervals: what fits a terminal. Times in ms."""
    used = [name for name in OVERVIEW if any(name in arm["figures"] for arm in summary["arms"])]
    rows = [
        [arm["name"], *(estimate(without_interval(arm["figures"].get(name))) for name in used)]
        for arm in summary["arms"]
    ]
    return Table("Side by side, times in ms", ["", *(OVERVIEW[name] for name in used)], rows)


def without_interval(figure: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same figure without its interval."""
    return None if figure is None else figure | {"low": None, "high": None}


def name_of(label: str) -> str:
    """The label of a figure without its statistic."""
    words = label.split()
    return " ".join(words[:-1]) if words[-1] in SHORT_NAMES else label


def with_unit(label: str, unit: str) -> str:
    """A heading: a label and the unit that is shown, unless it says it already."""
    shown = shown_unit(unit)
    return label if not shown or shown in label or unit == "requests" else f"{label}, {shown}"


def estimate(figure: dict[str, Any] | None) -> str:
    """``12.3 (11.9 .. 12.8)``: a figure and its interval, if it has one."""
    if figure is None or figure["value"] is None:
        return DASH
    return number(figure["value"], figure["unit"]) + ends(figure["low"], figure["high"], figure["unit"])


def ends(low: float | None, high: float | None, unit: str) -> str:
    """`` (11.9 .. 12.8)``; nothing where there is no interval."""
    if low is None or high is None:
        return ""
    shown = " %" if unit == "share" else ""
    first, last = (number(end, unit).removesuffix(" %") for end in (low, high))
    return f" ({first} .. {last}{shown})"


def times(value: float | None, low: float | None, high: float | None) -> str:
    """A ratio: ``3.51 x (3.02 .. 3.98)``."""
    if value is None:
        return DASH
    interval = "" if low is None or high is None else f" ({ratio_text(low)} .. {ratio_text(high)})"
    return f"{ratio_text(value)} x{interval}"


def ratio_text(value: float) -> str:
    """A ratio in three figures at least, never as a power of ten."""
    return f"{value:,.3f}" if value < 1.1 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def claims_table(summary: dict[str, Any]) -> Table | None:
    """What was published, and beside it what was measured here."""
    if not summary["claims"]:
        return None
    headings = [
        "claim", "published", "measured here", "same direction", "published value in the interval", "of", "over",
        "source and conditions",
    ]  # fmt: skip
    rows = []
    for claim in summary["claims"]:
        published = f"{claim['published']:g} {claim['published_unit'] or ('x' if claim['is_ratio'] else '')}".strip()
        measured = f"not measured: {claim['why']}"
        if claim["why"] is None and claim["is_ratio"]:
            measured = times(claim["value"], claim["low"], claim["high"])
        elif claim["why"] is None:
            measured = in_published_unit(claim)
        about = "; ".join(part for part in (claim["source"], claim["conditions"]) if part)
        sides = [side(claim[key], claim) for key in ("of", "over")]
        rows.append(
            [claim["says"], published, measured, direction(claim), yes(claim["holds"]), *sides, about or "not told"]
        )
    note = f"{summary['machine']} Published values stand in the column of that name only."
    return Table("Claims", headings, rows, note, words=(2, 3, 4, 5, 6, 7))


def in_published_unit(claim: dict[str, Any]) -> str:
    """A measured value in the unit of the published one, where that is known; else in ours."""
    scale = published_scale(claim["published_unit"], claim["unit"])
    if scale is None:
        return f"{estimate(claim)} {shown_unit(claim['unit'])}".strip()
    value, *both = (None if claim[key] is None else f"{claim[key] / scale:,.4g}" for key in ("value", "low", "high"))
    interval = f" ({both[0]} .. {both[1]})" if None not in both else ""
    return f"{value}{interval} {claim['published_unit']}".strip()


def side(of: dict[str, Any] | None, claim: dict[str, Any]) -> str:
    """One side of a claim: whose figure, and the figure."""
    if of is None:
        return DASH
    who = ", ".join(part for part in (of["target"], of["variant"]) if part)
    told = f"{claim['figure']} not measured"
    if "value" in of:
        unit = "" if shown_unit(of["unit"]) in of["label"] else shown_unit(of["unit"])
        told = f"{of['label']} {estimate(of)} {unit}".strip()
    return f"{who}: {told}" if who else told


def direction(claim: dict[str, Any]) -> str:
    """Whether the ratio measured here lies on the published one's side of 1."""
    if not claim["is_ratio"] or claim["why"] is not None:
        return DASH
    if claim["same_direction"] is None:
        return "within chance"
    return yes(claim["same_direction"]) + (", but no interval" if claim["low"] is None else "")


def yes(value: bool | None) -> str:
    """yes, no, or a dash."""
    return DASH if value is None else "yes" if value else "no"


def differences_tables(summary: dict[str, Any], names: Sequence[str] | None = None) -> list[Table]:
    """A table a target and variant: against the first target; of all figures that are compared, or of some."""
    tables: dict[tuple[str, str, str], list[list[str]]] = {}
    for row in summary["differences"]:
        if names is not None and row["figure"] not in names:
            continue
        unit = row["unit"]
        apart = number(row["difference"], unit)
        apart = f"+{apart}" if (row["difference"] or 0) > 0 else apart
        cells = [with_unit(row["label"], unit), number(row["first"], unit), number(row["other"], unit)]
        cells += [apart + ends(row["difference_low"], row["difference_high"], unit)]
        cells += [times(row["ratio"], row["ratio_low"], row["ratio_high"])]
        cells += [f"{row['prompts']:,} prompts" if row["prompts"] else "no", row["verdict"]]
        tables.setdefault((row["target"], row["against"], row["variant"]), []).append(cells)
    return [
        Table(
            f"{target} against {against}" + (f", {variant}" if variant else ""),
            ["figure", against, target, "difference", "ratio", "paired", "verdict"],
            rows, words=(5, 6),
        )
        for (target, against, variant), rows in tables.items()
    ]  # fmt: skip


def clock_tables(summary: dict[str, Any]) -> list[Table]:
    """Metric | logged by tool | logged by server, a table an arm."""
    tables = []
    for arm in summary["arms"]:
        rows = [
            [
                with_unit(row["label"], row["unit"]), f"{row['tool_n']:,}", number(row["tool"], row["unit"]),
                DASH if row["server_n"] is None else f"{row['server_n']:,}",
                NOT_TOLD if row["server"] is None else number(row["server"], row["unit"]), row["source"] or DASH,
            ]
            for row in arm["clocks"]
        ]  # fmt: skip
        meanings = {
            f"{row['label'].split()[0]}, {who}": row[key]
            for row in arm["clocks"]
            for who, key in (("tool", "tool_definition"), ("server", "server_definition"))
            if row[key] != NOT_TOLD
        }
        if rows:
            headings = ["metric", "n", "logged by tool", "n", "logged by server", "how the server told it"]
            tables.append(Table(arm["name"], headings, rows, definitions=meanings, words=(5,)))
    return tables


def drift_table(summary: dict[str, Any]) -> Table | None:
    """Every cell in the order of time, with what it measured by itself; where anything was run more than once."""
    if not summary["repeated"]:
        return None
    names = [name for name in summary["followed"] if any(name in row["values"] for row in summary["drift"])]
    headings = ["cell", *(with_unit(label, unit) for label, unit in (summary["followed"][name] for name in names))]
    rows = [
        [
            f"{row['number']}: {', '.join(part for part in (row['target'], row['variant'], repeat(row)) if part)}",
            *(number(row["values"].get(name), summary["followed"][name][1]) for name in names),
        ]
        for row in summary["drift"]
    ]
    return Table("Cells in the order in which they were run", headings, rows)


def repeat(row: dict[str, Any]) -> str:
    """Which repeat a cell is."""
    return f"repeat {row['repeat']}"


def lines_table(summary: dict[str, Any]) -> Table | None:
    """The saturation point of each line of the curves over load."""
    if not summary["lines"]:
        return None
    rows = []
    for line in summary["lines"]:
        told = [row for row in line["levels"] if row.get("achieved") is not None]
        point, unit = line["knee"], line["unit"]
        where = f"{point['low']:.3g} .. {point['high']:.3g} {unit}" if point["reached"] else None
        where = where or not_bracketed(point, max((row["value"] for row in told), default=0.0), unit)
        most = max((row["tokens_per_s"] for row in told if row["tokens_per_s"] is not None), default=None)
        achieved = max((row["achieved"] for row in told), default=None)
        which = repeat(line) if line["repeat"] else ""
        name = ", ".join(part for part in (line["target"], line["variant"], which) if part)
        levels = ", ".join(f"{row['value']:g}" for row in told)
        rows.append([name, levels, where, number(most, "tokens/s"), number(achieved, "requests/s")])
    headings = ["", "levels", "saturation point", "most tokens/s", "most requests/s"]
    meanings = {"saturation point": summary["lines"][0]["knee"]["definition"]}
    return Table("Saturation", headings, rows, definitions=meanings, words=(1, 2))


def sharing_table(summary: dict[str, Any]) -> Table | None:
    """KV cache used by n choices of one request and by n requests."""
    rows = summary["sharing"]
    if not rows:
        return None
    cells = [
        [", ".join(part for part in (row["target"], row["variant"]) if part), str(row["choices"]), str(row["requests"]),
         number(row["used"], row["unit"]), number(row["share_saved"], "share")]
        for row in rows
    ]  # fmt: skip
    used = with_unit("KV cache used, peak", rows[0]["unit"])
    headings = ["", "choices a request", "requests at once", used, "saved against as many requests"]
    meanings = {
        "KV cache used, peak": rows[0]["definition"],
        "saved against as many requests": "1 - used by n choices of one request / used by n requests; not told where n "
        "choices were seen to use less than one alone: the gauge has missed most of them (a beam search is many short "
        "requests to the server)",
    }
    return Table("KV cache shared by the choices of a request", headings, cells, definitions=meanings)


def cells_table(summary: dict[str, Any]) -> Table:
    """What became of every cell."""
    rows = [[cell["folder"], cell["status"], cell["verdict"] or DASH, cell["error"] or ""] for cell in summary["cells"]]
    return Table("Cells", ["folder", "status", "verdict", ""], rows, words=(1, 2, 3))


def targets_table(summary: dict[str, Any]) -> Table:
    """What was run against what, as the runs recorded it."""
    rows = [
        [arm["name"], arm["server"] or DASH, arm["model"] or DASH, arm["load"] or DASH, f"{arm['cells']}"]
        for arm in summary["arms"]
    ]
    return Table("What was run", ["", "server", "model", "load", "cells"], rows, words=(1, 2, 3))


VIOLINS, DRIFT, LOAD, MEMORY = "Client against server", "Order and drift", "Over load", "KV cache and memory"
"""Sections that have plots."""


def sections(summary: dict[str, Any]) -> list[tuple[str, str, Sequence[Table]]]:
    """(title, what to know of it, its tables), in the order of the page, after the claims."""

    def some(*tables: Table | None) -> list[Table]:
        return [table for table in tables if table is not None]

    return [
        (VIOLINS, "", []),
        ("Figures", summary["interval_definition"], figure_tables(summary)),
        ("Against the first target", VERDICTS, differences_tables(summary)),
        (LOAD, "", some(lines_table(summary))),
        (MEMORY, "", some(sharing_table(summary))),
        (DRIFT, summary["order_words"], some(drift_table(summary))),
        ("Metric, logged by tool, logged by server", summary["clocks_words"], clock_tables(summary)),
        ("What was run", summary["machine"], [targets_table(summary), cells_table(summary)]),
    ]
