"""Terminal: a summary -> the text a user sees, and summary.txt: the tables that are drawn there alone."""

import io
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from twoclocks import wording
from twoclocks.errors import plain
from twoclocks.gpu_summary import DEFINITIONS as GPU_DEFINITIONS
from twoclocks.units import bucket, held_against, number, shown_unit, size

WIDTH = 118


def render(summary: dict[str, Any]) -> RenderableType:
    """The whole summary as rich renderables."""
    parts: list[RenderableType] = []
    if summary["partial"]:
        parts.append(Text(summary["partial"], style="bold yellow"))
    parts += [_verdict(summary), _totals(summary), _latencies(summary)]
    if summary["attempts"]:
        parts.append(_attempts(summary["attempts"]))
    if summary["levels"]:
        parts.append(_levels(summary["levels"]))
    if lines := wording.prefix_lines(summary["prefix_cache"]):
        parts.append(_bullets("Prefix cache: what it could know, and what it answered", map(Text, lines)))
    if summary["sessions"]:
        parts.append(_turns(summary))
    if summary["client_vs_server"]:
        parts.append(_client_vs_server(summary["client_vs_server"]))
    parts += [_waterfall(one) for one in summary["waterfall"]]
    if summary["decode"] or summary["stages"]:
        parts.append(_parting(summary["decode"], summary["stages"]))
    if summary["untold"]:
        parts.append(_bullets("What this server does not tell", map(Text, summary["untold"])))
    if summary["server_window"]:
        parts.append(_server_window(summary["server_window"], summary["scraped"]))
    if summary["log_series"]:
        parts.append(_log_series(summary["log_series"]))
    if summary["gpu"]:
        parts.append(_gpu(summary["gpu"]))
    if summary["memory"]:
        parts.append(_memory(summary["memory"]))
    if summary["checks"]:
        parts.append(_bullets("Checks", _check_lines(summary["checks"])))
    if notes := [*summary["notes"], *summary["side_effects"]]:
        parts.append(_bullets("Notes", (Text(plain(note)) for note in notes)))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


COLOURS = {"VALID": "green", "SUSPECT": "yellow", "INVALID": "red"}


def _verdict(summary: dict[str, Any]) -> RenderableType:
    """The verdict in a word, and each reason with what to do about it."""
    level, reasons = summary["verdict"]["level"], summary["verdict"]["reasons"]
    lines = [Text.assemble(("Verdict: ", "bold"), (level, f"bold {COLOURS[level]}"))]
    lines += [
        Text.assemble("  ", (reason["level"], COLOURS[reason["level"]]), f" {reason['reason']}; {reason['remedy']}.")
        for reason in reasons
    ]
    return Group(*lines, Text("  " + wording.instrument(summary), style="dim"))


def to_text(renderable: RenderableType) -> str:
    """What `render` made, as plain text of fixed width."""
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _totals(summary: dict[str, Any]) -> Table:
    figures, target = summary["figures"], summary["target"]
    table = Table(title="Load test results", title_style="bold", title_justify="left", show_header=False, box=None)
    table.add_column(min_width=36)
    table.add_column(overflow="fold")
    table.add_row("Run", Text(plain(summary["run"])))
    who = [target.get(key) for key in ("name", "server", "server_version", "api", "model", "url")]
    table.add_row("Target", Text(plain(", ".join(str(part) for part in dict.fromkeys(who) if part))))
    table.add_row("Test duration", f"{figures['duration']['value'] or 0:,.2f} s")
    table.add_row("Total requests", number(figures["requests"]["value"], "requests") + wording.warmup_words(summary))
    table.add_row("Ok", number(figures["ok"]["value"], "requests"))
    failed = str(sum(row["count"] for row in summary["errors"]))
    table.add_row(
        "Failed or cut off", Text(": ".join(filter(None, [failed, ", ".join(map(_error, summary["errors"]))])))
    )
    if words := wording.left_words(figures):
        table.add_row("Left by their users", words)
    if "due" in figures:
        table.add_row("Due, and not sent", wording.offered(figures))
    if "batches" in figures:
        table.add_row("Batches", number(figures["batches"]["value"], "requests"))
    table.add_row(wording.TOTALS["request_throughput"], wording.both(figures, "request_throughput"))
    table.add_row(wording.TOTALS["output_throughput"], wording.both(figures, "output_throughput"))
    table.add_row("Output tokens", number(figures["output_tokens"]["value"], "tokens"))
    table.add_row("Prompt tokens", number(figures["prompt_tokens"]["value"], "tokens"))
    if "goodput" in figures:
        rate, slo = number(figures["goodput"]["value"], "requests/s"), summary["slo"]
        share, needed = held_against(figures["goodput_share"]["value"], slo["required_share"])
        table.add_row(wording.GOODPUT["goodput"], f"{rate} ({share} of the requests)")
        table.add_row("SLO", f"{'met' if slo['met'] else 'MISSED'} ({needed} of the requests must meet it)")
    return table


