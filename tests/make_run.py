"""Small synthetic run folders for tests of the analysis: records and scrapes of an invented server, as a run has them.

Everything is invented from a seed; nothing here was measured. The invented server's own times are returned, so that
tests compare what the analysis says with what was planted.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from twoclocks.record import Record, encode_record, run_lengths
from twoclocks.server_requests import ServerRequest, encode_server_request

LE_TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, float("inf")]
LE_ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, float("inf")]
LE_E2E = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, float("inf")]


@dataclass
class Planted:
    """What the invented server knows of each request that it answered, in seconds."""

    ended_at: list[float] = field(default_factory=list)
    first_at: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # as /metrics says it: with templating and tokenizing
    tokens: list[int] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)


def record(request_id: str = "0" * 32, **fields: object) -> Record:
    """A record with invented defaults for all that a test does not care about."""
    given = {
        "target": "demo",
        "prompt_id": "p1",
        "user": 0,
        "worker": 0,
        "phase": "measure",
        "intended_at": 0.0,
        "sent_at": 0.0,
        "ended_at": 1.0,
        "status": "ok",
    }
    return Record(request_id=request_id, **(given | fields))


def write_folder(folder: Path, records: list[Record], **meta: object) -> Path:
    """A run folder with these records and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.jsonl").write_bytes(b"".join(map(encode_record, records)))
    (folder / "run.json").write_text(
        json.dumps({"status": "finished", "window": {"started_at": 0.0, "ended_at": 10.0}} | meta)
    )
    return folder


def run_of_ttfts(folder: Path, ttfts, **meta: object) -> Path:
    """A run whose requests have these TTFTs, each of a prompt of its own, one after the other, of two tokens each."""
    made = [
        record(
            f"{number:032x}",
            prompt_id=f"p{number}",
            sent_at=number / 10,
            ended_at=number / 10 + float(ttft) + 0.1,
            chunk_us=[round(float(ttft) * 1e6), 100_000],
            chunk_kinds=[("content", 2)],
            output_tokens=2,
        )
        for number, ttft in enumerate(ttfts)
    ]
    return write_folder(folder, made, **({"window": {"started_at": 0.0, "ended_at": len(made) / 10}} | meta))


def make_run(
    folder: Path,
    *,
    seed: int = 1,
    requests: int = 60,
    users: int = 6,
    server: str = "vllm",
    slow: float = 1.0,
    failures: int = 0,
    queue: float = 0.0,
    spans: bool = False,
    gateway: float | None = None,
) -> Planted:
    """A run of ``requests`` measured requests, two to warm up and ``failures`` refused ones.

    ``server``: vllm (in-band timings and /metrics), transformers (log lines), or silent (tells nothing). ``queue``:
    seconds that each request waits in the server besides. ``spans``: a span a request, too. ``gateway``: seconds that
    a stage of this name adds around the server; its spans tell how long it had the request.
    """
    rng = np.random.default_rng(seed)
    planted, records, log = Planted(), [], []
    free_at = [2.0 + 0.5 * user for user in range(users)]
    for number in range(requests + 2):
        warmup = number < 2
        user = 0 if warmup else int(np.argmin(free_at))
        sent_at = 0.1 + 0.6 * number if warmup else free_at[user]
        made = _request(rng, number, user, sent_at, warmup, server, slow, queue, gateway or 0)
        records.append(made)
        if not warmup:
            free_at[user] = made.ended_at + 0.01
        _plant(planted, made, gateway or 0)
        log.append(
            f"Request {made.request_id} finished: "
            f"prefill_len = {made.prompt_tokens} decode_len = {made.output_tokens} "
            f"start_time = {planted.queue[-1]} "
            f"end_time = {planted.queue[-1] + planted.prefill[-1] + planted.decode[-1]}"
        )
    if server == "silent":
        records = [_without_server(made) for made in records]
    if server == "transformers":
        records = [_without_server(made) for made in records]
    end = max(made.ended_at for made in records)
    for number in range(failures):
        records.append(
            record(
                f"{10_000 + number:032x}",
                intended_at=3.0,
                sent_at=None,
                ended_at=3.1,
                status="error",
                error_kind="refused",
                error_message="<script>alert('server')</script> connection refused",
            )
        )
    write_folder(
        folder,
        sorted(records, key=lambda made: made.ended_at),
        window={"started_at": 2.0, "ended_at": end},
        ended_at=end + 1,
        started_at_unix=1_790_000_000.0,
        twoclocks_version="0.1.0",
        target={
            "name": server,
            "url": "http://127.0.0.1:1",
            "server": server,
            "api": "chat",
            "model": "tiny",
            "server_version": "0",
        },
        host={"hostname": "nowhere", "cpu_count": 2, "platform": "invented", "python": "3.11"},
        command_line=["locust", "-f", "load_test.py"],
        in_flight=0,
        workers=1,
        notes=["an invented run"],
        overrides={},
        labels={},
        versions={"locust": "2"},
        lost_records=0,
    )
    (folder / "experiment.yaml").write_text(
        f"name: invented\nload: {{shape: ramp, users: {users}, ramp_s: 2, duration_s: 20}}\n"
        "slo: {ttft_ms: 250, tpot_ms: 50, e2e_ms: none}\n"
    )
    if spans or gateway is not None:
        (folder / "server_requests.jsonl").write_bytes(b"".join(_spans(planted, records, gateway, spans)))
    if gateway is not None:
        with (folder / "experiment.yaml").open("a") as file:
            file.write(f"target: {{server: {server}, stages: [{{name: gateway, service: gw}}]}}\n")
    if server == "vllm":
        (folder / "server_samples.jsonl").write_text("".join(_scrapes(planted, end)))
    if server == "transformers":
        (folder / "server.log").write_text("\n".join(log) + "\n")
    return planted


