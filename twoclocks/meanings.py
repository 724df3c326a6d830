"""Meanings: what the names in a run folder mean that no struct or function of their own explains.

Data alone. docs/reference is made of it (scripts/reference.py), and a test holds that each name of the code is here.
What has a definition elsewhere is not: fields of an experiment and of a record have a comment beside them, metrics the
first paragraph of their docstring, verdict rules theirs, families of Prometheus their help text.
"""

EXIT_CODES = {
    0: "done, and within the SLO if there is one",
    1: "done, but the SLO or a gate was missed, or requests failed; of doctor: there is a problem",
    2: "bad usage, or an experiment, a request file or a run folder that cannot be used; nothing was sent",
    3: "the target was not reachable or not ready",
    4: "the run is INVALID: its figures do not measure what they claim",
    130: "several runs (sweep, search, study) or an in-process run, interrupted by Ctrl-C; what had arrived is kept. "
    "A single run that is stopped is judged as it stands, 0 .. 4",
}
"""Exit code of every command -> when."""

FILES = {
    "experiment.yaml": "the experiment as resolved, every key with its value; secrets are masked",
    "run.json": "versions, host, command line, clock, measuring window, notes; see below",
    "requests.jsonl": "a line a request with the arrival of every chunk; see below",
    "server_requests.jsonl": "a line for each request that the server told of in a span or stage; see below",
    "server_samples.jsonl": "a line a scrape of /metrics, which holds the series that had changed",
    "server.log": "the server's log as it was followed while the run lasted",
    "server-added.log": "a log that was added later with `twoclocks report RUN --server-log FILE`",
    "engine.log": "what an engine in process (target.api: in-process) wrote",
    "gpu_samples.jsonl": "a line a sample of each GPU: utilisation, memory, power, energy, clocks, temperature",
    "process_samples.jsonl": "a line a sample of the memory of the server's processes",
    "self_samples.jsonl": "a line a second of each process of the load generator; see below",
    "calibration.json": "the instrument's own error at this load, put here by `twoclocks calibrate --into`",
    "summary.json": "every figure of the report, with units and definitions",
    "summary.txt": "what the terminal showed",
    "vllm_bench.json": "the run in the layout of vLLM's benchmark result, by vLLM's definitions",
    "report.html": "the report, one file that needs no network",
    "plots/client_vs_server_violin.png": "both clocks, request by request",
    "plots/waterfall.png": "where the time to the first token went",
    "plots/server_histograms.png": "the server's own histograms, with the client's values in the same buckets",
    "plots/timeline.png": "users, requests, tokens and KV cache over the run",
    "plots/curves.png": "of a sweep or search: latencies and throughput over the levels",
    "sweep.json": "of a sweep or search, in the folder of all its runs: which levels, with which outcome",
    "study.json": "of a study, in the folder of all its runs: which targets, variants and repeats, with which outcome",
    "report.md": "of a study: its tables as markdown",
}
"""File of a run folder -> what it holds. Raw files are never rewritten; the report's are, by `twoclocks report`."""

RUN_JSON = {
    "twoclocks_version": "of the tool that made the run",
    "started_at_unix": "second 0 of the run's clock, as Unix time",
    "host": "hostname, cpu_count, platform, cpu_model, python of the machine that ran the load",
    "command_line": "as it was typed, secrets masked",
    "status": "running (also of a run that was killed), finished, interrupted or failed",
    "window": "started_at and ended_at of the measuring window, s on the run's clock",
    "ended_at": "end of the run, drain included, s on the run's clock",
    "in_flight": "requests that had no end when the run ended; null: not known",
    "lost_records": "requests that workers had begun, as far as the master heard, and that have no record",
    "unwritten_records": "finished requests whose lines the disk did not take",
    "wall_clock_set_s": "by how much the wall clock moved against the monotonic one while the run lasted, s",
    "missing_workers": "workers that ended before the run did",
    "workers": "processes that sent load",
    "fleet": "a row a worker, in s on the run's clock: host, pid; late, joined_at, heard_until, done_at; begun, "
    "records, lost; due_not_sent of one that went missing in an open loop; silences, from the last word to the next; "
    "held_s, how long it held requests back; frames, frames_repeated; clock: shared with the master, offset_s (the "
    "master's less its own, at the last), error_s (the largest), drift (s/s), round_trip_s (the least), exchanges",
    "notes": "what the run noticed and a reader should know, in sentences",
    "overrides": "keys that --set, Locust's options or the web form changed, with their values",
    "labels": "the experiment's own",
    "reader": "native or python: what received the streams",
    "target": "name, url, server, api, model, server_version; of a server that was started: how",
    "warmup": "rounds, requests and seconds of the warm-up, and whether it became stable",
    "levels": "of shape steps: users and started_at of each level",
    "foreign_spans": "spans of other requests that were left out as they came",
    "prefix_intended": "what a perfect prefix cache could have answered of the prompts that were sent, characters",
    "not_sent": "requests that were due while load.max_in_flight others were under way",
    "turns_not_sent": "turns of sessions that were not sent, by reason",
    "versions": "of an engine in process: of its packages",
    "memory": "of an engine in process: what it told of its memory",
}
"""Key of run.json -> what it holds."""

