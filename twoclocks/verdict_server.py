"""Verdict: reasons that lie with the server, and with others on it. See twoclocks.verdict."""

from twoclocks import checks, expositions
from twoclocks.load import Run
from twoclocks.prefix_cache import CACHED_SHARE, cache_hits
from twoclocks.verdict_reason import Level, Reason

FOREIGN_SHARE = 0.01
FEW_SPANS = 2  # a probe before the run may be told of, too


def restarted(run: Run) -> Reason | None:
    """Counters that fell: what the server says covers only a part of the run."""
    if not any(expositions.restarted(s, first) for s, first in zip(run.scrapes, run.first_scrapes, strict=True)):
        return None
    return Reason(
        "INVALID", "server_restarted", "a server restarted during the run (its counters fell)", None, "run again"
    )


def foreign_traffic(run: Run) -> Reason | None:
    """The server gave more answers than we received: others had a share of it."""
    told = checks.traffic(run) if run.scrapes else None
    if told is None or told.answered <= told.ours:
        return None
    # a request that we cut off may have had its first token on the way; n > 1 counts each choice
    share = (told.answered - told.ours - told.unseen) / told.answered
    if share <= FOREIGN_SHARE or _is_n(run):
        return None
    text = f"{share:.1%} of the {told.answered:.0f} requests that the server answered were not ours"
    level: Level = "INVALID" if share > 10 * FOREIGN_SHARE else "SUSPECT"
    return Reason(level, "foreign_traffic", text, share, "keep others from the server while it is measured")


def fewer_answers(run: Run) -> Reason | None:
    """The server counts fewer answers than we received: its page tells of a part of what answered us."""
    told = checks.traffic(run) if run.scrapes else None
    if told is None or not told.ours:
        return None
    share = (told.ours - told.under_way - told.answered) / told.ours
    if share <= FOREIGN_SHARE:
        return None
    text = f"{share:.1%} of the {told.ours} {told.what} that we received are missing in the server's own count"
    return Reason(
        "SUSPECT", "fewer_answers", text, share,
        "did it restart between two scrapes, or do several servers answer at this address? then give the /metrics of "
        "each in collect.metrics_url",
    )  # fmt: skip


def foreign_spans(run: Run) -> Reason | None:
    """Spans with an id that is not ours: others had a share of the server. Of a killed run some are our own."""
    foreign, told = checks.foreign_spans(run)
    if foreign <= FEW_SPANS or foreign / told <= FOREIGN_SHARE or run.meta.get("status") == "running":
        return None
    share = foreign / told
    text = f"{share:.1%} of the {told} requests that the server told of in spans were not ours"
    level: Level = "INVALID" if share > 10 * FOREIGN_SHARE else "SUSPECT"
    return Reason(level, "foreign_spans", text, share, "keep others from the server while it is measured")


def preempted(run: Run) -> Reason | None:
    """A preempted request loses its KV cache and is computed anew: its gaps show a full cache, not the model."""
    risen = expositions.counter_delta(run.scrapes, run.first_scrapes, "preemptions") if run.scrapes else None
    if not risen:
        return None
    text = f"the server preempted running requests {risen:.0f} times, as its KV cache was full"
    return Reason("SUSPECT", "preemptions", text, risen, "use fewer users, or give the server more KV cache")


def prefix_cache(run: Run) -> Reason | None:
    """Prompts that the server knows from elsewhere are answered from its cache, and TTFT is that of the cache."""
    hits = cache_hits(run)
    if hits is None or hits.unexplained <= CACHED_SHARE:
        return None
    if hits.intended is not None:
        text = (
            f"{hits.share:.0%} of the prompt tokens came from the server's prefix cache, which could have known "
            f"{hits.intended:.0%} of the prompt characters from this run itself"
        )
    else:
        text = (
            f"{hits.unexplained:.0%} of the prompt tokens came from the server's prefix cache although this run had "
            "not sent these prompts before"
        )
    return Reason(
        "SUSPECT", "prefix_cache", text, hits.unexplained,
        "restart the server or empty its cache before a run, or make prompts differ from their beginning on",
    )  # fmt: skip


def short_outputs(run: Run) -> Reason | None:
    """Where the workload says how long answers are, shorter ones make the load lighter than planned."""
    target, workload = run.experiment.get("target") or {}, run.experiment.get("workload") or {}
    asked = run.ok["expected_output_tokens"]
    if workload.get("ignore_eos") or (target.get("extra_body") or {}).get("ignore_eos"):
        asked = asked.fillna(run.ok["max_tokens"])
    asked = asked.clip(upper=run.ok["max_tokens"])  # an experiment may allow fewer than its request file recorded
    known = asked.notna() & run.ok["output_tokens"].notna()
    if not known.any():
        return None
    share = float((run.ok["output_tokens"][known] < asked[known]).mean())
    if share <= 0.01:
        return None
    text = f"{share:.0%} of the answers were shorter than the workload says that they are"
    remedy = "look whether this server knows ignore_eos, and whether it is set"
    return Reason("SUSPECT", "short_outputs", text, share, remedy)


def _is_n(run: Run) -> bool:
    """Were several choices asked for, by the experiment or by a line of the request file?"""
    body = (run.experiment.get("target") or {}).get("extra_body") or {}
    return bool(body.get("n", 1) != 1 or run.requests["chunk_choice"].notna().any())
