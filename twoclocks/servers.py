"""Starts a real inference server, waits until it answers, and ends it with everything that it started.

`twoclocks run`, scripts/demo.py and the tests use it. It knows nothing of load or of Locust, and works in a process
that gevent has patched: plain subprocess, socket and httpx.

Flags and environment are those that vLLM 0.32 (CPU build) and transformers 5.23 need without a GPU and without a hub.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
import msgspec

from . import keeper
from .errors import TargetError

ServerKind = Literal["vllm", "transformers"]
Progress = Callable[[str], None]

USUAL_START = {"vllm": "25-45 s", "transformers": "7-20 s"}
POLL_S = 0.5
PROGRESS_S = 5.0
LOG_TAIL_BYTES = 64_000

_VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a share of the machine's memory
    "VLLM_HOST_IP": "127.0.0.1",  # its processes talk over loopback, not over the address that leads outside
    "VLLM_LOG_STATS_INTERVAL": "1",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_SERVICE_NAME": "vllm",
}

# The command `transformers`, which with continuous batching then logs the queue time and the end of each request: its
# only timing, a debug message on a logger that --log-level does not reach in 5.23.
_TRANSFORMERS = """\
import logging
from transformers.cli.transformers import main
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.DEBUG)
main()
"""

_TELLING = re.compile(r"\b\w*(Error|Exception)\b ?:|^error: |\bCRITICAL\b|Killed", re.MULTILINE)


class Server(msgspec.Struct, frozen=True):
    """A server that answers."""

    url: str
    model: str  # the name to send in a request
    pid: int
    log_path: Path


def cache_folder() -> Path:
    """Where environments and models are kept: outside the clone, so that every clone uses the same ones.

    scripts/prepare.py, which can import nothing, has the same rule.
    """
    if own := os.environ.get("TWOCLOCKS_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "twoclocks"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_command(
    kind: ServerKind, python: Path, model: Path, served_model_name: str | None, port: int, flags: Sequence[str] = ()
) -> list[str]:
    """The command line; flags come last and so override ours."""
    if kind == "vllm":
        # The `vllm` command fails in the CPU build (it looks for a package named vllm); the module works.
        ours = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        ours += ["--served-model-name", served_model_name] if served_model_name else []
        ours += ["--host", "127.0.0.1", "--port", str(port)]
        # Eager start takes a third of the compiled one, and float32 is faster than bfloat16 without AVX512-BF16.
        ours += ["--dtype", "float32", "--enforce-eager"]
        ours += ["--enable-per-request-metrics", "--enable-request-id-headers", "--enable-log-requests"]
        ours += ["--logging-config.formatter", "json"]
    else:
        ours = ["-c", _TRANSFORMERS, "serve", str(model)]
        ours += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        # Pages of 256 tokens. Left alone it fills 60 % of the machine's memory with cache before the first token, and
        # takes prompts of 8192 tokens in one go, which on two cores halts every other stream for half a minute.
        ours += ["--continuous-batching", "--cb-num-blocks", "32", "--cb-max-batch-tokens", "512"]
    return [str(python), *ours, *flags]


def server_environment(kind: ServerKind, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, plus what the server needs to run offline, plus extra."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache_folder() / "hf"),
    }
    # An inherited HF_HUB_CACHE would win over HF_HOME.
    environment.pop("HF_HUB_CACHE", None)
    if kind == "vllm":
        environment |= _VLLM_ENVIRONMENT
    else:
        # One core for the load generator, as vLLM leaves by itself. torch's threads wait for each other by spinning:
        # with every core theirs, anything else that runs makes the server five times slower and more.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    return environment | dict(extra or {})


@contextmanager
def started_server(
    *,
    kind: ServerKind,
    python: Path,
    model: Path,
    served_model_name: str | None = None,
    log_path: Path,
    port: int = 0,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    ready_timeout_s: float = 300.0,
    grace_s: float = 10.0,
    progress: Progress | None = None,
) -> Iterator[Server]:
    """Starts a server, yields it when it has completed a first token, ends it and all its processes on leaving.

    python: of the environment that the server is installed in. port: 0 takes a free one. transformers serves a model
    under its folder's path, so served_model_name holds for vLLM alone. The log is written anew.
    Raises TargetError when the port is taken, the server ends early, or is not ready in ready_timeout_s.
    """
    port = _usable(port)
    model = model.absolute()
    # transformers answers /v1/models with 500 while this folder is missing.
    (cache_folder() / "hf" / "hub").mkdir(parents=True, exist_ok=True)
    log_path = log_path.absolute()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = server_command(kind, python, model, served_model_name, port, flags)
    with started_command(
        command,
        name=kind,
        url=f"http://127.0.0.1:{port}",
        model=served_model_name if kind == "vllm" and served_model_name else str(model),
        log_path=log_path,
        env=server_environment(kind, env),
        ready_timeout_s=ready_timeout_s,
        grace_s=grace_s,
        progress=progress,
    ) as server:
        yield server


@contextmanager
def started_command(
    command: Sequence[str],
    *,
    name: str,
    url: str,
    model: str,
    log_path: Path,
    env: Mapping[str, str],
    ready_timeout_s: float,
    grace_s: float = 10.0,
    progress: Progress | None = None,
) -> Iterator[Server]:
    """As started_server, for any command that serves the OpenAI API at url."""
    with log_path.open("wb") as log:
        try:
            # In the log's folder: `python -m` puts the working directory first on its path, where a file could shadow.
            kept = keeper.start(command, grace_s=grace_s, cwd=log_path.parent, env=env, stdout=log, stderr=log)
        except OSError as error:
            raise TargetError(f"{name}: {error}; `python3 scripts/prepare.py {name}` installs it") from error
    try:
        _wait_until_ready(kept, name, url, model, log_path, ready_timeout_s, progress or _silent)
        yield Server(url=url, model=model, pid=kept.pid, log_path=log_path)
    finally:
        kept.stop()


def _silent(_line: str) -> None:
    pass


def _usable(port: int) -> int:
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        # As the servers do, so that connections of an earlier server in TIME_WAIT do not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TargetError(
                f"port {port} of 127.0.0.1 cannot be used ({error.strerror}); name another, or 0 for a free one"
            ) from error
    return port


def _wait_until_ready(
    kept: keeper.Kept, name: str, url: str, model: str, log_path: Path, timeout_s: float, progress: Progress
) -> None:
    """Returns when the server has completed one token; TargetError when it ends or takes longer than timeout_s."""
    began = time.monotonic()
    usual = f"usually {USUAL_START[name]}" if name in USUAL_START else f"at most {timeout_s:.0f} s"
    told = began
    progress(f"{name}: starting ({usual})")
    healthy = False
    # trust_env: a proxy named in the environment must not be asked for an address of this machine.
    with httpx.Client(base_url=url, trust_env=False) as client:
        while (waited := time.monotonic() - began) < timeout_s:
            if not kept.running():
                raise TargetError(
                    f"{name} ended before it was ready (exit code {kept.keeper.returncode}): "
                    f"{last_telling_line(log_path)}; its log: {log_path}"
                )
            if not healthy and (healthy := _answers(client)):
                progress(f"{name}: answers after {waited:.0f} s, completing a first token")
            if healthy and _completes(client, name, model, timeout_s - waited):
                progress(f"{name}: ready after {time.monotonic() - began:.0f} s at {url}")
                return
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                progress(f"{name}: starting, {waited:.0f} s ({usual})")
            time.sleep(POLL_S)
    raise TargetError(
        f"{name} was not ready after {timeout_s:.0f} s: {last_telling_line(log_path)}; its log: {log_path}"
    )


def _answers(client: httpx.Client) -> bool:
    for path in ("/health", "/v1/models"):
        try:
            if client.get(path, timeout=2).status_code == 200:
                return True
        except httpx.TransportError:
            return False
    return False


def _completes(client: httpx.Client, name: str, model: str, timeout_s: float) -> bool:
    """Whether one token of a completion came; a refusal that waiting will not mend raises TargetError."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    try:
        answer = client.post("/v1/completions", json=body, timeout=max(timeout_s, 1))
    except httpx.TransportError:
        return False
    if 400 <= answer.status_code < 500:
        raise TargetError(f"{name} refused a first request with HTTP {answer.status_code}: {answer.text[:300]}")
    return answer.status_code == 200


def last_telling_line(log_path: Path) -> str:
    """The last line of a log that names an error, else its last line; JSON log lines give their message."""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - LOG_TAIL_BYTES))
        text = log.read().decode(errors="replace")
    lines = [line for raw in text.splitlines() for line in _message(raw).splitlines() if line.strip()]
    if not lines:
        return "its log is empty"
    return next((line.strip() for line in reversed(lines) if _TELLING.search(line)), lines[-1].strip())


def _message(line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    return str(fields.get("message", line)) if isinstance(fields, dict) else line
