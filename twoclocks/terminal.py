"""Terminal: a summary -> the text a user sees, and summary.txt. Units are formatted here and nowhere else."""

import io
import math
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from twoclocks.errors import plain
from twoclocks.gpu_summary import DEFINITIONS as GPU_DEFINITIONS

WIDTH = 118
LABELS = {
    "ttft": "Time to first token (TTFT)",
    "stream_throughput": "Token throughput of a request",
    "itl": "Inter-token latency (ITL), chunk gaps",
    "itl_per_token": "Inter-token latency (ITL), per token",
    "tpot": "Time per output token (TPOT)",
    "e2e": "Request duration (E2E)",
    "batch_latency": "Batch latency: first sent, last ended",
    "batch_latency_per_request": "Batch latency / requests of the batch",
    "batch_throughput": "Output tokens/s of a batch",
    # open loop
    "send_lateness": "Send lateness: sent after it was due",
    "ttft_from_intended": "TTFT from when it was due",
    "e2e_from_intended": "E2E from when it was due",
}
TOTALS = {
    "requests": "Requests",
    "ok": "Ok",
    "failed": "Failed",
    "cancelled": "Cut off at the end",
    "hung_up": "Hung up on, as drawn",
    "gave_up": "Given up for want of a first token",
    "duration": "Test duration",
    "request_throughput": "Requests/s",
    "output_throughput": "Output tokens/s",
}
GOODPUT = {"goodput": "Goodput (requests/s)", "goodput_share": "Goodput (share of the requests)"}
GAUGE_LABELS = {
    "load": "Load",
    "users": "users",
    "in_flight": "requests in flight",
    "server_requests": "Requests in the server",
    "running": "running",
    "waiting": "waiting",
    "kv_cache_usage": "KV cache used",
}
SHORT = {
    "ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E", "time_per_token": "time per token",
    "tokenize": "template, tokenize",
} | {name: name for name in ("validation", "queue", "prefill", "held", "decode", "inference")}  # fmt: skip


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
    if lines := prefix_lines(summary["prefix_cache"]):
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
    return Group(*lines, Text("  " + instrument(summary), style="dim"))


def is_in_process(summary: dict[str, Any]) -> bool:
    """Did it run an engine without a server?"""
    return bool(summary["target"].get("api") == "in-process")


def seen(summary: dict[str, Any]) -> str:
    """The heading over the latencies: whose clock they are."""
    return "As the engine's process stamped it, step by step" if is_in_process(summary) else "As the client saw it"


def instrument(summary: dict[str, Any]) -> str:
    """The instrument's own error at about this load, in words."""
    told: dict[str, Any] | None = summary["instrument"]
    if is_in_process(summary):
        return "Steps are stamped where they are made; no network and no reader lies between, whose error would count"
    if told is None:
        return "The instrument's own error at this load was not measured here: twoclocks calibrate --like RUN"
    bars = ", ".join(
        f"{SHORT[name]} {seconds * 1e3:.2g} ms" for name, seconds in told["error_bars"].items() if name in SHORT
    )
    load = f"{told['streams']:.0f} streams, {told['chunks_per_s']:,.0f} chunks/s"
    return f"The instrument's own error at about this load ({load}; p99): {bars}"


def resolved(row: dict[str, Any]) -> str:
    """What to add to a difference that is smaller than the instrument's own error."""
    return " (not resolved)" if row.get("resolved") is False else ""


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
    table.add_row("Total requests", number(figures["requests"]["value"], "requests") + warmup_words(summary))
    table.add_row("Ok", number(figures["ok"]["value"], "requests"))
    failed = str(sum(row["count"] for row in summary["errors"]))
    table.add_row(
        "Failed or cut off", Text(": ".join(filter(None, [failed, ", ".join(map(_error, summary["errors"]))])))
    )
    if words := left_words(figures):
        table.add_row("Left by their users", words)
    if "due" in figures:
        table.add_row("Due, and not sent", offered(figures))
    if "batches" in figures:
        table.add_row("Batches", number(figures["batches"]["value"], "requests"))
    table.add_row(TOTALS["request_throughput"], both(figures, "request_throughput"))
    table.add_row(TOTALS["output_throughput"], both(figures, "output_throughput"))
    table.add_row("Output tokens", number(figures["output_tokens"]["value"], "tokens"))
    table.add_row("Prompt tokens", number(figures["prompt_tokens"]["value"], "tokens"))
    if "goodput" in figures:
        rate, share = (
            number(figures["goodput"]["value"], "requests/s"),
            number(figures["goodput_share"]["value"], "share"),
        )
        table.add_row(GOODPUT["goodput"], f"{rate} ({share} of the requests)")
        slo = summary["slo"]
        needed = f"{number(slo['required_share'], 'share')} of the requests must meet it"
        table.add_row("SLO", f"{'met' if slo['met'] else 'MISSED'} ({needed})")
    return table


