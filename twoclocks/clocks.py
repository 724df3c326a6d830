"""Clocks: what each server's own figure of a request measures: where its clock starts, where it stops, what is in it.

Data alone, by source (how it was told) and server (whose words these are), since one word means different things in
two servers. Reports take their definitions of server figures from here, so that a figure and its meaning stay together.
"""

from dataclasses import dataclass

from twoclocks.experiment import Server

METRICS = (
    "ttft", "tokenize", "validation", "queue", "prefill", "held", "decode", "inference", "tpot", "time_per_token",
    "e2e",
)  # fmt: skip
"""Durations that a server may tell of a request; a column ``server_NAME`` each, in seconds.

``ttft`` always holds the queue: a server that tells only its prefill (llama.cpp) has none. ``tokenize`` is what comes
between the request's receipt and the queue, template and tokenizing; ``validation`` is TGI's, without the template.
``held`` is from the first token until it is sent, of servers that send whole batches.
``inference`` is prefill + decode, of servers that tell them only together. ``tpot`` is (last - first token) /
(tokens - 1); ``time_per_token`` is inference / tokens, which is another quantity.
"""


@dataclass(frozen=True, slots=True)
class Clock:
    """One figure that a server tells of one request: one value a request, all requests weigh the same."""

    start: str
    stop: str
    note: str = ""  # what is in it, what is not, how it was computed
    differs: str = ""  # how it differs from the client's figure of the same name; empty: not seen from outside

    @property
    def text(self) -> str:
        """Start -> stop; note. One value a request."""
        note = f"; {self.note}" if self.note else ""
        return f"{self.start} -> {self.stop}{note}. One value a request"


ARRIVAL = "arrival at the API server (since vLLM 0.17 before template and tokenizing, until 0.16 after)"
_AROUND = "The client's also holds HTTP, template and tokenizing before the queue, and delivery"

_VLLM_ENGINE = {
    "queue": Clock("scheduler has the request", "first scheduled"),
    "prefill": Clock("first scheduled", "first token sampled"),
    "decode": Clock("first token sampled", "last token sampled"),
    "tpot": Clock(
        "first token sampled", "last token sampled", "divided by output tokens - 1",
        "The same formula: the client stamps a chunk's arrival, the server the sampling of a token",
    ),
}  # fmt: skip

_TGI = {
    "validation": Clock("handler has the request, template done", "queued", "permit, tokenizing and validating"),
    "queue": Clock("queued", "taken into a batch"),
    "inference": Clock("taken into a batch", "end event taken by the HTTP layer", "prefill + decode; a slow reader "
                       "lengthens it"),
    "time_per_token": Clock("taken into a batch", "end event taken by the HTTP layer", "divided by output tokens: "
                            "prefill is in it, so it is no TPOT"),
    "e2e": Clock("handler has the request, template done", "end event taken by the HTTP layer",
                 differs="The client's also holds HTTP and template before, and delivery"),
}  # fmt: skip
_TGI_HEADERS = {
    name: Clock(clock.start, clock.stop, f"{clock.note}; whole ms, cut off".removeprefix("; "), clock.differs)
    for name, clock in _TGI.items()
}

_SGLANG = {
    "ttft": Clock("handler has the request, before template and tokenizing", "first token at the frontend, after the "
                  "detokenizer", "queue in; of an answer that is not streamed: end of prefill in the scheduler",
                  "The client's also holds HTTP before and delivery after"),
    "tokenize": Clock("handler has the request", "scheduler has it", "TTFT - queue - prefill: template, tokenizing, "
                      "dispatch, and the first token's way to the frontend"),
    "queue": Clock("scheduler's waiting queue", "first forward pass"),
    "prefill": Clock("first forward pass", "prefill finished in the scheduler"),
    "decode": Clock("first token at the frontend", "request finished"),
    "inference": Clock("first forward pass", "request finished", "prefill + decode"),
    "tpot": Clock("first token", "request finished", "divided by output tokens - 1",
                  "The same formula: the client stamps a chunk's arrival, the server its frontend's receipt"),
    "e2e": Clock("handler has the request", "request finished",
                 differs="The client's also holds HTTP before and delivery"),
}  # fmt: skip

