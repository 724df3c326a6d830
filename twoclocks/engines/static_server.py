"""A static batching server: the OpenAI API in front of `generate`, for comparison with servers that batch otherwise.

    python static_server.py --model FOLDER --port 8000 --batch-size 16 --max-wait-ms 50

The first request that waits opens a batch; others join it until it is full, or until that one has waited
--max-wait-ms. The batch is padded and generated until its longest answer has ended, and only then begins the next.

An answer is sent when its batch has ended, also where the client asked for a stream: then as one chunk with all of its
text, so that its time to first token is its whole time and there is none between tokens. With --stream-steps each token
is sent as it is made: the time to first token is then waiting and prefill, and an answer ends with its own last token.

Loopback only. Standard library, torch and transformers, and the files beside this one.
"""

import argparse
import contextlib
import json
import queue
import select
import signal
import socket
import sys
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from asks import Answer, Ask, Refused, ask_from, one_line  # beside this file, which is started by path

MAX_BODY_BYTES = 32 << 20
POLL_S = 0.2  # how late a client that went away is noticed
PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
TEXT_OVERLAP = 6  # tokens that are decoded again with the next one: a letter may be made of several


@dataclass
class Job:
    """A request from its receipt to its answer. Times are time.monotonic_ns()."""

    ask: Ask
    ids: list[int]
    came_ns: int  # tokenized, and in the line
    begun_ns: int = 0  # its batch began
    batch_size: int = 0
    gone: bool = False  # the client hung up
    answer: Answer | None = None  # once its batch has ended
    made_ns: list[int] = field(default_factory=list)  # when each of its tokens was made
    sent_ns: int = 0  # its first token was sent
    tokens: "queue.SimpleQueue[int | None]" = field(default_factory=queue.SimpleQueue)  # None: the batch has ended

    def timings(self, sent_ns: int) -> dict[str, float | int]:
        """Where its time went, milliseconds: wait + prefill + decode + held is all of it until ``sent_ns``.

        ``first_held``: from its first token until that was sent; without --stream-steps decode and held are in it.
        """
        first, last = (self.made_ns[0], self.made_ns[-1]) if self.made_ns else (sent_ns, sent_ns)
        marks = {"batch_wait_ms": self.begun_ns - self.came_ns, "batch_prefill_ms": first - self.begun_ns}
        marks |= {"batch_decode_ms": last - first, "batch_held_ms": sent_ns - last}
        marks |= {"batch_first_held_ms": (self.sent_ns or sent_ns) - first}
        return {name: round(ns / 1e6, 3) for name, ns in marks.items()} | {"batch_size": self.batch_size}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, and of the answer so far."""
        prompt, made = len(self.ids), len(self.made_ns)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class Line:
    """Requests that wait for a batch, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._changed = threading.Condition()

    def add(self, job: Job) -> None:
        """One more at the end."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def waiting(self) -> int:
        """How many wait."""
        return sum(not job.gone for job in list(self._jobs))

    def next_batch(self, size: int, wait_s: float) -> list[Job]:
        """Up to ``size`` of the first, all with the sampling of the very first; blocks until there is one.

        It waits for more until the first has waited ``wait_s``, which it may have done while another batch ran.
        """
        with self._changed:
            while True:
                self._jobs = [job for job in self._jobs if not job.gone]
                alike = [job for job in self._jobs if job.ask.sampling == self._jobs[0].ask.sampling][:size]
                if alike:
                    left = alike[0].came_ns / 1e9 + wait_s - time.monotonic()
                    if len(alike) == size or left <= 0:
                        self._jobs = [job for job in self._jobs if job not in alike]
                        return alike
                self._changed.wait(min(left, POLL_S) if alike else None)


class Counts:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.running = self.requests = self.failed = self.prompt_tokens = self.generated = self.discarded = 0
        self.batches = [0] * (len(BATCH_SIZES) + 1)
        self.batched = 0

    def page(self, waiting: int) -> str:
        """Prometheus text."""
        families = (
            ("num_requests_running", "gauge", "requests of the batch that runs", self.running),
            ("num_requests_waiting", "gauge", "requests that wait for a batch", waiting),
            ("requests_total", "counter", "requests that were answered", self.requests),
            ("failed_requests_total", "counter", "requests whose batch failed", self.failed),
            ("prompt_tokens_total", "counter", "tokens of prompts, padding left out", self.prompt_tokens),
            ("generation_tokens_total", "counter", "tokens of answers, counted when the batch ends", self.generated),
            ("discarded_tokens_total", "counter", "tokens made in rows whose answer had ended", self.discarded),
        )
        lines = []
        for name, kind, text, value in families:
            lines += [f"# HELP pytorch:{name} {text}", f"# TYPE pytorch:{name} {kind}", f"pytorch:{name} {value}"]
        lines += ["# HELP pytorch:batch_size requests of a batch", "# TYPE pytorch:batch_size histogram"]
        total = 0
        for bound, count in zip([*map(str, BATCH_SIZES), "+Inf"], self.batches, strict=True):
            total += count
            lines.append(f'pytorch:batch_size_bucket{{le="{bound}"}} {total}')
        return "\n".join([*lines, f"pytorch:batch_size_sum {self.batched}", f"pytorch:batch_size_count {total}", ""])


class Batcher:
    """Runs batch after batch, in a thread of its own."""

    def __init__(self, engine: Any, *, size: int, wait_s: float) -> None:
        self.engine, self.size, self.wait_s = engine, size, wait_s
        self.line, self.counts = Line(), Counts()

    def run(self) -> None:
        """For ever."""
        while True:
            self.one(self.line.next_batch(self.size, self.wait_s))

    def one(self, jobs: Sequence[Job]) -> None:
        """A batch to its end; each job then has its answer."""
        counts, begun_ns = self.counts, time.monotonic_ns()
        counts.running = len(jobs)
        counts.batches[bisect_left(BATCH_SIZES, len(jobs))] += 1
        counts.batched += len(jobs)
        for job in jobs:
            job.begun_ns, job.batch_size = begun_ns, len(jobs)

        def on_token(row: int, token: int, now_ns: int) -> bool:
            jobs[row].made_ns.append(now_ns)
            jobs[row].tokens.put(token)
            return not jobs[row].gone

        try:
            answers = self.engine.generate([job.ask for job in jobs], [job.ids for job in jobs], on_token)
        except Exception as error:  # noqa: BLE001  whatever an engine raises ends this batch, not the server
            sys.stderr.write(f"a batch of {len(jobs)} failed: {type(error).__name__}: {one_line(error)}\n")
            answers = [Answer(job.ask.id, error=f"{type(error).__name__}: {one_line(error)}") for job in jobs]
            counts.failed += len(jobs)
        else:
            made = [len(answer.token_ids) for answer in answers]
            counts.requests += sum(not job.gone for job in jobs)
            counts.prompt_tokens += sum(answer.prompt_tokens for answer in answers)
            counts.generated += sum(made)
            counts.discarded += max(made) * len(made) - sum(made)
        counts.running = 0
        for job, answer in zip(jobs, answers, strict=True):
            job.answer = answer
            job.tokens.put(None)


class Spoken:
    """Tokens -> text, bit by bit: what a further token adds. An unfinished letter is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._said = 0  # decode from here on; up to there it has been said

    def add(self, token: int) -> str:
        """The text that this token adds; often none."""
        self._ids.append(token)
        text = self._unsaid()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._say(text)

    def rest(self) -> str:
        """What was held back until the end."""
        return self._say(self._unsaid())

    def _unsaid(self) -> str:
        said = self._decode(self._ids[self._from : self._said])
        return self._decode(self._ids[self._from :])[len(said) :]

    def _say(self, text: str) -> str:
        self._from, self._said = max(self._from, len(self._ids) - TEXT_OVERLAP), len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Form:
    """How an answer is to look: what a request's body says of that."""

    api: str  # chat | completions
    id: str
    model: str
    stream: bool
    usage: bool
    running_usage: bool

    def chunk(self, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
        """An event of a stream."""
        if self.api == "completions":
            choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
            return self._whole("text_completion", [choice])
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return self._whole("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": reason}])

    def last(self, usage: dict[str, int], timings: dict[str, Any]) -> dict[str, Any]:
        """The event after the answer, with usage and timings."""
        kind = "text_completion" if self.api == "completions" else "chat.completion.chunk"
        return self._whole(kind, []) | {"usage": usage, "metrics": timings}

    def answer(self, answer: Answer, usage: dict[str, int], timings: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        said = {"text": answer.text} if self.api == "completions" else {
            "message": {"role": "assistant", "content": answer.text}
        }  # fmt: skip
        kind = "text_completion" if self.api == "completions" else "chat.completion"
        choice = {"index": 0, **said, "finish_reason": answer.finish_reason}
        return self._whole(kind, [choice]) | {"usage": usage, "metrics": timings}

    def _whole(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model, "choices": choices}


class Server(ThreadingHTTPServer):
    """What all connections share."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, batcher: Batcher, *, names: Sequence[str], stream_steps: bool) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.batcher, self.names, self.stream_steps = batcher, tuple(names), stream_steps
        self.tokenizing = threading.Lock()  # a fast tokenizer may be borrowed by one thread at a time


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request would be work beside the engine's."""

    def do_GET(self) -> None:
        """Health, models, version, metrics."""
        path, batcher = self.path.partition("?")[0], self.server.batcher
        if path == "/health":
            self._send(200, b"", "text/plain")
        elif path == "/metrics":
            self._send(200, batcher.counts.page(batcher.line.waiting()).encode(), "text/plain; version=0.0.4")
        elif path == "/version":
            self._json(200, {"version": batcher.engine.told()["server_version"]})
        elif path == "/v1/models":
            about = {"object": "model", "owned_by": "static_server", "max_model_len": batcher.engine.context}
            self._json(200, {"object": "list", "data": [{"id": self.server.names[0], **about}]})
        elif path in PATHS:
            self._refuse(405, f"{path} takes POST")
        else:
            self._refuse(404, f"there is nothing at {path:.200}")

    def do_POST(self) -> None:
        """Completions."""
        path = self.path.partition("?")[0]
        body = self._body()
        if body is None:
            return
        if path not in PATHS:
            self._refuse(404, f"there is nothing to POST to at {path:.200}")
            return
        request_id = self.headers.get("X-Request-Id") or uuid.uuid4().hex
        try:
            form, ask = self._form(PATHS[path], request_id, body)
            with self.server.tokenizing:
                ids = self.server.batcher.engine.encode(ask)
        except Refused as refusal:
            self._refuse(404 if str(refusal).startswith("model:") else 400, str(refusal))
            return
        job = Job(ask, ids, time.monotonic_ns())
        self.server.batcher.line.add(job)
        try:
            self._answer(form, job)
        except OSError:  # the client has hung up
            self.close_connection = True
        finally:
            job.gone = job.answer is None

    def _form(self, api: str, request_id: str, raw: bytes) -> tuple[Form, Ask]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise Refused("the body is not JSON") from None
        ask = ask_from(request_id, body)
        needed = "messages" if api == "chat" else "prompt"
        if body.get(needed) is None:
            raise Refused(f"{needed}: this path needs it")
        if body.get("model") not in (None, *self.server.names):
            raise Refused(f"model: {body['model']!r:.200} is not served here; {self.server.names[0]!r} is")
        options = body.get("stream_options")
        options = options if isinstance(options, dict) else {}
        name = f"{'chatcmpl' if api == 'chat' else 'cmpl'}-{request_id}"
        wants = [options.get(key) is True for key in ("include_usage", "continuous_usage_stats")]
        return Form(api, name, self.server.names[0], body.get("stream") is True, *wants), ask

    def _answer(self, form: Form, job: Job) -> None:
        """Wait for the batch, and send. Raises OSError when the client is gone."""
        tokens = self._tokens(job)
        if form.stream and self.server.stream_steps:
            self._send_steps(form, job, tokens)
            return
        for _ in tokens:
            pass
        assert job.answer is not None
        if job.answer.error is not None:
            self._refuse(500, f"the engine failed: {job.answer.error}")
        elif form.stream:
            job.sent_ns = time.monotonic_ns()
            self._begin_stream(job.ask.id)
            self._event(form.chunk(job.answer.text, None, first=True), form, job.usage())
            self._event(form.chunk("", job.answer.finish_reason, first=False), form, job.usage())
            self._end_stream(form, job, job.sent_ns)
        else:
            whole = form.answer(job.answer, job.usage(), job.timings(time.monotonic_ns()))
            self._json(200, whole, {"X-Request-Id": job.ask.id})

    def _send_steps(self, form: Form, job: Job, tokens: Iterator[int]) -> None:
        """Each token as it is made, its text perhaps with a later one; it ends with its own last token."""
        engine = self.server.batcher.engine
        spoken, prompt = Spoken(engine.tokenizer), len(job.ids)
        reason = None
        for count, token in enumerate(tokens, 1):
            if count == 1:
                job.sent_ns = time.monotonic_ns()
                self._begin_stream(job.ask.id)
            if token in engine.ends and not job.ask.ignore_eos:
                reason = "stop"
            elif count >= job.ask.max_tokens:
                reason = "length"
            with self.server.tokenizing:
                text = "" if reason == "stop" else spoken.add(token)
                text += spoken.rest() if reason else ""
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
            self._event(form.chunk(text, reason, first=count == 1), form, usage)
            if reason:
                self._end_stream(form, job, time.monotonic_ns())
                return
        why = job.answer.error if job.answer is not None else None
        if job.made_ns:
            self._event({"error": {"message": f"the engine failed: {why}", "type": "server_error"}})
            self._write_chunk(b"")
        else:
            self._refuse(500, f"the engine failed: {why}")

    def _tokens(self, job: Job) -> Iterator[int]:
        """The job's tokens as they are made, until its batch has ended; looks now and then whether anybody is there."""
        while True:
            try:
                token = job.tokens.get(timeout=POLL_S)
            except queue.Empty:
                self._still_there()
                continue
            if token is None:
                return
            yield token

    def _still_there(self) -> None:
        """Raises OSError if the client has hung up."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    def _begin_stream(self, request_id: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("X-Request-Id", request_id)
        self.end_headers()

    def _event(self, event: dict[str, Any], form: Form | None = None, usage: dict[str, int] | None = None) -> None:
        if form is not None and form.running_usage and usage is not None:
            event = event | {"usage": usage}
        self._write_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _end_stream(self, form: Form, job: Job, sent_ns: int) -> None:
        if form.usage:
            self._event(form.last(job.usage(), job.timings(sent_ns)))
        self._write_chunk(b"data: [DONE]\n\n")
        self._write_chunk(b"")

    def _write_chunk(self, data: bytes) -> None:
        """One piece of chunked transfer; the empty one is the last."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _body(self) -> bytes | None:
        """The request's body; None when it was refused, and the connection with it."""
        length = self.headers.get("Content-Length", "")
        self.close_connection = True  # what is not read would be taken for the next request
        if not length.isdecimal():
            self._refuse(411, "a body needs its Content-Length")
        elif int(length) > MAX_BODY_BYTES:
            self._refuse(413, f"the body has {length} bytes; {MAX_BODY_BYTES} are the most")
        else:
            body = self.rfile.read(int(length))
            self.close_connection = self.headers.get("Connection", "").lower() == "close"
            return body if len(body) == int(length) else None
        return None

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._json(status, {"error": {"message": message, "type": kind, "code": status}})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Until SIGTERM or SIGINT."""
    from pytorch import PyTorch, pytorch_flags

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="a folder, or an id of the hub")
    parser.add_argument("--served-model-name", help="what requests call it (default: --model as given)")
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; 0: a free one")
    parser.add_argument("--batch-size", type=int, default=16, help="requests of a batch, at most (default: 16)")
    parser.add_argument(
        "--max-wait-ms", type=float, default=50, help="how long the first of a batch waits for more (default: 50)"
    )
    parser.add_argument("--stream-steps", action="store_true", help="send tokens as they are made")
    options = pytorch_flags(parser).parse_args(arguments)
    if options.batch_size < 1 or options.max_wait_ms < 0:
        parser.error("--batch-size: expected 1 or more; --max-wait-ms: expected 0 or more")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    engine = PyTorch(
        options.model, device=options.device, dtype=options.dtype, threads=options.threads, attention=options.attention
    )
    names = dict.fromkeys(filter(None, [options.served_model_name, options.model]))
    batcher = Batcher(engine, size=options.batch_size, wait_s=options.max_wait_ms / 1e3)
    try:
        server = Server(options.port, batcher, names=list(names), stream_steps=options.stream_steps)
    except OSError as error:
        sys.stderr.write(f"static_server: port {options.port} of 127.0.0.1 cannot be used: {error.strerror}\n")
        return 2
    threading.Thread(target=batcher.run, daemon=True).start()
    sys.stdout.write(f"serving {next(iter(names))} at http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    with contextlib.closing(server.socket):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
