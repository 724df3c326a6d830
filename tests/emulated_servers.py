"""TGI 3.3, SGLang 0.5.23 and llama.cpp's server on loopback, as far as a client and its collectors see them.

Written from the servers' sources, never recorded: they show that what those sources say is read rightly, not that the
servers do so. Each request really waits for a few ms in each of its phases, and what an emulation tells of it is what
it lived through, by its own clock; `told` keeps that, so that a test can hold it against what a run joined.

    python tests/emulated_servers.py tgi PORT      one of them in a process of its own, which may be killed
"""

import contextlib
import itertools
import json
import random
import secrets
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import httpx
from fake_server import DONE, END, HEAD, FakeServer, chunked, event, response
from make_spans import export, span
from opentelemetry.proto.trace.v1.trace_pb2 import Span

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
BATCH_S = 0.3  # exporters' own default is 5 s
MOST_TOKENS = 8
PAUSE_S = (0.002, 0.008)


class Exporter:
    """Sends spans in batches, as the SDKs' batch processors do; what cannot be sent is gone."""

    def __init__(self, send: Callable[[bytes], object], service: str) -> None:
        self.send, self.service = send, service
        self.spans: list[Span] = []
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def __call__(self, one: Span) -> None:
        with self.lock:
            self.spans.append(one)

    def close(self) -> None:
        self.over.set()
        self.thread.join(10)

    def _run(self) -> None:
        while not self.over.wait(BATCH_S):
            with self.lock:
                batch, self.spans = self.spans, []
            if batch:
                with contextlib.suppress(grpc.RpcError, httpx.HTTPError):
                    self.send(export(*batch, service=self.service).SerializeToString())


def over_http(port: int) -> Callable[[bytes], object]:
    """OTLP as HTTP with protobuf."""
    url, kind = f"http://127.0.0.1:{port}/v1/traces", {"content-type": "application/x-protobuf"}
    return lambda body: httpx.post(url, content=body, headers=kind)


def over_grpc(port: int) -> Callable[[bytes], object]:
    """OTLP over gRPC."""

    def send(body: bytes) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            channel.unary_unary(EXPORT)(body, timeout=5)

    return send


class Histogram:
    """A histogram's series, as Prometheus text has them."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = list(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1, added: float | None = None) -> None:
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value if added is None else added

    def lines(self, name: str, **labels: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        totals = itertools.accumulate(self.counts)
        for bound, total in zip([*map(repr, self.bounds), "+Inf"], totals, strict=True):
            yield f"{name}_bucket{_labels(labels | {'le': bound})} {total}"
        yield f"{name}_sum{_labels(labels)} {self.sum!r}"
        yield f"{name}_count{_labels(labels)} {sum(self.counts)}"


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}" if labels else ""


class Life:
    """When a request was where, in ns of time.monotonic_ns()."""

    def __init__(self, body: dict) -> None:
        self.received = self.queued = self.started = self.first = self.last = time.monotonic_ns()
        words = sum(len(str(message["content"]).split()) for message in body.get("messages", []))
        self.prompt_tokens = words + 1
        self.tokens = min(body["max_tokens"], MOST_TOKENS)


class Emulation(FakeServer):
    """What the three have in common: each request passes a queue, a prefill and a step for each further token."""

    def __init__(self, exporter: Exporter | None = None, port: int = 0) -> None:
        self.exporter = exporter
        self.told: dict[str, dict[str, float]] = {}  # X-Request-Id -> what was told of the request, seconds
        self.lock = threading.Lock()
        self.random = random.Random(1)
        super().__init__(port=port)
        self.metrics = lambda: response(200, self.page().encode(), "text/plain; version=0.0.4")

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.exporter is not None:
            self.exporter.close()

    def pause_s(self) -> float:
        return self.random.uniform(*PAUSE_S)

    def until_first_token(self, life: Life) -> Iterator[float]:
        yield self.pause_s()
        life.queued = time.monotonic_ns()
        yield self.pause_s()
        life.started = time.monotonic_ns()
        yield self.pause_s()
        life.first = life.last = time.monotonic_ns()

    def next_token(self, life: Life) -> Iterator[float]:
        yield self.pause_s()
        life.last = time.monotonic_ns()

    def page(self) -> str:
        raise NotImplementedError


def traceparent(headers: dict[str, str]) -> tuple[str, str]:
    """(trace id, span id of the caller)."""
    _, trace_id, parent_id, _ = headers["traceparent"].split("-")
    return trace_id, parent_id


def rust_debug(ns: int) -> str:
    """A Duration as Rust's {:?} prints it: 729.63µs, 1.102828046s."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= size:
            whole, rest = divmod(ns, size)
            fraction = str(rest).zfill(len(str(size)) - 1).rstrip("0")
            return f"{whole}.{fraction}{unit}" if fraction else f"{whole}{unit}"
    return f"{ns}ns"