CLOCKS: dict[tuple[str, str], dict[str, Clock]] = {
    ("in-band", "vllm"): _VLLM_ENGINE | {
        "ttft": Clock(
            "scheduler has the request", "first token sampled",
            "queue + prefill as the engine timed them (its own time_to_first_token_ms leaves the queue out); no HTTP, "
            "template, tokenizing, detokenizing, delivery",
            "Both hold queue and prefill; the client's also HTTP, chat template, tokenizing before them and "
            "detokenizing and delivery after",
        ),
        "e2e": Clock(
            "scheduler has the request", "last token sampled", "queue + prefill + decode in the engine", _AROUND
        ),
    },
    ("otlp", "vllm"): _VLLM_ENGINE | {
        "ttft": Clock(
            ARRIVAL, "first output taken from the engine", "queue in; no detokenizing or delivery",
            "Both hold template, tokenizing (since vLLM 0.17), queue and prefill; the client's also HTTP before, "
            "detokenizing and delivery after",
        ),
        "tokenize": Clock(
            ARRIVAL, "scheduler has the request",
            "span TTFT - queue - prefill: template, tokenizing, and the hand-over to and from the engine",
        ),
        "e2e": Clock(
            ARRIVAL, "last output taken from the engine",
            differs="The client's also holds HTTP before, detokenizing and delivery",
        ),
    },
    ("in-band", "tgi"): _TGI_HEADERS,
    ("otlp", "tgi"): _TGI,
    ("log", "tgi"): _TGI,
    ("in-band", "sglang"): _SGLANG,
    ("log", "sglang"): _SGLANG,
    ("otlp", "sglang"): _SGLANG | {
        "tokenize": Clock("handler has the request", "dispatched to the scheduler", "span TTFT - span prefill: "
                          "template and tokenizing"),
        "prefill": Clock("dispatched to the scheduler", "first token at the frontend", "the span's prefill - queue"),
        "inference": Clock("dispatched to the scheduler", "request finished", "queue + prefill + decode"),
    },
    ("in-band", "llamacpp"): {
        "prefill": Clock("a slot starts the prompt", "first token sampled", "no queue, template, tokenizing"),
        "decode": Clock("first token sampled", "last token sampled"),
        "tpot": Clock(
            "first token sampled", "last token sampled", "divided by output tokens - 1",
            "The same formula: the client stamps a chunk's arrival, the server the sampling of a token",
        ),
    },
    ("in-band", "pytorch"): {
        "ttft": Clock(
            "request tokenized", "its first token is sent", "queue + prefill + held",
            "The client's also holds HTTP, template and tokenizing before, and delivery after",
        ),
        "queue": Clock("request tokenized", "its batch begins", "for the batch before to end, and for others to join"),
        "prefill": Clock("its batch begins", "first token sampled", "padding, and the prompts of the whole batch"),
        "held": Clock(
            "first token sampled", "first token sent",
            "static batching: its own decode, and the rest of the longest answer's, unless the server streams steps",
        ),
        "decode": Clock("first token sampled", "its own last token sampled"),
        "tpot": Clock(
            "first token sampled", "its own last token sampled", "divided by output tokens - 1",
            "The same formula: the client stamps a chunk's arrival, the server the sampling of a token",
        ),
        "e2e": Clock(
            "request tokenized", "its answer is sent", "the wait for the longest of its batch in it",
            "The client's also holds HTTP, template and tokenizing before, and delivery after",
        ),
    },
    ("log", "transformers"): {
        "queue": Clock("request handed to the continuous-batching engine", "first scheduled", "from its debug log"),
        "e2e": Clock(
            "request handed to the continuous-batching engine", "finished there",
            "from its debug log; no HTTP, template, tokenizing, delivery",
            "The client's also holds HTTP, template and tokenizing before the engine, and delivery after it",
        ),
    },
}  # fmt: skip
"""Facts checked in the servers' sources: vLLM 0.33, TGI 3.3.7, SGLang 0.5.23, llama.cpp of 2026, transformers 5.23."""

