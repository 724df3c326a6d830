"""Server names: what each server calls a figure in its /metrics, and what the figure means there.

Tables, and nothing else. The same word means different things in different servers, so that a definition (start, stop,
weight of one observation) stands beside each name, and whatever is read under a name carries that definition along.
Seconds throughout: the servers below time in seconds.
"""

from dataclasses import dataclass

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Source:
    """One name of a figure: what starts and stops its clock, and what one observation stands for."""

    name: str  # of the histogram; of the counter of seconds where `per` is given
    start: str
    stop: str
    weight: str  # one observation ...
    note: str = ""
    where: Labels = ()  # only the series that carry these labels
    per: str = ""  # the counter that the seconds are divided by: such a source gives a mean and no percentile
    beside: str = ""  # the client's figure of the same quantity: ttft, itl, itl_per_token, tpot or e2e

    @property
    def definition(self) -> str:
        """Start, stop and weight, as reports show them."""
        note = f"; {self.note}" if self.note else ""
        return f"{self.start} -> {self.stop}{note}. One observation {self.weight}"


def _trtllm(name: str, start: str, stop: str, weight: str, note: str = "", beside: str = "") -> tuple[Source, ...]:
    """TensorRT-LLM's own prefix, the one that Dynamo gives it, and none (up to 1.1)."""
    return tuple(
        Source(prefix + name, start, stop, weight, note, beside=beside) for prefix in ("trtllm_", "trtllm:", "")
    )


_VLLM_ARRIVAL = "arrival at the API server (since vLLM 0.17 before templating and tokenizing, until 0.16 after)"
_VLLM_STEP = ("engine step", "next engine step of the request", "a step, however many tokens it gave")
_SGLANG_ARRIVAL = "request handler entered (before templating and tokenizing)"
_TGI_ARRIVAL = "request handler entered (after templating, before tokenizing)"
_TGI_END = "last event taken by the HTTP layer"
_FINISHED = "a finished request"

HISTOGRAMS: dict[str, tuple[tuple[Source, ...], str]] = {
    "ttft": (
        (
            Source(
                "vllm:time_to_first_token_seconds",
                _VLLM_ARRIVAL,
                "first output taken from the engine",
                "a request, aborted ones too",
                "queue in; no detokenizing or delivery",
                beside="ttft",
            ),
            Source(
                "sglang:time_to_first_token_seconds",
                _SGLANG_ARRIVAL,
                "first token detokenized",
                "a streamed request",
                "queue in; no delivery",
                where=(("is_streaming", "true"),),
                beside="ttft",
            ),
            Source(
                "sglang:time_to_first_token_seconds",
                _SGLANG_ARRIVAL,
                "end of prefill in the scheduler",
                "a request without streaming",
                "queue in; no detokenizing or delivery",
                where=(("is_streaming", "false"),),
            ),
            *_trtllm(
                "time_to_first_token_seconds",
                "arrival at the executor (after tokenizing)",
                "first token in the engine",
                "a request",
                "queue in; no detokenizing or delivery",
                beside="ttft",
            ),
        ),
        "Time to first token (TTFT)",
    ),
    "itl": (
        (
            Source("vllm:inter_token_latency_seconds", *_VLLM_STEP, beside="itl"),
            Source("vllm:time_per_output_token_seconds", *_VLLM_STEP, beside="itl"),  # up to vLLM 0.13
            Source(
                "sglang:inter_token_latency_seconds",
                "output received by the frontend",
                "next output received, divided by its tokens",
                "a token, so that a gap counts once for each token of its output",
                "detokenizing in, no delivery",
                beside="itl_per_token",
            ),
        ),
        "Inter-token latency (ITL)",
    ),
    "tpot": (
        (
            Source(
                "vllm:request_time_per_output_token_seconds",
                "first token in the engine",
                "last token, divided by (output tokens - 1)",
                "a finished request; 0 for one token",
                beside="tpot",
            ),
            Source(
                "sglang:request_time_per_output_token_seconds",
                "first token at the frontend",
                "finished, divided by (output tokens - 1)",
                "a request that ended by stop or length",
                beside="tpot",
            ),
            *_trtllm(
                "time_per_output_token_seconds",
                "first token in the engine",
                "last token, divided by (output tokens - 1)",
                _FINISHED,
                beside="tpot",
            ),
        ),
        "Time per output token (TPOT), per request",
    ),
    "e2e": (
        (
            Source(
                "vllm:e2e_request_latency_seconds",
                _VLLM_ARRIVAL,
                "last output taken from the engine",
                _FINISHED,
                beside="e2e",
            ),
            Source(
                "sglang:e2e_request_latency_seconds",
                _SGLANG_ARRIVAL,
                "finished at the frontend, detokenized",
                _FINISHED,
                beside="e2e",
            ),
            Source(
                "tgi_request_duration",
                _TGI_ARRIVAL,
                _TGI_END,
                "a request that succeeded",
                "a client that reads slowly lengthens it",
                beside="e2e",
            ),
            *_trtllm(
                "e2e_request_latency_seconds",
                "arrival at the executor (after tokenizing)",
                "last token in the engine",
                _FINISHED,
                beside="e2e",
            ),
        ),
        "Request duration (E2E)",
    ),
    "queue": (
        (
            Source("vllm:request_queue_time_seconds", "scheduler has the request", "first scheduled", _FINISHED),
            Source("vllm:time_in_queue_requests", "arrival at the engine (V0)", "first scheduled", _FINISHED),
            Source("sglang:queue_time_seconds", "scheduler's wait queue entered", "first forward pass", "a request"),
            Source(
                "tgi_request_queue_duration",
                "validated and queued",
                "put into a batch",
                "a request that succeeded",
            ),
            *_trtllm("request_queue_time_seconds", "arrival at the executor", "first scheduled", _FINISHED),
        ),
        "Queue",
    ),
    "prefill": (
        (
            Source("vllm:request_prefill_time_seconds", "first scheduled", "first token in the engine", _FINISHED),
            *_trtllm("request_prefill_time_seconds", "first scheduled", "first token in the engine", _FINISHED),
        ),
        "Prefill",
    ),
    "decode": (
        (
            Source("vllm:request_decode_time_seconds", "first token in the engine", "last token", _FINISHED),
            *_trtllm("request_decode_time_seconds", "first token in the engine", "last token", _FINISHED),
        ),
        "Decode",
    ),
}
"""Metric -> (its names, the preferred first; its title). These a client's request has too, or a waterfall shows."""