class Tgi(Emulation):
    """TGI 3.3.7: no role chunk, every chunk with a role, an end token without text, spans with durations as text.

    Its spans' parent is the client's, its chunks have no id; without streaming it tells whole ms in headers.
    """

    NAMES = ("", "_validation", "_queue", "_inference", "_mean_time_per_token")

    def __init__(self, exporter: Exporter | None = None, port: int = 0) -> None:
        bounds = [0.0001 * 1.5**k for k in range(1, 36)]
        self.durations = {f"tgi_request{name}_duration": Histogram(bounds) for name in self.NAMES}
        self.generated, self.inputs = Histogram(range(0, 2048, 20)), Histogram(range(0, 4096, 40))
        self.received_count = 0
        super().__init__(exporter, port)

    def answer(self, headers: dict[str, str], body: dict) -> Iterator[object]:
        life = Life(body)
        with self.lock:
            self.received_count += 2  # once in the handler, once inside
        return (self._stream if body["stream"] else self._whole)(headers, life)

    def _stream(self, headers: dict[str, str], life: Life) -> Iterator[object]:
        yield HEAD.replace(b"\r\n\r\n", b"\r\nx-compute-type: cpu\r\nx-accel-buffering: no\r\n\r\n")
        yield from self.until_first_token(life)
        ends_itself = len(self.told) % 2 == 0
        for number in range(life.tokens):
            if number:
                yield from self.next_token(life)
            is_last = number == life.tokens - 1
            text = "" if is_last and ends_itself else f"w{number} "
            reason = None if not is_last else "stop" if ends_itself else "length"
            delta = {"role": "assistant", "content": text}
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield chunked(event(self._chunk([choice], None)))
        self._finish(headers, life)
        counts = {"prompt_tokens": life.prompt_tokens, "completion_tokens": life.tokens}
        yield chunked(event(self._chunk([], counts | {"total_tokens": life.prompt_tokens + life.tokens})))
        yield chunked(DONE) + END

    def _whole(self, headers: dict[str, str], life: Life) -> Iterator[object]:
        yield from self.until_first_token(life)
        for _ in range(life.tokens - 1):
            yield from self.next_token(life)
        told = self._finish(headers, life)
        message = {"role": "assistant", "content": "w " * life.tokens}
        usage = {"prompt_tokens": life.prompt_tokens, "completion_tokens": life.tokens}
        body = {"object": "chat.completion", "id": "", "usage": usage}
        body["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
        names = {f"x-{name}-time": name for name in ("total", "validation", "queue", "inference")}
        names["x-time-per-token"] = "time_per_token"
        lines = [f"{header}: {told[name] // 10**6}\r\n" for header, name in names.items()]  # whole ms, cut off
        yield from response(200, json.dumps(body).encode(), headers="".join(lines))

    def _chunk(self, choices: list, usage: dict | None) -> dict:
        head = {"object": "chat.completion.chunk", "id": "", "created": 1767880990, "model": "demo/model"}
        return head | {"system_fingerprint": "3.3.7-sha-0000000", "choices": choices, "usage": usage}

    def _finish(self, headers: dict[str, str], life: Life) -> dict[str, int]:
        """Tell of the request in all places but the answer; the same durations in ns."""
        now = time.monotonic_ns()
        ns = {
            "total": now - life.received,
            "validation": life.queued - life.received,
            "queue": life.started - life.queued,
            "inference": now - life.started,
            "time_per_token": (now - life.started) // life.tokens,
        }
        with self.lock:
            for histogram, value in zip(self.durations.values(), ns.values(), strict=True):
                histogram.observe(value / 1e9)
            self.generated.observe(life.tokens)
            self.inputs.observe(life.prompt_tokens)
            self.told[headers["x-request-id"]] = {
                "e2e" if name == "total" else name: value / 1e9 for name, value in ns.items()
            }
        if self.exporter is not None:
            names = {"total": "total_time", "time_per_token": "time_per_token"}
            attributes = {names.get(name, f"{name}_time"): rust_debug(value) for name, value in ns.items()}
            attributes |= {"parameters": 'GenerateParameters { stop: ["\\""] }', "seed": "None"}
            self.exporter(span("chat_completions", *traceparent(headers), attributes=attributes))
        return ns

    def page(self) -> str:
        with self.lock:
            lines = ["# TYPE tgi_queue_size gauge", "tgi_queue_size 0"]
            if self.received_count:
                lines += ["# TYPE tgi_request_count counter", f"tgi_request_count {self.received_count}"]
            if count := sum(self.generated.counts):
                lines += ["# TYPE tgi_request_success counter", f"tgi_request_success {count}"]
                told = self.durations | {
                    "tgi_request_generated_tokens": self.generated,
                    "tgi_request_input_length": self.inputs,
                }
                for name, histogram in told.items():
                    lines += histogram.lines(name)
        return "\n".join([*lines, ""])


SGLANG_TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0)
SGLANG_ITL = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6)
SGLANG_QUEUE = (0.0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class SGLang(Emulation):
    """SGLang 0.5.23: its id is the body's rid; tells in spans, /metrics and, a line a request, in its export file."""

    def __init__(self, exporter: Exporter | None = None, export_file: Path | None = None, port: int = 0) -> None:
        self.export_file = export_file
        self.ttft, self.itl, self.queue = Histogram(SGLANG_TTFT), Histogram(SGLANG_ITL), Histogram(SGLANG_QUEUE)
        self.tpot, self.e2e = Histogram(SGLANG_ITL), Histogram(SGLANG_TTFT)
        self.prompt_tokens = self.output_tokens = 0
        super().__init__(exporter, port)

    def answer(self, headers: dict[str, str], body: dict) -> Iterator[object]:
        life = Life(body)
        rid = body["rid"]

        def chunk(choices: list, **more: object) -> bytes:
            head = {"id": rid, "object": "chat.completion.chunk", "created": 1795230000, "model": "demo-model"}
            return chunked(event(head | {"choices": choices} | more))

        def delta(reason: str | None = None, **fields: str) -> bytes:
            one = {"index": 0, "delta": {"reasoning_content": None} | fields, "logprobs": None}
            return chunk([one | {"finish_reason": reason, "matched_stop": None}])

        yield HEAD
        yield from self.until_first_token(life)
        yield delta(role="assistant", content="")
        gaps = []
        for number in range(life.tokens):
            if number:
                before = life.last
                yield from self.next_token(life)
                gaps.append((life.last - before) / 1e9)
            yield delta(content=f"w{number} ")
        yield delta("length")
        self._finish(headers, rid, life, gaps)
        counts = {"prompt_tokens": life.prompt_tokens, "completion_tokens": life.tokens}
        yield chunk([], usage=counts | {"total_tokens": life.prompt_tokens + life.tokens, "reasoning_tokens": 0})
        yield chunked(DONE) + END

    def _finish(self, headers: dict[str, str], rid: str, life: Life, gaps: list[float]) -> None:
        now = time.monotonic_ns()
        received_ts = time.time() - (now - life.received) / 1e9
        dispatched, forward = (received_ts + (at - life.received) / 1e9 for at in (life.queued, life.started))
        prefilled = received_ts + (life.first - life.received) / 1e9
        ttft, e2e = (life.first - life.received) / 1e9, (now - life.received) / 1e9
        queue, decode = (life.started - life.queued) / 1e9, (now - life.first) / 1e9
        told = {
            "ttft": ttft, "e2e": e2e, "queue": queue, "decode": decode, "tpot": decode / (life.tokens - 1),
            "tokenize": (life.queued - life.received) / 1e9, "prefill": (life.first - life.started) / 1e9,
        }  # fmt: skip
        row = {
            "request_parameters": json.dumps({"rid": rid, "stream": True}), "id": rid,
            "finish_reason": {"type": "length", "length": life.tokens}, "prompt_tokens": life.prompt_tokens,
            "weight_version": "default", "num_retractions": 0, "forward_entry_time": forward,
            "prefill_finished_time": prefilled, "queue_time": queue, "reasoning_tokens": 0,
            "completion_tokens": life.tokens, "cached_tokens": 0, "e2e_latency": e2e,
            "request_received_ts": received_ts, "first_token_latency": ttft,
            "api_server_dispatch_finish_ts": dispatched, "request_finished_ts": received_ts + e2e,
            "decode_throughput": (life.tokens - 1) / decode,
        }  # fmt: skip
        with self.lock:
            self.told[headers["x-request-id"]] = told
            for histogram, value in (
                (self.ttft, ttft), (self.queue, queue), (self.tpot, told["tpot"]), (self.e2e, e2e),
            ):  # fmt: skip
                histogram.observe(value)
            for gap in gaps:
                self.itl.observe(gap)
            self.prompt_tokens += life.prompt_tokens
            self.output_tokens += life.tokens
            if self.export_file is not None:
                with self.export_file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if self.exporter is not None:
            attributes = {
                "rid": rid,
                "module": "sglang::request",
                "gen_ai.latency.time_to_first_token": ttft,
                "gen_ai.latency.e2e": e2e,
                "gen_ai.latency.time_in_queue": queue,
                "gen_ai.latency.time_in_model_prefill": (life.first - life.queued) / 1e9,  # the queue is in it
                "gen_ai.latency.time_in_model_decode": decode,
                "gen_ai.latency.time_in_model_inference": (now - life.queued) / 1e9,
                "gen_ai.usage.prompt_tokens": life.prompt_tokens,
                "gen_ai.usage.completion_tokens": life.tokens,
                "gen_ai.usage.cached_tokens": 0,
                "gen_ai.response.finish_reasons": '["length"]',
            }
            trace_id, parent_id = traceparent(headers)
            kind = Span.SPAN_KIND_INTERNAL
            self.exporter(span(f" Req {rid[:8]}", trace_id, parent_id, kind, attributes=attributes))
            stage = span("prefill_forward", trace_id, "0123456789abcdef", kind, attributes={"module": "sglang::stage"})
            self.exporter(stage)

    def page(self) -> str:
        labels = {"engine_type": "unified", "model_name": "demo-model"}
        streaming = labels | {"is_streaming": "true"}
        with self.lock:
            lines = list(self.queue.lines("sglang:queue_time_seconds", tp_rank="0", pp_rank="0", **labels))
            if count := sum(self.e2e.counts):
                lines += self.ttft.lines("sglang:time_to_first_token_seconds", **streaming)
                lines += self.itl.lines("sglang:inter_token_latency_seconds", **labels)
                lines += self.tpot.lines("sglang:request_time_per_output_token_seconds", **streaming)
                lines += self.e2e.lines("sglang:e2e_request_latency_seconds", **streaming)
                counters = {"prompt_tokens": self.prompt_tokens, "generation_tokens": self.output_tokens}
                for name, value in (counters | {"num_requests": count}).items():
                    lines += [f"# TYPE sglang:{name}_total counter"]
                    lines += [f"sglang:{name}_total{_labels(streaming)} {float(value)}"]
        return "\n".join([*lines, ""])


class LlamaCpp(Emulation):
    """llama.cpp's server: timings inside the last chunk, six digits in /metrics, ids of its own.

    It begins as one that has long been at work, so that the digits of its counters no longer reach down to 1.
    """

    def __init__(self, port: int = 0) -> None:
        self.totals = {
            "prompt_tokens_total": 1_234_567, "prompt_tokens_cached_total": 8123, "prompt_seconds_total": 612.3461,
            "tokens_predicted_total": 98_765, "tokens_predicted_seconds_total": 1998.77, "n_decode_total": 40_123,
        }  # fmt: skip
        self.busy = 0
        super().__init__(port=port)

    def answer(self, headers: dict[str, str], body: dict) -> Iterator[object]:
        life = Life(body)
        chunk_id = f"chatcmpl-{secrets.token_hex(12)}"

        def chunk(choices: list, **more: object) -> bytes:
            head = {"created": 1795230000, "id": chunk_id, "model": "demo.gguf", "object": "chat.completion.chunk"}
            return chunked(event({"choices": choices} | head | {"system_fingerprint": "b1-0000000"} | more))

        def delta(reason: str | None = None, **fields: str | None) -> bytes:
            return chunk([{"finish_reason": reason, "index": 0, "delta": fields}])

        yield HEAD
        yield from self.until_first_token(life)
        yield delta(role="assistant", content=None)
        for number in range(life.tokens):
            if number:
                yield from self.next_token(life)
            yield delta(content=f"w{number} ")
        yield delta("length")
        prompt_ms, predicted_ms = (life.first - life.started) / 1e6, (life.last - life.first) / 1e6
        timings = {
            "cache_n": 0, "prompt_n": life.prompt_tokens, "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / life.prompt_tokens,
            "prompt_per_second": 1e3 * life.prompt_tokens / prompt_ms,
            "predicted_n": life.tokens, "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / life.tokens,  # as older builds divide
            "predicted_per_second": 1e3 * life.tokens / predicted_ms,
        }  # fmt: skip
        with self.lock:
            self.told[headers["x-request-id"]] = {
                "prefill": prompt_ms / 1e3, "decode": predicted_ms / 1e3, "tpot": predicted_ms / 1e3 / (life.tokens - 1)
            }  # fmt: skip
            for name, gained in (
                ("prompt_tokens_total", life.prompt_tokens), ("prompt_seconds_total", prompt_ms / 1e3),
                ("tokens_predicted_total", life.tokens), ("tokens_predicted_seconds_total", predicted_ms / 1e3),
                ("n_decode_total", life.tokens),
            ):  # fmt: skip
                self.totals[name] += gained
        counts = {"completion_tokens": life.tokens, "prompt_tokens": life.prompt_tokens}
        counts |= {"total_tokens": life.tokens + life.prompt_tokens, "prompt_tokens_details": {"cached_tokens": 0}}
        yield chunk([], usage=counts, timings=timings)
        yield chunked(DONE) + END

    def page(self) -> str:
        lines = []
        with self.lock:
            for name, value in self.totals.items():
                lines += [f"# TYPE llamacpp:{name} counter", f"llamacpp:{name} {value:.6g}"]
        for name in ("predicted_tokens_seconds", "requests_processing", "requests_deferred"):
            lines += [f"# TYPE llamacpp:{name} gauge", f"llamacpp:{name} 0"]
        return "\n".join([*lines, ""])


class Gateway(FakeServer):
    """A proxy that holds each request back for a while, then passes it on; with a span of its own in the trace."""

    def __init__(self, upstream: str, exporter: Exporter, holds_s: float) -> None:
        self.upstream, self.exporter, self.holds_s = upstream, exporter, holds_s
        self.client = httpx.Client()
        super().__init__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.client.close()
        self.exporter.close()

    def answer(self, headers: dict[str, str], body: dict) -> Iterator[object]:
        started = time.monotonic_ns()
        trace_id, parent_id = traceparent(headers)
        ours = secrets.token_hex(8)
        passed_on = {"x-request-id": headers["x-request-id"], "traceparent": f"00-{trace_id}-{ours}-01"}
        first_ns = 0
        yield self.holds_s
        url = f"{self.upstream}/v1/chat/completions"
        with self.client.stream("POST", url, json=body, headers=passed_on) as answer:
            yield HEAD
            for piece in answer.iter_raw():
                first_ns = first_ns or time.monotonic_ns() - started
                yield chunked(piece)
        attributes = {"http.response.status_code": 200, "gen_ai.latency.time_to_first_token": first_ns / 1e9}
        seconds = (time.monotonic_ns() - started) / 1e9
        self.exporter(span("POST /v1", trace_id, parent_id, seconds=seconds, attributes=attributes))
        yield END


def main() -> None:
    kind, port = sys.argv[1:]
    with {"tgi": Tgi, "sglang": SGLang, "llamacpp": LlamaCpp}[kind](port=int(port)):
        threading.Event().wait()


if __name__ == "__main__":
    main()
