"""Starts a real inference server, waits until it answers, and ends it with everything that it started.

`twoclocks run`, scripts/demo.py and the tests use it. It knows nothing of load or of Locust, and works in a process
that gevent has patched: plain subprocess, socket and httpx.

Flags and environment are those that vLLM 0.32 and transformers 5.23 need; on a CPU some more, since what they do there
by themselves takes the machine's memory and all its cores.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from . import keeper
from .endpoint import PATHS
from .errors import RunFolderError, TargetError, plain
from .experiment import Api
from .interpreters import ENVIRONMENTS

ServerKind = Literal["vllm", "transformers", "pytorch"]
Device = Literal["cpu", "cuda"]
Progress = Callable[[str], None]
_First = tuple[str, dict[str, Any]]

ENGINES = Path(__file__).parent / "engines"
STATIC_SERVER = ENGINES / "static_server.py"
USUAL_START = {"vllm": "25-45 s", "transformers": "7-20 s", "pytorch": "5-15 s"}  # on a CPU
POLL_S = 0.5
PROGRESS_S = 5.0
LOG_TAIL_BYTES = 64_000

_VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # its processes talk over loopback, not over the address that leads outside
    "VLLM_LOG_STATS_INTERVAL": "1",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_SERVICE_NAME": "vllm",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",  # ms; spans come in batches of 5 s otherwise, after the end of a short run
}

_TELLING = re.compile(r"\b\w*(Error|Exception)\b ?:|^error: |\bCRITICAL\b|Killed", re.MULTILINE)


class Server(msgspec.Struct, frozen=True):
    """A server that answers."""

    url: str
    model: str  # the name to send in a request
    pid: int
    log_path: Path
    ready_s: float  # from its start to its first token


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
    kind: ServerKind,
    python: Path,
    model: str | Path,
    served_model_name: str | None,
    port: int,
    flags: Sequence[str] = (),
    *,
    device: Device = "cpu",
    version: str | None = None,
) -> list[str]:
    """The command line; flags come last and so override ours. version: of vLLM, where it is known."""
    if kind == "vllm":
        # The `vllm` command fails in the CPU build (it looks for a package named vllm); the module works.
        ours = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        ours += ["--served-model-name", served_model_name] if served_model_name else []
        ours += ["--host", "127.0.0.1", "--port", str(port)]
        if device == "cpu":
            # Eager start takes a third of the compiled one, and float32 is faster than bfloat16 without AVX512-BF16.
            ours += ["--dtype", "float32", "--enforce-eager"]
        ours += _vllm_telling(version)
    elif kind == "pytorch":
        ours = [str(STATIC_SERVER), "--model", str(model), "--port", str(port), "--device", device]
        ours += ["--served-model-name", served_model_name] if served_model_name else []
    else:
        ours = [str(ENGINES / "transformers_serve.py"), "serve", str(model)]
        ours += ["--host", "127.0.0.1", "--port", str(port), "--device", device]
        ours += ["--dtype", "float32"] if device == "cpu" else []
        if "--no-continuous-batching" not in flags:
            ours += ["--continuous-batching"]
            # Pages of 256 tokens. Left alone it fills 60 % of the machine's memory with cache before the first token,
            # and takes prompts of 8192 tokens in one go, which on two cores halts every other stream for half a minute.
            ours += ["--cb-num-blocks", "32", "--cb-max-batch-tokens", "512"] if device == "cpu" else []
    return [str(python), *ours, *flags]


def _vllm_telling(version: str | None) -> list[str]:
    """The flags by which vLLM tells of single requests: those that its version knows."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version or "")[:3])
    flags = ["--enable-request-id-headers"]
    if not numbers or numbers >= (0, 10, 2):
        flags += ["--enable-log-requests"]
    if not numbers or numbers >= (0, 26):
        flags += ["--enable-per-request-metrics", "--logging-config.formatter", "json"]
    return flags