SUMMARY = {
    "twoclocks_version": "of the tool that made this summary",
    "run": "the run folder's name",
    "label": "how tables call it",
    "status": "as in run.json",
    "partial": "why the run is not whole, in a sentence; null: it is",
    "verdict": "level (VALID, SUSPECT, INVALID) and reasons, each with figure and remedy",
    "slo": "limits, required_share, share and met; null without an SLO",
    "notes": "what a reader should know, in sentences",
    "target": "as in run.json",
    "window": "the measuring window on the run's clock",
    "figures": "the figures of the run; see below",
    "rosetta": "the same run by the definitions of other load testers, a row a tool",
    "warmup": "as in run.json",
    "attempts": "of `retries`: how many attempts the asks took, and latencies from the first intent",
    "levels": "of shape steps: figures of each level",
    "prefix_cache": "the intended share of the prefix cache beside what the server says",
    "sessions": "of conversations: how many were played, and to their end",
    "turns": "of conversations: figures by turn",
    "errors": "requests that did not end ok, by status and error kind, with an example of each",
    "join": "how many requests are joined with the server's own timing, from what, and why others are not",
    "instrument": "the instrument's own error at about this load; null: not calibrated",
    "client_vs_server": "mean and median of what both clocks say of the very same requests",
    "waterfall": "where the time to the first token went, part by part",
    "decode": "time per output token by both clocks",
    "stages": "the time between neighbours on the way from the client to the server",
    "untold": "what this server does not tell, and how to start it so that it does",
    "scraped": "from when to when the server's counters were read, and which requests lie in that time",
    "server_window": "what /metrics told of that time: histograms and counters, with their definitions",
    "log_series": "what the server's log said of the engine: mean and maximum of each series",
    "gpu": "what each GPU did in the measuring window, and all of them together",
    "gpu_definitions": "what the figures of `gpu` mean",
    "memory": "of the server's processes and its KV cache",
    "side_effects": "what our own scraping changed of what it read, or of what others read",
    "checks": "what two clocks or counters say of the same thing, held against each other",
    "intervals": "95 % intervals of the headline figures",
    "interval_definition": "how those intervals are made",
    "spread": "empirical distributions of the latencies",
    "stutter": "share of answers with a stall, and how long a steady reader waits",
    "worst": "the slowest requests, each with its chunks",
}
"""Top key of summary.json -> what it holds."""

ERROR_KINDS = {
    "connect_timeout": "no connection, or no TLS handshake, within timeouts.connect_s",
    "refused": "nobody listens at the address; of an engine in process: it refused the request",
    "dns": "the name of the host has no address",
    "connect": "the connection could not be made for another reason, which the message names",
    "proxy": "the proxy of the environment did not open a tunnel",
    "tls": "the TLS handshake failed: certificate, name or protocol",
    "send_timeout": "the server did not take the request within timeouts.first_token_s",
    "reset": "the connection was reset",
    "closed": "the server closed the connection before the end of its answer",
    "protocol": "what came is no HTTP/1.1",
    "too_large": "an answer beyond the limit of 64 MiB",
    "no_memory": "the load generator had no memory for the answer",
    "total_timeout": "not over after timeouts.total_s",
    "first_token_timeout": "no token after timeouts.first_token_s",
    "idle_timeout": "silence of more than timeouts.idle_s between two reads",
    "no_file_handle": "the tester itself had no file handle left for a connection; the server never saw the request",
    "stopped": "cut off by the end of the run",
    "hung_up": "closed by its user, as workload.cancel_share drew; no failure",
    "gave_up": "no first token within workload.patience_s; no failure, but a miss of the SLO",
    "http_NNN": "a status other than 200; the message holds what the server said",
    "context_length": "prompt and answer do not fit the model's context",
    "error_event": "the stream held an error, under status 200",
    "not_a_stream": "status 200, but no stream of events",
    "not_an_answer": "of target.stream: false: status 200 without any choice",
    "malformed": "an event that is no JSON of the expected form",
    "no_end": "the stream ended without a finish reason or [DONE]",
    "out_of_memory": "of an engine in process: the batch did not fit",
    "engine": "of an engine in process: it failed",
    "engine_ended": "of an engine in process: its process ended",
}
"""error_kind of requests.jsonl -> what happened."""

REQUEST_TABLE = {
    "ttft": "metrics.ttft",
    "tpot": "metrics.tpot",
    "e2e": "metrics.e2e",
    "e2e_per_token": "metrics.e2e_per_token",
    "first_event": "metrics.first_event",
    "itl_mean": "mean of the request's chunk gaps, s",
    "itl_max": "largest of the request's chunk gaps, s",
    "tpot_estimated": "is its TPOT an estimate, as the first chunk's tokens are not known?",
    "latency_from_intended": "last token chunk - intended_at, s",
    "ttft_from_intended": "first token chunk - intended_at, s",
    "chunk_token_sum": "tokens of all its chunks; NaN where one is not known",
    "got_token": "did a token come at all?",
    "server_source": "what its server timing is from: in-band, otlp or log",
    "server_kind": "whose words those are: vllm, tgi, sglang, ...",
    "server_unmatched": "why it has no server timing",
    "server_children": "requests that the server made of it, with n > 1",
    "server_cached_tokens": "prompt tokens that the server had in its prefix cache",
}
"""Column of load_run(...).requests beside those of requests.jsonl -> meaning, or the function that defines it. The
durations server_NAME are those of clocks.METRICS."""
