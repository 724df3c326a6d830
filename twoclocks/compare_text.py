"""Compare, in words: the summary of a comparison -> what the terminal shows."""

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from twoclocks import terminal, units
from twoclocks.errors import plain
from twoclocks.gate import UNKNOWN_ERROR
from twoclocks.rosetta_text import HEADINGS

DIFFERENCES = ("mean", "p50", "p95", "p99")
"""The figures that are compared."""
OTHERS = (
    "Each of our runs by that tool's own definitions (twoclocks rosetta). –: the file does not hold it. No interval: "
    "of a file only the summary is read. No goodput: it does not name the limits that it is of."
)
COLOURS = {"pass": "green", "fail": "red", "not enough data": "yellow", "invalid run": "red"}


def text(summary: dict[str, Any]) -> str:
    """The comparison as the terminal shows it."""
    parts: list[RenderableType] = [_figures_table(summary), Text()]
    if len(summary["sides"]) > 1:
        parts.append(_differences_table(summary))
    parts += [
        Text(f"{run['label']}: {run['verdict']['level']}; {reason['reason']}; {reason['remedy']}.")
        for run in summary["runs"]
        for reason in run["verdict"]["reasons"]
    ]
    parts += [
        Text(f"{run['label']}: {run['partial']}", style="bold yellow") for run in summary["runs"] if run["partial"]
    ]
    found = {one["verdict"] for row in summary["rows"] for one in row["differences"]}
    if "not resolved" in found:
        parts.append(Text("Not resolved: smaller than the instrument's own error at this load."))
    if found - {None}:
        parts.append(Text(summary["many_intervals"]))
    if summary["load_differs"]:
        keys = ", ".join(summary["load_differs"])
        parts.append(Text(f"The runs did not do the same work: {keys} differ.", style="bold"))
    for other in summary["others"]:
        parts += [Text(), _other_table(other)]
    if summary["others"]:
        parts.append(Text(OTHERS, style="dim"))
    if summary["gates"]:
        parts += [Text(), *_gates(summary)]
    return terminal.to_text(Group(*parts))


def percent(ratio: float | None) -> str:
    """A ratio as the difference that it is, in %."""
    return "–" if ratio is None else f"{(ratio - 1) * 100:+,.1f}"


def interval(low: float | None, high: float | None, shown: Callable[[float | None], str]) -> str:
    """Both ends."""
    return "–" if low is None or high is None else f"{shown(low)} .. {shown(high)}"


def _table(title: str) -> Table:
    return Table(title=title, title_style="bold", title_justify="left", show_edge=False, pad_edge=False)


def _figures_table(summary: dict[str, Any]) -> Table:
    table = _table("Side by side, in ms")
    table.add_column("metric", no_wrap=True)
    table.add_column("run")
    for heading in ("n", *DIFFERENCES):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary["rows"]:
        values = [units.number(row[key], "s") for key in DIFFERENCES]
        table.add_row(row["label"] if row["first"] else "", Text(plain(row["run"])), f"{row['n']:,}", *values)
    return table


def _differences_table(summary: dict[str, Any]) -> Table:
    """Of two sides the other one is not named in each row."""
    several = len(summary["sides"]) > 2
    names = [plain(side["name"]) for side in summary["sides"]]
    table = _table(f"Differences {'' if several else f'of {names[1]} '}against {names[0]}")
    table.add_column("metric", no_wrap=True)
    if several:
        table.add_column("run")
    table.add_column("")
    for heading in ("Δ, ms", "95 % interval", "Δ, %", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in summary["rows"]:
        for number, one in enumerate(row["differences"]):
            ends = (
                interval(one["low"], one["high"], units.signed),
                interval(one["ratio_low"], one["ratio_high"], percent),
            )
            who = [Text("" if number else plain(row["run"]))] if several else []
            words = ", ".join(filter(None, [one["verdict"], "paired" if one["paired"] else ""]))
            numbers = (units.signed(one["difference"]), ends[0], percent(one["ratio"]), ends[1])
            table.add_row("" if number else row["label"], *who, one["statistic"], *numbers, words)
    return table


def _other_table(other: dict[str, Any]) -> Table:
    """The result of another tool, and our runs by its definitions."""
    table = _table(f"By the definitions of {other['tool']}")
    table.add_column("")
    table.add_column("")
    for name in (other["name"], *other["runs"]):
        table.add_column(Text(plain(name)), justify="right", overflow="fold")
    before = None
    for row in other["rows"]:
        label = HEADINGS[row["metric"]] if row["metric"] != before else ""
        statistic = "" if row["statistic"] == "value" else row["statistic"]
        table.add_row(label, statistic, *(units.number(value, row["unit"]) for value in (row["theirs"], *row["ours"])))
        before = row["metric"]
    return table


def _gates(summary: dict[str, Any]) -> list[Text]:
    """A line a gate, and below it why, unless it passed."""
    several = len(summary["sides"]) > 2
    rows = [
        [
            one["outcome"].upper(), plain(one["text"]), *([plain(one["other"])] if several else []),
            one["measured_shown"], one["interval_shown"],
        ]
        for one in summary["gates"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [Text("Gates: measured, and the 95 % interval of what is judged", style="bold")]
    for one, cells in zip(summary["gates"], rows, strict=True):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(Text.assemble((padded[0], f"bold {COLOURS[one['outcome']]}"), "  ", "  ".join(padded[1:])))
        if one["outcome"] != "pass":
            why = "; ".join(filter(None, [one["reason"], one["remedy"]]))
            lines.append(Text(f"    {plain(why)}.", style="dim"))
    if any(one["error_unknown"] for one in summary["gates"]):
        lines.append(Text(f"{UNKNOWN_ERROR}."))
    return lines