def server_environment(
    kind: str, extra: Mapping[str, str] | None = None, *, device: Device = "cpu", from_hub: bool = False
) -> dict[str, str]:
    """This process's environment, plus what the server needs, plus extra.

    kind: of target.start. Offline, with a hub cache of the tester's own; with from_hub the hub and its cache are as the
    user has them.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not from_hub:
        # An inherited HF_HUB_CACHE would win over HF_HOME.
        environment.pop("HF_HUB_CACHE", None)
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache_folder() / "hf")}
        # transformers answers /v1/models with 500 while this folder is missing.
        (cache_folder() / "hf" / "hub").mkdir(parents=True, exist_ok=True)
    if kind == "vllm":
        environment |= _VLLM_ENVIRONMENT
        if device == "cpu":  # GiB; left alone it takes a share of the machine's memory
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    elif device == "cpu" and kind != "command":
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
    under its folder's path, so served_model_name does not hold for it. The log is written anew.
    Raises TargetError when the port is taken, the server ends early, or is not ready in ready_timeout_s.
    """
    port = usable_port(port)
    model = model.absolute()
    command = server_command(kind, python, model, served_model_name, port, flags)
    with started_command(
        command,
        name=kind,
        url=f"http://127.0.0.1:{port}",
        model=served_model_name if kind != "transformers" and served_model_name else str(model),
        log_path=log_path,
        env=server_environment(kind, env),
        ready_timeout_s=ready_timeout_s,
        grace_s=grace_s,
        progress=progress,
        usual=USUAL_START[kind],
    ) as server:
        yield server