def _tgi_step(name: str, what: str, method: str, note: str = "") -> tuple[Source, ...]:
    where = (("method", method),)
    return (Source(name, f"{what} of a {method} batch begun", "done", "a batch, whatever its size", note, where),)


INNER_HISTOGRAMS: dict[str, tuple[tuple[Source, ...], str]] = {
    "validation": (
        (
            Source(
                "tgi_request_validation_duration",
                _TGI_ARRIVAL,
                "tokenized, validated and queued",
                "a request that succeeded",
            ),
        ),
        "Validation",
    ),
    "inference": (
        (
            Source("vllm:request_inference_time_seconds", "first scheduled", "last token in the engine", _FINISHED),
            Source(
                "tgi_request_inference_duration",
                "put into a batch",
                _TGI_END,
                "a request that succeeded",
                "prefill and decode; a client that reads slowly lengthens it",
            ),
            *_trtllm("request_inference_time_seconds", "first scheduled", "last token in the engine", _FINISHED),
        ),
        "Inference",
    ),
    "time_per_token": (
        (
            Source(
                "tgi_request_mean_time_per_token_duration",
                "put into a batch",
                f"{_TGI_END}, divided by all output tokens",
                "a request that succeeded",
                "prefill in, so that it is no TPOT",
            ),
        ),
        "Time per token, prefill in",
    ),
    "prefill_step": (
        _tgi_step("tgi_batch_inference_duration", "inference", "prefill"),
        "Prefill step of a batch",
    ),
    "decode_step": (
        _tgi_step("tgi_batch_inference_duration", "inference", "decode", "pauses for prefills of others are not in it"),
        "Decode step of a batch",
    ),
    "prefill_forward": (_tgi_step("tgi_batch_forward_duration", "forward pass", "prefill"), "Forward pass, prefill"),
    "decode_forward": (_tgi_step("tgi_batch_forward_duration", "forward pass", "decode"), "Forward pass, decode"),
    "prefill_to_text": (_tgi_step("tgi_batch_decode_duration", "tokens to text", "prefill"), "Tokens to text, prefill"),
    "decode_to_text": (_tgi_step("tgi_batch_decode_duration", "tokens to text", "decode"), "Tokens to text, decode"),
    "prefill_filter": (
        _tgi_step("tgi_batch_filter_duration", "filtering and sending", "prefill"),
        "Filtering, prefill",
    ),
    "decode_filter": (_tgi_step("tgi_batch_filter_duration", "filtering and sending", "decode"), "Filtering, decode"),
    "concat": (
        (
            Source(
                "tgi_batch_concat_duration",
                "joining of batches begun",
                "done",
                "a joining of batches",
            ),
        ),
        "Joining of batches",
    ),
    "prefill_per_token": (
        (
            Source(
                "llamacpp:prompt_seconds_total",
                "slot takes up the prompt",
                "first token sampled, divided by the prompt tokens that were processed",
                "a prompt token (cached ones left out)",
                "of slots that run together a step counts once or once each, by version: indicative only",
                per="llamacpp:prompt_tokens_total",
            ),
        ),
        "Prefill, per prompt token",
    ),
    "decode_per_token": (
        (
            Source(
                "llamacpp:tokens_predicted_seconds_total",
                "first token sampled",
                "last token, divided by the tokens",
                "an output token",
                "of slots that run together a step counts once or once each, by version: indicative only",
                per="llamacpp:tokens_predicted_total",
            ),
        ),
        "Decode, per output token",
    ),
}
"""As HISTOGRAMS: what else servers time inside."""