def both(figures: dict[str, Any], name: str) -> str:
    """A throughput in the measuring window, and over the whole run."""
    window, run = (number(figures[key]["value"], figures[key]["unit"]) for key in (name, f"{name}_run"))
    return f"{window} in the measuring window; {run} from the first request to the last token"


def left_words(figures: dict[str, Any]) -> str:
    """How many requests their users left; nothing where none did."""
    hung_up, gave_up = (figures[name]["value"] for name in ("hung_up", "gave_up"))
    if not hung_up and not gave_up:
        return ""
    return f"{hung_up:,} hung up on, as drawn; {gave_up:,} given up for want of a first token"


def offered(figures: dict[str, Any]) -> str:
    """What was due in an open loop, beside what could not leave."""
    due, unsent = (number(figures[name]["value"], "requests") for name in ("due", "not_sent"))
    return f"{due} due ({number(figures['offered_rate']['value'], 'requests/s')} requests/s offered), {unsent} not sent"


def warmup_words(summary: dict[str, Any]) -> str:
    """What went before the measuring window; nothing where nothing did."""
    count, told = summary["figures"]["warmup"]["value"], summary["warmup"]
    if not count:
        return ""
    if told is None:
        return f" (and {count:,} to warm up)"
    settled = {None: "", True: ", until TTFT had settled", False: "; TTFT had NOT settled"}[told["stable"]]
    return f" (and {count:,} to warm up, in {told['seconds']:.1f} s{settled})"


def _error(row: dict[str, Any]) -> str:
    where = " in mid-stream" if row["status"] == "truncated" else ""
    return plain(f"{row['count']} {row['kind']}{where}" + (f" ({row['example'][:80]})" if row["example"] else ""))


def shown_labels(figures: dict[str, Any]) -> dict[str, str]:
    """The rows of the client's table: those of LABELS that this run has."""
    return {name: label for name, label in LABELS.items() if name in figures}