def _request(
    rng, number: int, user: int, sent_at: float, warmup: bool, server: str, slow: float, waits: float, outside: float
) -> Record:
    queue = float(rng.exponential(0.008)) * slow + waits
    prefill = float(rng.lognormal(np.log(0.08), 0.3)) * slow
    before = 0.03 + float(rng.exponential(0.02)) + outside
    tokens = int(rng.integers(8, 40))
    # the chunk of step i carries a token; now and then two steps are delivered as one chunk
    steps = rng.lognormal(np.log(0.02 * slow), 0.35, tokens - 1)
    merged = np.concatenate([[False], rng.random(tokens - 1) < 0.05])
    merged[-1] = False
    sampled = before + queue + prefill + np.concatenate([[0.0], np.cumsum(steps)])
    arrivals, counts, waiting = [], [], 0
    for at, held in zip(sampled, merged, strict=True):
        waiting += 1
        if not held:
            arrivals.append(at + 0.002 + float(rng.exponential(0.001)))
            counts.append(waiting)
            waiting = 0
    arrivals = list(np.maximum.accumulate(arrivals))
    micros = np.round(np.array([arrivals[0], *arrivals, arrivals[-1] + 0.0003]) * 1e6).astype(int)
    return record(
        f"{number:032x}",
        target=server,
        prompt_id=f"p{number % 7}",
        user=user,
        phase="warmup" if warmup else "measure",
        intended_at=sent_at - 0.0005,
        sent_at=sent_at,
        written_at=sent_at + 0.0002,
        first_byte_at=sent_at + 0.01,
        ended_at=sent_at + float(micros[-1]) / 1e6,
        chunk_us=np.diff(micros, prepend=0).tolist(),
        chunk_kinds=run_lengths(["role", *["content"] * len(counts), "usage"]),
        chunk_tokens=[0, *counts, 0],
        prompt_tokens=int(rng.integers(10, 200)),
        output_tokens=tokens,
        token_source="usage",
        finish_reason="length",
        http_status=200,
        server={
            "time_to_first_token_ms": prefill * 1e3,
            "queue_time_ms": queue * 1e3,
            "generation_time_ms": float(steps.sum()) * 1e3,
            "mean_itl_ms": float(steps.mean()) * 1e3,
            "tokens_per_second": tokens / (prefill + float(steps.sum())),
        },
    )


def _without_server(made: Record) -> Record:
    return Record(**{name: getattr(made, name) for name in Record.__struct_fields__ if name != "server"})