COUNTERS: dict[str, dict[str, str]] = {
    "generation_tokens": {
        "vllm:generation_tokens_total": "at each output of the engine",
        "sglang:generation_tokens_total": "when a request finishes",
        "llamacpp:tokens_predicted_total": "when a request finishes; six digits",
        "trtllm_generation_tokens_total": "when a request finishes",
        "pytorch:generation_tokens_total": "when a batch ends",
        "tgi_request_generated_tokens_sum": "when a request succeeds",
    },
    "prompt_tokens": {
        "vllm:prompt_tokens_total": "at the first output of a request, cached tokens too",
        "sglang:prompt_tokens_total": "when a request finishes, cached tokens too",
        "llamacpp:prompt_tokens_total": "cached tokens left out; six digits",
        "trtllm_prompt_tokens_total": "when a request finishes",
        "pytorch:prompt_tokens_total": "when a batch ends, without padding",
        "tgi_request_input_length_sum": "when a request is validated",
    },
    "requests": {
        "vllm:request_success_total": "requests that finished; those whose client went away are left out",
        "sglang:num_requests_total": "requests that finished",
        "trtllm_request_success_total": "requests that finished",
        "pytorch:requests_total": "requests that finished; those whose client went away are left out",
        "tgi_request_success": "requests that succeeded",
        "tgi_request_success_total": "requests that succeeded",  # the parser gives every counter this ending
    },
    "preemptions": {
        "vllm:num_preemptions_total": "requests that lost their place in the KV cache and were computed anew",
        "sglang:num_retracted_requests_total": "requests that lost their place in the KV cache",
    },
    "prefix_hits": {
        "vllm:prefix_cache_hits_total": "tokens found in whole blocks, at each look-up of a prompt",
        "vllm:gpu_prefix_cache_hits_total": "tokens found in whole blocks, at each look-up of a prompt",
        "sglang:cached_tokens_total": "prompt tokens that a cache answered, of device, host and storage together",
        "trtllm_prompt_cached_tokens_total": "prompt tokens that a cache answered",
    },
    "prefix_queries": {
        "vllm:prefix_cache_queries_total": "tokens of a prompt, at each look-up of it",
        "vllm:gpu_prefix_cache_queries_total": "tokens of a prompt, at each look-up of it",
        "sglang:prompt_tokens_total": "when a request finishes, cached tokens too",
        "trtllm_prompt_tokens_total": "when a request finishes",
    },
    "cached_tokens": {
        "vllm:prompt_tokens_cached_total": "prompt tokens that a cache answered",
        "vllm:prefix_cache_hits_total": "prompt tokens found in the prefix cache",
        "vllm:gpu_prefix_cache_hits_total": "prompt tokens found in the prefix cache",
        "sglang:cached_tokens_total": "prompt tokens that a cache answered, of device, host and storage together",
        "llamacpp:prompt_tokens_cached_total": "prompt tokens that the slot held already; six digits",
        "trtllm_prompt_cached_tokens_total": "prompt tokens that a cache answered",
    },
}
"""Counter -> its names, the preferred first, and what or when each counts."""

GAUGES: dict[str, tuple[str, ...]] = {
    "running": (
        "vllm:num_requests_running",
        "sglang:num_running_reqs",
        "tgi_batch_current_size",
        "llamacpp:requests_processing",
        "trtllm_num_requests_running",
        "pytorch:num_requests_running",
    ),
    "waiting": (
        "vllm:num_requests_waiting",
        "sglang:num_queue_reqs",
        "tgi_queue_size",
        "llamacpp:requests_deferred",
        "trtllm_num_requests_waiting",
        "pytorch:num_requests_waiting",
    ),
    "kv_cache_usage": (
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "sglang:token_usage",
        "llamacpp:kv_cache_usage_ratio",
        "trtllm_kv_cache_utilization",
    ),
}
"""Gauge -> its names, the preferred first. KV cache usage is a share, 0..1, in all of them."""