TTFT_IS_A_SUM = {("in-band", "vllm"), ("in-band", "pytorch")}
"""Where ``ttft`` is queue + prefill + held and nothing else, so that subtracting them teaches nothing further."""


@dataclass(frozen=True, slots=True)
class Silence:
    """What would be known of a request if its server were started otherwise, and how."""

    metrics: tuple[str, ...]  # of METRICS, or PAGE; of interest where all of them are unknown
    what: str
    remedy: str | None  # None: no way of starting it makes it tell


PAGE = "/metrics"

_TOLD_PER_REQUEST = ("ttft", "queue", "prefill", "e2e")
_VLLM_OTLP = (
    "--otlp-traces-endpoint http://HOST:4318/v1/traces and OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf "
    "in its environment"
)

SILENCES: dict[Server, tuple[Silence, ...]] = {
    "vllm": (
        Silence((PAGE,), "its totals (/metrics)", "its API port reachable and without --disable-log-stats"),
        Silence(_TOLD_PER_REQUEST, "queue and prefill of single requests",
                f"--enable-per-request-metrics (0.26 or newer) or {_VLLM_OTLP}"),
        Silence(("tokenize",), "template and tokenizing", _VLLM_OTLP),
    ),
    "tgi": (
        Silence((PAGE,), "its totals (/metrics)", "its API port reachable"),
        Silence(("queue", "e2e"), "validation, queue and inference of streamed requests",
                "--otlp-endpoint http://HOST:4317"),
        Silence(("prefill",), "time to first token and prefill", None),
    ),
    "transformers": (
        Silence((PAGE,), "its totals: it has no /metrics", None),
        Silence(("queue", "e2e"), "queue and duration of single requests",
                "--continuous-batching and its logger ContinuousBatchingLogger at DEBUG (which --log-level does not "
                "reach in 5.23; twoclocks.servers shows how), and set collect.log"),
        Silence(("ttft",), "time to first token, prefill and time per token", None),
    ),
    "sglang": (
        Silence((PAGE,), "its totals (/metrics)", "--enable-metrics"),
        Silence(_TOLD_PER_REQUEST, "queue and time to first token of single requests",
                "--enable-metrics --enable-trace --otlp-traces-endpoint HOST:4317, or with --enable-metrics "
                "--export-metrics-to-file --export-metrics-to-file-dir DIR and that file in collect.log"),
    ),
    "llamacpp": (
        Silence((PAGE,), "its totals (/metrics)", "--metrics"),
        Silence(("prefill",), "prefill and decode of single requests", "a build whose answers carry timings"),
        Silence(("queue",), "the wait for a slot, template and tokenizing", None),
    ),
    "pytorch": (
        Silence((PAGE,), "its totals (/metrics)", "its API port reachable"),
        Silence(("tokenize",), "template and tokenizing", None),
    ),
    "openai": (Silence(("e2e", "prefill"), "its own time of any request", None),),
    "other": (Silence(("e2e", "prefill"), "its own time of any request that could be read here", None),),
}  # fmt: skip


def silences(server: Server, told: set[str]) -> list[str]:
    """What this server does not tell, a sentence each; ``told``: those of METRICS and PAGE that it does."""
    return [
        f"This server tells nothing of {silence.what}"
        + (f"; start it with {silence.remedy} to learn it." if silence.remedy else ", however it is started.")
        for silence in SILENCES[server]
        if not told & set(silence.metrics)
    ]
