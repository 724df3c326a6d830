"""The Rosetta table in words: its rows in summary.json -> what the terminal, the report and a markdown file show."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from twoclocks import units

Rows = Sequence[dict[str, Any]]

HEADINGS = {
    "ttft": "TTFT, ms",
    "itl": "ITL, ms",
    "tpot": "TPOT, ms",
    "e2e": "E2E, ms",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "goodput": "goodput, requests/s",
}
REMARK = (
    "The same arrivals, by each tool's own definitions. p50 and p99; a rate has one value. Empty: the tool reports no "
    "such figure. –: it does, but not of these arrivals. What a tool's own client would add is in none of them."
)
NONE = "No other tool could tell of this run: it ran an engine without a server."


def cells(row: dict[str, Any], metric: str) -> list[str]:
    """p50 and p99 of a metric, or its rate, as shown; nothing where the tool does not report it."""
    figure = row["figures"].get(metric) or {}
    return [units.number(figure[key], figure["unit"]) for key in ("p50", "p99", "value") if key in figure]


def columns(rows: Rows) -> list[str]:
    """The metrics that are shown: those that any tool has. Without an SLO there is no goodput."""
    return [metric for metric in HEADINGS if any(metric in row["figures"] for row in rows)]


def render(rows: Rows) -> RenderableType:
    """The table as the terminal shows it: a row a tool, and below it in a line why its figures differ."""
    if not rows:
        return Text(NONE)
    table = Table(title="Rosetta: one run, by each tool's definitions", title_style="bold", title_justify="left")
    table.box, table.show_edge, table.pad_edge = None, False, False
    table.add_column("", no_wrap=True)
    for metric in columns(rows):
        table.add_column(HEADINGS[metric].replace(", ", "\n").replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        shown = [" / ".join(cells(row, metric)) for metric in columns(rows)]
        table.add_row(Text(row["tool"], style="bold"), *shown)
    why = [Text.assemble((f"{row['tool']}: ", "bold"), row["why"]) for row in rows]
    return Group(table, Text(), *why, Text(), Text(REMARK, style="dim"))


def markdown(rows: Rows) -> str:
    """The table in GitHub's markdown, with why the figures differ in its last column."""
    if not rows:
        return NONE + "\n"
    metrics = columns(rows)
    lines = [
        " | ".join(["tool", *(HEADINGS[metric] for metric in metrics), "why it differs"]),
        " | ".join(["---", *("---:" for _ in metrics), "---"]),
    ]
    for row in rows:
        shown = [" / ".join(cells(row, metric)) for metric in metrics]
        lines.append(" | ".join([row["tool"], *shown, row["why"]]))
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{REMARK}\n"
