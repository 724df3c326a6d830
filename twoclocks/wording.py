"""Wording: labels, the cells of rows, captions and sentences of a summary, which terminal, page and studies share."""

from typing import Any

from twoclocks.errors import plain
from twoclocks.gpu_summary import DEFINITIONS as GPU_DEFINITIONS
from twoclocks.units import number

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


def shown_labels(figures: dict[str, Any]) -> dict[str, str]:
    """The rows of the client's table: those of LABELS that this run has."""
    return {name: label for name, label in LABELS.items() if name in figures}


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


ADD_UP = "Means add up to the mean of the whole; percentiles are each part's own and do not add up."


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


def caveats(row: dict[str, Any]) -> str:
    """What is amiss with a figure of the server's /metrics, as sentences; nothing where nothing is."""
    told = (plain(caveat).rstrip(".") for caveat in row["caveats"])
    return "".join(f" {caveat[:1].upper()}{caveat[1:]}." for caveat in told)


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