def _plant(planted: Planted, made: Record, outside: float) -> None:
    server = made.server
    queue, prefill = server["queue_time_ms"] / 1e3, server["time_to_first_token_ms"] / 1e3
    decode = server["generation_time_ms"] / 1e3
    client_ttft = made.chunk_us[0] / 1e6
    planted.ended_at.append(made.ended_at)
    planted.first_at.append(made.sent_at + client_ttft)
    planted.queue.append(queue)
    planted.prefill.append(prefill)
    planted.decode.append(decode)
    planted.ttft.append(client_ttft - 0.004 - outside)
    planted.tokens.append(made.output_tokens)
    planted.steps.append(np.full(made.output_tokens - 1, decode / (made.output_tokens - 1)))
    planted.prompt_tokens.append(made.prompt_tokens)


def _spans(planted: Planted, records: list[Record], gateway: float | None, spans: bool) -> list[bytes]:
    """Lines of server_requests.jsonl, of all records that were answered, last ones first."""
    lines = []
    answered = sorted((made for made in records if made.sent_at is not None), key=lambda made: made.request_id)
    for number, made in enumerate(answered):
        ids = {"source": "otlp", "request_id": made.request_id, "trace_id": made.request_id, "at": made.ended_at + 3}
        if spans:
            told = {name: getattr(planted, name)[number] for name in ("ttft", "queue", "prefill", "decode")}
            told |= {"e2e": planted.ttft[number] + planted.decode[number], "output_tokens": planted.tokens[number]}
            lines.append(encode_server_request(ServerRequest(server="vllm", **ids, **told)))
        if gateway is not None:
            e2e = planted.ttft[number] + planted.decode[number] + gateway
            lines.append(encode_server_request(ServerRequest(server="gateway", **ids, e2e=e2e)))
    return lines[::-1]


def _scrapes(planted: Planted, end: float) -> list[str]:
    """Lines of server_samples.jsonl, one a second, holding only what changed."""
    lines: list[str] = []
    before: dict[str, list[object]] = {}
    for number, at in enumerate([0.0, 1.75, *np.arange(2.0, end + 1.5, 1.0)]):
        now = {json.dumps(sample[:2]): sample for sample in _samples(planted, float(at))}
        changed = [sample for key, sample in now.items() if before.get(key) != sample]
        line = {
            "url": "http://127.0.0.1:1/metrics",
            "at": float(at),
            "until": float(at) + 0.004,
            "samples": changed,
            "error": None,
        }
        if number == 0:
            line["types"] = {"vllm:generation_tokens": "counter", "vllm:num_requests_running": "gauge"}
        lines.append(json.dumps(line) + "\n")
        before = now
    return lines


def _samples(planted: Planted, at: float) -> list[list[object]]:
    engine = {"engine": "0", "model_name": "tiny"}
    begun = np.array(planted.first_at) <= at
    ended = np.array(planted.ended_at) <= at
    pick = lambda values, mask: np.array(values)[mask]  # noqa: E731
    steps = [step for step, done in zip(planted.steps, ended, strict=True) if done]
    samples: list[list[object]] = [
        ["vllm:num_requests_running", engine, float((begun & ~ended).sum())],
        ["vllm:num_requests_waiting", engine, float(max(0, int((begun & ~ended).sum()) - 4))],
        ["vllm:kv_cache_usage_perc", engine, round(float((begun & ~ended).sum()) * 0.06, 4)],
        ["vllm:generation_tokens_total", engine, float(pick(planted.tokens, ended).sum())],
        ["vllm:prompt_tokens_total", engine, float(pick(planted.prompt_tokens, ended).sum())],
        ["process_start_time_seconds", {}, 1.79e9],
    ]
    e2e = np.array(planted.ttft) + planted.decode
    for name, values, bounds in (
        ("time_to_first_token_seconds", pick(planted.ttft, begun), LE_TTFT),
        ("inter_token_latency_seconds", np.concatenate(steps) if steps else np.array([]), LE_ITL),
        ("request_time_per_output_token_seconds", np.array([step.mean() for step in steps]), LE_ITL),
        ("e2e_request_latency_seconds", pick(e2e, ended), LE_E2E),
        ("request_queue_time_seconds", pick(planted.queue, ended), LE_E2E),
        ("request_prefill_time_seconds", pick(planted.prefill, ended), LE_E2E),
    ):
        for bound in bounds:
            le = "+Inf" if bound == float("inf") else str(bound)
            samples.append([f"vllm:{name}_bucket", engine | {"le": le}, float((values <= bound).sum())])
        samples.append([f"vllm:{name}_sum", engine, float(values.sum())])
        samples.append([f"vllm:{name}_count", engine, float(len(values))])
    return samples