def _latencies(summary: dict[str, Any]) -> Table:
    table = Table(title=seen(summary), title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", min_width=36)
    for heading in ("unit", "n", "mean", "p50", "p95", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, label in shown_labels(summary["figures"]).items():
        figure = summary["figures"][name]
        values = [number(figure.get(key), figure["unit"]) for key in ("mean", "p50", "p95", "p99", "max")]
        table.add_row(label, shown_unit(figure["unit"]), f"{figure['n']:,}", *values)
    return table


LEVEL_HEADINGS = {
    "users": "Locust users while the level lasted",
    "s": "how long it lasted, in seconds",
    "requests": "sent while it lasted",
    "ok": "of these, those that ended ok",
    "tokens/s": "tokens that arrived while it lasted / its length",
    "TTFT p50, ms": "of the requests sent while it lasted",
    "TTFT p95, ms": "of the requests sent while it lasted",
    "TPOT p50, ms": "of the requests sent while it lasted",
}
"""Columns of the table of levels -> what they mean."""


def level_row(level: dict[str, Any]) -> list[str]:
    """The cells of one entry of ``levels``, as LEVEL_HEADINGS names them."""
    return [
        f"{level['users']:,}",
        f"{level['until'] - level['from']:.1f}",
        f"{level['requests']:,}",
        f"{level['ok']:,}",
        number(level["output_throughput"], "tokens/s"),
        number(level["ttft"]["p50"], "s"),
        number(level["ttft"]["p95"], "s"),
        number(level["tpot"]["p50"], "s"),
    ]


def _levels(levels: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Level by level", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in LEVEL_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for level in levels:
        table.add_row(*level_row(level))
    return Group(table, Text(LEVELS_REMARK, style="dim"))


LEVELS_REMARK = (
    "Requests by when they were sent, tokens by when they arrived; what a level left over streams into the next."
)


TURN_HEADINGS = {
    "turn": "of its session, counted from 0",
    "requests": "sent in the measuring window",
    "ok": "of these, those that ended ok",
    "TTFT p50, ms": "of those that ended ok",
    "TTFT p95, ms": "of those that ended ok",
    "prompt tokens, mean": "of those that ended ok; the history is in them",
    "from the prefix cache": "prompt tokens that the server says came from its cache / prompt tokens, same requests",
}
"""Columns of the table of turns -> what they mean."""


def turn_row(turn: dict[str, Any]) -> list[str]:
    """The cells of one entry of ``turns``, as TURN_HEADINGS names them."""
    return [
        f"{turn['turn']}{' and later' if turn['and_later'] else ''}",
        f"{turn['requests']:,}",
        f"{turn['ok']:,}",
        number(turn["ttft_p50"], "s"),
        number(turn["ttft_p95"], "s"),
        number(turn["prompt_tokens_mean"], "tokens"),
        number(turn["cached_share"], "share"),
    ]


WHY_NOT_SENT = {
    "failed": "came after one that failed",
    "left": "came after one that its user left",
    "stopped": "were left at the end",
    "max_in_flight": "were held back by load.max_in_flight",
}


def session_words(sessions: dict[str, Any]) -> str:
    """How many sessions there were, and what of them was not sent."""
    told = f"{sessions['begun']:,} sessions, {sessions['turns_sent']:,} turns sent"
    left = sessions["turns_not_sent"]
    if left is None:
        return f"{told}; how many more they had is not known, as the run never came to its end."
    if not left:
        return f"{told}; no turn of these was left out."
    counted = ", ".join(f"{count:,} that {plain(WHY_NOT_SENT.get(why, why))}" for why, count in left.items())
    return f"{told}; not sent: {counted}."


def prefix_lines(told: dict[str, Any]) -> list[str]:
    """The intended, the observed and the counted share of a prefix cache, each with what it is a share of."""
    shares = {name: number(told[name]["share"], "share") for name in told if told[name]["share"] is not None}
    lines = {
        "intended": "of the prompt characters were known from this run: the most that a cache without a past, which "
        "forgets nothing, could answer",
        "observed": "of the prompt tokens came from the cache, by what the server says of each of "
        f"{number(told['observed']['requests'], 'requests')} requests",
        "counted": "of the tokens that the server looked up in its cache were found, by its counters, whoever asked",
    }
    left_out = told["intended"]["left_out"]
    if left_out:
        counted = told["intended"]["requests"]
        lines["intended"] += f" (of {counted:,} of {counted + left_out:,} requests, as more texts are not compared)"
    return [f"{name.capitalize()}: {shares[name]} {text}." for name, text in lines.items() if name in shares]


ATTEMPT_HEADINGS = {
    "attempts": "that an ask took",
    "asks": "what a user wanted: a first attempt and its retries",
    "share": "of all asks",
    "ok": "asks whose last attempt ended ok",
    "TTFT p50, ms": "from when the first attempt was due, pauses included, of asks that ended ok",
    "TTFT p99, ms": "the same",
    "E2E p50, ms": "from when the first attempt was due until the last token, the same",
    "E2E p99, ms": "the same",
}
"""Columns of the table of attempts -> what they mean."""
ATTEMPTS_TITLE = "Asks and their attempts, from the first intent"


def attempt_row(row: dict[str, Any]) -> list[str]:
    """The cells of one row of ``attempts``, as ATTEMPT_HEADINGS names them."""
    ttft, e2e = row["ttft_from_first_intent"], row["e2e_from_first_intent"]
    return [
        "any" if row["attempts"] is None else f"{row['attempts']}",
        f"{row['asks']:,}",
        number(row["share"], "share"),
        f"{row['ok']:,}",
        *(number(told[p], "s") for told in (ttft, e2e) for p in ("p50", "p99")),
    ]


def attempt_words(told: dict[str, Any]) -> str:
    """How many asks took how many attempts."""
    return (
        f"{told['asks']:,} asks took {told['attempts']:,} attempts; {number(told['retried_share'], 'share')} took more "
        f"than one, and {told['asks'] - told['ok']:,} did not end ok. Every other figure here is of attempts, failed "
        "ones among them."
    )


def _attempts(told: dict[str, Any]) -> RenderableType:
    table = Table(title=ATTEMPTS_TITLE, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ATTEMPT_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in told["rows"]:
        table.add_row(*attempt_row(row))
    return Group(table, Text(attempt_words(told)))


def _turns(summary: dict[str, Any]) -> RenderableType:
    title = "Turn by turn, with the history in the prompt"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in TURN_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for turn in summary["turns"]:
        table.add_row(*turn_row(turn))
    return Group(table, Text(session_words(summary["sessions"]), style="dim"))


def _client_vs_server(rows: list[dict[str, Any]]) -> RenderableType:
    sources = ", ".join(dict.fromkeys(told_by(row) for row in rows))
    title = f"Logged by tool and by server: the same requests, one by one ({sources}), in ms"
    table = Table(title=title, title_style="bold", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("metric", "n", "tool", "server", "difference"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    table.add_column("what differs in definition")
    for row in rows:
        told = "" if row["statistic"] == "p50" else row["what_differs"]
        values = [number(row[key], "s") for key in ("client", "server", "difference")]
        values[-1] += resolved(row)
        last = row["statistic"] == "p50"
        table.add_row(row_name(row, rows), f"{row['n']:,}", *values, told, end_section=last)
    clocks = {(row["metric"], told_by(row)): row["server_definition"] for row in rows if row["client"] is not None}
    lines = (Text.assemble((f"{SHORT[metric]} ({who}): ", "bold"), text) for (metric, who), text in clocks.items())
    return Group(table, _bullets("The server's clock, of single requests", lines))


SOURCES = {
    "in-band": "timings inside the response",
    "otlp": "spans that the server sent",
    "log": "lines of the server's log",
}


def told_how(rows: list[dict[str, Any]]) -> str:
    """Whose words the figures of single requests are, and how they came, as a sentence."""
    whose = dict.fromkeys((told_by(row), SOURCES[row["source"]]) for row in rows)
    return "Server: " + "; ".join(f"{who} ({how})" for who, how in whose) + "."


def row_name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A metric and its statistic; where several clocks told of it, whose it is, too."""
    several = len({told_by(one) for one in rows if one["metric"] == row["metric"]}) > 1
    return f"{SHORT[row['metric']]} {row['statistic']}" + (f" ({told_by(row)})" if several else "")


def told_by(row: dict[str, Any]) -> str:
    """Whose words a figure of the server is, and how they came."""
    return f"{row['source']}, {row['told_by']}" if row["source"] else "the server tells nothing of these"


def _waterfall(waterfall: dict[str, Any]) -> RenderableType:
    """A row a part; parts whose mean is the whole's, percentiles each one's own."""
    who = f"{waterfall['n']:,} requests, {waterfall['how']} ({told_by(waterfall)})"
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
    remark = Text(ADD_UP, style="dim")
    words = Text(plain(waterfall["words"]), style="bold")
    return Group(Text(title, style="bold"), table, words, remark, _bullets("The parts", clocks))


ADD_UP = "Means add up to the mean of the whole; percentiles are each part's own and do not add up."


def _parting(decodes: list[dict[str, Any]], stages: list[dict[str, Any]]) -> RenderableType:
    """Where client and server part after the first token, and what lies between neighbouring stages."""
    lines = [
        Text(f"{one['words']} ({told_by(one)}; {one['client']['n']:,} requests; server: {one['server_definition']}.)")
        for one in decodes
    ]
    for row in stages:
        lines += [Text(plain(stage_words(row))), Text("  " + plain(stage_clocks(row)), style="dim")]
    return _bullets("Where client and server part", lines)


def stage_clocks(row: dict[str, Any]) -> str:
    """What starts and stops the two clocks of a step between stages."""
    return " ".join(f"{row[side]}: {row[f'{side}_definition'].rstrip('.')}." for side in ("outer", "inner"))


def stage_words(row: dict[str, Any]) -> str:
    """One step between neighbouring stages."""
    count = f", {row['n']:,} requests" if row["n"] is not None else ""
    means = f"{number(row['outer_mean'], 's')} - {number(row['inner_mean'], 's')}"
    between = f"between {row['outer']} and {row['inner']}"
    return f"{SHORT[row['metric']]} {between}: {means} = {number(row['between'], 's')} ms ({row['how']}{count})."


def scraped_span(scraped: dict[str, Any]) -> str:
    """What the server's counters cover, in words."""
    warmup = f", {scraped['warmup']} of them to warm up" if scraped["warmup"] else ", none of them to warm up"
    span = f"second {scraped['from']:.1f} to {scraped['until']:.1f} of the run"
    return f"Both sides: {span}, in which the tool sent {scraped['requests']:,} requests{warmup}."


def metric_name(row: dict[str, Any]) -> str:
    """A short name of what a histogram of the server tells."""
    since = " since the restart" if row["since_restart"] else ""
    return (SHORT.get(row["metric"]) or str(row["title"])) + since


def engine_name(engine: dict[str, Any]) -> str:
    """One engine of one server: its labels, without those of its model, and where it was read."""
    labels = ", ".join(f"{name} {value}" for name, value in engine["labels"].items() if name != "model_name")
    return plain(f"{labels} at {engine['url']}" if labels else engine["url"])


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
            metric_name(row),
            f"{row['client_n']:,}" if row["client_n"] else "–",
            number(row["client_mean"], "s"),
            f"{row['server_n']:,}",
            number(row["server_mean"], "s"),
            number(row["difference"], "s"),
            *(bucket(row[f"server_p{p}"]) for p in (50, 99)),
        )
    remarks = [scraped_span(scraped), "Percentiles are read from buckets: lower .. upper bound (~estimate)."]
    if any(row["client_n"] and row["difference"] is None for row in rows):
        remarks.append("No difference where the two sides do not have the same number of observations.")
    clocks = (
        Text.assemble((f"{metric_name(row)}: ", "bold"), row["server_definition"], ".", (caveats(row), "yellow"))
        for row in rows
    )
    return Group(table, Text(" ".join(remarks), style="dim"), _bullets("The server's clock", clocks))


def caveats(row: dict[str, Any]) -> str:
    """What is amiss with a figure of the server's /metrics, as sentences; nothing where nothing is."""
    told = (plain(caveat).rstrip(".") for caveat in row["caveats"])
    return "".join(f" {caveat[:1].upper()}{caveat[1:]}." for caveat in told)


def _log_series(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(
        title="What the server's log says of the measuring window, line by line", title_style="bold",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for heading in ("series", "unit", "lines", "mean", "max"):
        table.add_column(heading, justify="left" if heading in ("series", "unit") else "right", no_wrap=True)
    for row in rows:
        unit = series_unit(row)
        values = [number(row[key], unit) for key in ("mean", "max")]
        table.add_row(Text(plain(series_name(row))), shown_unit(row["unit"]), f"{row['n']:,}", *values)
    meanings = dict.fromkeys((series_words(row), row["definition"]) for row in rows)
    lines = (Text.assemble((f"{name}: ", "bold"), meaning, ".") for name, meaning in meanings)
    return Group(table, Text(LOG_WEIGHT, style="dim"), _bullets("What the log's figures mean", lines))


LOG_WEIGHT = "A mean of lines: each line weighs the same, whatever it tells of."


def series_words(row: dict[str, Any]) -> str:
    """A series of the server's log in words: ``log:vllm:kv_usage`` -> ``vllm, kv usage``."""
    _, server, name = row["name"].split(":")
    return f"{server}, {name.replace('_', ' ').replace('kv ', 'KV cache ')}"


def series_name(row: dict[str, Any]) -> str:
    """With its engine, where the log names one."""
    return series_words(row) + (f" (engine {row['engine']})" if row["engine"] is not None else "")


def series_unit(row: dict[str, Any]) -> str:
    """The unit for `number`: a mean of whole numbers keeps its decimals."""
    if row["unit"] == "1" and not row["name"].endswith("acceptance_length"):
        return "share"
    return "s" if row["unit"] == "s" else ""


GPU_HEADINGS = {
    "GPU": "its number and name, and the machine it was read from if that is another one",
    "busy, mean (max)": GPU_DEFINITIONS["utilisation_mean"],
    "memory, peak of all, GiB": GPU_DEFINITIONS["memory_peak_bytes"],
    "power, W": GPU_DEFINITIONS["power_mean_w"],
    "energy, J": "by the GPU's own counter, or by its power over time, as told above",
    "clock, MHz": "clock of its processors, mean of the samples",
    "max °C": "highest temperature of the samples",
    "held down": GPU_DEFINITIONS["throttled_share"],
}
"""Columns of the GPU table -> what they mean."""


def gpu_row(gpu: dict[str, Any]) -> list[str]:
    """The cells of one entry of ``gpu``, as GPU_HEADINGS names them; of all GPUs together only power and energy."""
    power = [number(gpu["power_mean_w"], "W"), number(gpu["energy_j"], "J")]
    if gpu["gpu"] == "all":
        return [f"all {gpu['gpus']}", "", "", *power, "", "", ""]
    name = ", ".join(str(part) for part in (f"{gpu['gpu']}: {gpu['name']}", gpu["host"]) if part)
    memory = [None if gpu[key] is None else gpu[key] / 2**30 for key in ("memory_peak_bytes", "memory_total_bytes")]
    held = ", ".join(f"{reason} {number(share, 'share')}" for reason, share in gpu["throttle_reasons"].items())
    clock = gpu["sm_clock_mean_hz"]
    return [
        plain(name),
        f"{number(gpu['utilisation_mean'], 'share')} ({number(gpu['utilisation_max'], 'share')})",
        " of ".join(number(size, "GiB") for size in memory),
        *power,
        f"{clock / 1e6:,.0f}" if clock is not None else "–",
        f"{gpu['temperature_max_c']:.0f}" if gpu["temperature_max_c"] is not None else "–",
        number(gpu["throttled_share"], "share") + (f" ({held})" if held else ""),
    ]


def gpu_words(gpus: list[dict[str, Any]]) -> str:
    """Energy of a token, and how the energy was told."""
    whole = gpus[-1]
    joules, covered = whole["joules_per_output_token"], number(whole["covered_s"], "")
    if whole["energy_j"] is None:
        return "Not all of these GPUs tell their energy."
    told = f"Energy by {whole['energy_source']}, over {covered} s of the window."
    return told if joules is None else f"{joules:,.3g} J an output token. {told}"


def gpu_rows(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those to show: the sum only where there are several."""
    return gpus if len(gpus) > 2 else gpus[:1]


def _gpu(gpus: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="GPUs in the measuring window", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for heading in GPU_HEADINGS:
        table.add_column(heading, justify="left" if heading in ("GPU", "held down") else "right")
    for gpu in gpu_rows(gpus):
        table.add_row(*map(Text, gpu_row(gpu)))
    meanings = GPU_HEADINGS | {"J an output token": GPU_DEFINITIONS["joules_per_output_token"]}
    lines = (Text.assemble((f"{heading}: ", "bold"), meaning, ".") for heading, meaning in meanings.items())
    return Group(table, Text(gpu_words(gpus), style="bold"), _bullets("What the GPU figures mean", lines))


MEMORY = {
    "weights": "weights, in memory",
    "weights_on_disk": "weights, on disk",
    "kv_reserved": "KV cache, reserved",
    "kv_used_peak": "KV cache, peak in use",
    "process_pss_peak": "server's processes, peak (PSS)",
    "process_rss_peak": "server's or engine's processes, peak (RSS)",
    "allocator_peak": "torch's allocator, peak in tensors",
    "allocator_reserved_peak": "torch's allocator, peak it held",
    "gpu_used_peak": "GPU memory in use, peak",
}


def memory_name(row: dict[str, Any]) -> str:
    """How a row of ``memory`` is called; one of another name keeps it."""
    return MEMORY.get(row["name"], plain(row["name"]))


def size(count: int) -> str:
    """Bytes as a reader sees them."""
    unit, scale = next(((u, n) for u, n in (("GiB", 2**30), ("MiB", 2**20)) if count >= n), ("KiB", 2**10))
    return f"{count / scale:,.2f} {unit}" if unit == "GiB" else f"{count / scale:,.1f} {unit}"


def _memory(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Memory", title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "size", "told by, and what it is"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for row in rows:
        table.add_row(memory_name(row), size(row["bytes"]), Text(f"{plain(row['source'])}: {plain(row['definition'])}"))
    return table


def _check_lines(checks: list[dict[str, Any]]) -> Iterable[Text]:
    marks = {True: ("yes  ", "green"), False: ("NO   ", "bold red"), None: ("?    ", "dim")}
    for check in checks:
        mark, style = marks[check["passed"]]
        yield Text.assemble((mark, style), check["text"])


def _bullets(title: str, lines: Iterable[Text]) -> RenderableType:
    return Group(Text(title, style="bold"), *(Padding(line, (0, 0, 0, 2)) for line in lines))