def _error(row: dict[str, Any]) -> str:
    where = " in mid-stream" if row["status"] == "truncated" else ""
    return plain(f"{row['count']} {row['kind']}{where}" + (f" ({row['example'][:80]})" if row["example"] else ""))


def _latencies(summary: dict[str, Any]) -> Table:
    table = Table(title=wording.seen(summary), title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", min_width=36)
    for heading in ("unit", "n", "mean", "p50", "p95", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, label in wording.shown_labels(summary["figures"]).items():
        figure = summary["figures"][name]
        values = [number(figure.get(key), figure["unit"]) for key in ("mean", "p50", "p95", "p99", "max")]
        table.add_row(label, shown_unit(figure["unit"]), f"{figure['n']:,}", *values)
    return table


def _levels(levels: list[dict[str, Any]]) -> RenderableType:
    remark = Text(wording.LEVELS_REMARK, style="dim")
    return Group(_counted("Level by level", wording.LEVEL_HEADINGS, map(wording.level_row, levels)), remark)


def _attempts(told: dict[str, Any]) -> RenderableType:
    rows = map(wording.attempt_row, told["rows"])
    return Group(_counted(wording.ATTEMPTS_TITLE, wording.ATTEMPT_HEADINGS, rows), Text(wording.attempt_words(told)))


def _turns(summary: dict[str, Any]) -> RenderableType:
    title, rows = "Turn by turn, with the history in the prompt", map(wording.turn_row, summary["turns"])
    remark = Text(wording.session_words(summary["sessions"]), style="dim")
    return Group(_counted(title, wording.TURN_HEADINGS, rows), remark)


def _counted(title: str, headings: Iterable[str], rows: Iterable[list[str]]) -> Table:
    """A table of numbers alone."""
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _client_vs_server(rows: list[dict[str, Any]]) -> RenderableType:
    sources = ", ".join(dict.fromkeys(wording.told_by(row) for row in rows))
    title = f"Logged by tool and by server: the same requests, one by one ({sources}), in ms"
    table = Table(title=title, title_style="bold", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("metric", "n", "tool", "server", "difference"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    table.add_column("what differs in definition")
    for row in rows:
        told = "" if row["statistic"] == "p50" else row["what_differs"]
        values = [number(row[key], "s") for key in ("client", "server", "difference")]
        values[-1] += wording.resolved(row)
        last = row["statistic"] == "p50"
        table.add_row(wording.row_name(row, rows), f"{row['n']:,}", *values, told, end_section=last)
    clocks = {
        (row["metric"], wording.told_by(row)): row["server_definition"] for row in rows if row["client"] is not None
    }
    lines = (
        Text.assemble((f"{wording.SHORT[metric]} ({who}): ", "bold"), text) for (metric, who), text in clocks.items()
    )
    return Group(table, _bullets("The server's clock, of single requests", lines))


def _waterfall(waterfall: dict[str, Any]) -> RenderableType:
    """A row a part; parts whose mean is the whole's, percentiles each one's own."""
    who = f"{waterfall['n']:,} requests, {waterfall['how']} ({wording.told_by(waterfall)})"
    title = f"Where the time to the first token went: {who}, in ms"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", min_width=30)
    for heading in ("mean", "share", "p50", "p95", "p99", "negative in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for bar in waterfall["bars"]:
        values = [number(bar[key], "s") for key in ("p50", "p95", "p99")]
        below = f"{bar['negative']:,} (to {number(bar['least'], 's')})" if bar["negative"] else ""
        table.add_row(plain(bar["label"]), number(bar["mean"], "s"), number(bar["share"], "share"), *values, below)
    clocks = (
        Text.assemble((f"{plain(bar['label'])}: ", "bold"), plain(bar["definition"]), ".") for bar in waterfall["bars"]
    )
    remark = Text(wording.ADD_UP, style="dim")
    words = Text(plain(waterfall["words"]), style="bold")
    return Group(Text(title, style="bold"), table, words, remark, _bullets("The parts", clocks))


def _parting(decodes: list[dict[str, Any]], stages: list[dict[str, Any]]) -> RenderableType:
    """Where client and server part after the first token, and what lies between neighbouring stages."""
    lines = [
        Text(
            f"{one['words']} ({wording.told_by(one)}; {one['client']['n']:,} requests; "
            f"server: {one['server_definition']}.)"
        )
        for one in decodes
    ]
    for row in stages:
        lines += [Text(plain(wording.stage_words(row))), Text("  " + plain(wording.stage_clocks(row)), style="dim")]
    return _bullets("Where client and server part", lines)


def _server_window(rows: list[dict[str, Any]], scraped: dict[str, Any]) -> RenderableType:
    title = "Means over the scraped window: the server's /metrics (all that it answered) beside the tool's, in ms"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")  # what does not fit is wrapped here and at the percentiles: a cut number would mislead
    for heading in ("n", "tool mean", "n", "server mean", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p in (50, 99):
        table.add_column(f"server p{p}")
    for row in rows:
        table.add_row(
            wording.metric_name(row),
            f"{row['client_n']:,}" if row["client_n"] else "–",
            number(row["client_mean"], "s"),
            f"{row['server_n']:,}",
            number(row["server_mean"], "s"),
            number(row["difference"], "s"),
            *(bucket(row[f"server_p{p}"]) for p in (50, 99)),
        )
    remarks = [wording.scraped_span(scraped), "Percentiles are read from buckets: lower .. upper bound (~estimate)."]
    if any(row["client_n"] and row["difference"] is None for row in rows):
        remarks.append("No difference where the two sides do not have the same number of observations.")
    clocks = (
        Text.assemble(
            (f"{wording.metric_name(row)}: ", "bold"), row["server_definition"], ".", (wording.caveats(row), "yellow")
        )
        for row in rows
    )
    return Group(table, Text(" ".join(remarks), style="dim"), _bullets("The server's clock", clocks))


def _log_series(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(
        title="What the server's log says of the measuring window, line by line", title_style="bold",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for heading in ("series", "unit", "lines", "mean", "max"):
        table.add_column(heading, justify="left" if heading in ("series", "unit") else "right", no_wrap=True)
    for row in rows:
        unit = wording.series_unit(row)
        values = [number(row[key], unit) for key in ("mean", "max")]
        table.add_row(Text(plain(wording.series_name(row))), shown_unit(row["unit"]), f"{row['n']:,}", *values)
    meanings = dict.fromkeys((wording.series_words(row), row["definition"]) for row in rows)
    lines = (Text.assemble((f"{name}: ", "bold"), meaning, ".") for name, meaning in meanings)
    return Group(table, Text(wording.LOG_WEIGHT, style="dim"), _bullets("What the log's figures mean", lines))


def _gpu(gpus: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="GPUs in the measuring window", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for heading in wording.GPU_HEADINGS:
        table.add_column(heading, justify="left" if heading in ("GPU", "held down") else "right")
    for gpu in wording.gpu_rows(gpus):
        table.add_row(*map(Text, wording.gpu_row(gpu)))
    meanings = wording.GPU_HEADINGS | {"J an output token": GPU_DEFINITIONS["joules_per_output_token"]}
    lines = (Text.assemble((f"{heading}: ", "bold"), meaning, ".") for heading, meaning in meanings.items())
    return Group(table, Text(wording.gpu_words(gpus), style="bold"), _bullets("What the GPU figures mean", lines))


def _memory(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Memory", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "size", "told by, and what it is"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for row in rows:
        table.add_row(
            wording.memory_name(row), size(row["bytes"]), Text(f"{plain(row['source'])}: {plain(row['definition'])}")
        )
    return table


def _check_lines(checks: list[dict[str, Any]]) -> Iterable[Text]:
    marks = {True: ("yes  ", "green"), False: ("NO   ", "bold red"), None: ("?    ", "dim")}
    for check in checks:
        mark, style = marks[check["passed"]]
        yield Text.assemble((mark, style), check["text"])


def _bullets(title: str, lines: Iterable[Text]) -> RenderableType:
    return Group(Text(title, style="bold"), *(Padding(line, (0, 0, 0, 2)) for line in lines))