@contextmanager
def started_command(
    command: Sequence[str],
    *,
    name: str,
    url: str,
    model: str | None,
    log_path: Path,
    env: Mapping[str, str],
    ready_timeout_s: float,
    grace_s: float = 10.0,
    progress: Progress | None = None,
    api: Api = "completions",
    stream: bool = False,
    headers: Mapping[str, str] | None = None,
    usual: str | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[Server]:
    """As started_server, for any command that serves one of our APIs at url.

    model: None takes the first that /v1/models names. api, stream, headers: of the first request. usual: how long it
    takes to start. stopped: once this is set there is no more waiting: KeyboardInterrupt.
    """
    log_path = log_path.absolute()
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("wb")
    except OSError as error:
        raise RunFolderError(
            f"{log_path}: the server's log cannot be written: {error.strerror}; name another place: --set output=DIR"
        ) from None
    with log:
        try:
            # In the log's folder: `python -m` puts the working directory first on its path, where a file could shadow.
            kept = keeper.start(command, grace_s=grace_s, cwd=log_path.parent, env=env, stdout=log, stderr=log)
        except OSError as error:
            raise TargetError(f"{name}: {error}{_how_to_install(name)}") from error
    began = time.monotonic()
    usual = f"usually {usual}" if usual else f"at most {ready_timeout_s:.0f} s"
    try:
        # trust_env: a proxy named in the environment must not be asked for an address of this machine.
        with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
            waiting = _Waiting(kept, name, log_path, ready_timeout_s, began, usual, progress or _silent, stopped)
            model = _wait_until_ready(waiting, client, model, _first_request(api, stream))
        yield Server(url, model, kept.pid, log_path, time.monotonic() - began)
    finally:
        kept.stop()


def _silent(_line: str) -> None:
    pass


def usable_port(port: int) -> int:
    """This port of 127.0.0.1, or a free one for 0. Raises TargetError if it is taken."""
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


def _how_to_install(name: str) -> str:
    return f"; `python3 scripts/prepare.py {ENVIRONMENTS[name]}` installs it" if name in ENVIRONMENTS else ""


class _Waiting(msgspec.Struct, frozen=True):
    """Of a server that has been started and is not ready yet."""

    kept: keeper.Kept
    name: str
    log_path: Path
    timeout_s: float
    began: float
    usual: str
    progress: Progress
    stopped: threading.Event | None


def _wait_until_ready(waiting: _Waiting, client: httpx.Client, model: str | None, first: _First) -> str:
    """Returns once the server has completed one token: the model that it was asked for. first: path and body.

    Raises TargetError when it ends or takes longer than the timeout, KeyboardInterrupt when the user has had enough.
    """
    name, progress = waiting.name, waiting.progress
    told = waiting.began
    progress(f"{name}: starting ({waiting.usual})")
    healthy = False
    while (waited := time.monotonic() - waiting.began) < waiting.timeout_s:
        if waiting.stopped is not None and waiting.stopped.is_set():
            raise KeyboardInterrupt
        if not waiting.kept.running():
            raise TargetError(
                f"{name} ended before it was ready (exit code {waiting.kept.keeper.returncode}): "
                f"{last_telling_line(waiting.log_path)}; its log: {waiting.log_path}"
            )
        if not healthy and (healthy := _answers(client)):
            progress(f"{name}: answers after {waited:.0f} s, completing a first token")
        if healthy and model is None:
            model = _first_model(client)
        if healthy and model is not None and _completes(client, name, model, first, waiting.timeout_s - waited):
            progress(f"{name}: ready after {time.monotonic() - waiting.began:.0f} s at {client.base_url}".rstrip("/"))
            return model
        if time.monotonic() - told >= PROGRESS_S:
            told = time.monotonic()
            progress(f"{name}: starting, {waited:.0f} s ({waiting.usual})")
        time.sleep(POLL_S)
    raise TargetError(
        f"{name} was not ready after {waiting.timeout_s:.0f} s: {last_telling_line(waiting.log_path)}; "
        f"its log: {waiting.log_path}"
    )


def _answers(client: httpx.Client) -> bool:
    for path in ("/health", "/v1/models"):
        try:
            if client.get(path, timeout=2).status_code == 200:
                return True
        except httpx.TransportError:
            return False
    return False


def _first_model(client: httpx.Client) -> str | None:
    """The first of /v1/models; a name of ours where the server has no such list; None where it does not answer."""
    try:
        answer = client.get("/v1/models", timeout=10)
        return str(answer.json()["data"][0]["id"])
    except httpx.TransportError:
        return None
    except (ValueError, LookupError, TypeError):
        return "model"


def _completes(client: httpx.Client, name: str, model: str, first: _First, timeout_s: float) -> bool:
    """Whether one token of an answer came; a refusal that waiting will not mend raises TargetError."""
    path, body = first
    try:
        answer = client.post(path, json={"model": model, **body}, timeout=max(timeout_s, 1))
    except httpx.TransportError:
        return False
    if 400 <= answer.status_code < 500:
        text = " ".join(plain(answer.text[:300]).split())
        raise TargetError(f"{name} refused a first request with HTTP {answer.status_code}: {text}")
    return answer.status_code == 200 and not answer.text.startswith('data: {"error"')  # a stream's own way to fail


def _first_request(api: Api, stream: bool) -> _First:
    if api == "tgi-generate":
        return "/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 1}}
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if api == "chat" else {"prompt": "Hello"}
    return PATHS[api], {**asked, "max_tokens": 1, "stream": stream}


def last_telling_line(log_path: Path) -> str:
    """The last line of a log that names an error, else its last line; JSON log lines give their message.

    A line that only says that the cause stands elsewhere, as vLLM's last one does, is no such line.
    """
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - LOG_TAIL_BYTES))
        text = log.read().decode(errors="replace")
    lines = [line for raw in text.splitlines() for line in _message(raw).splitlines() if line.strip()]
    if not lines:
        return "its log is empty"
    telling = [line for line in lines if _TELLING.search(line) and "root cause above" not in line]
    return (telling or lines)[-1].strip()


def _message(line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    return str(fields.get("message", line)) if isinstance(fields, dict) else line
