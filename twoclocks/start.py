"""target.start: what can be known before a server is started, and the server while a run lasts.

    check(start) -> Plan            raises one line for what would fail later
    started(target, log) -> Started    the server, and the settings under which a run uses it

An experiment is handed on with `served`. Knows nothing of load or of Locust; asks the server's own interpreter for
packages and GPUs, since this process has neither.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from twoclocks import experiment as experiments
from twoclocks.endpoint import request_headers, secrets_of
from twoclocks.errors import TargetError
from twoclocks.experiment import Experiment, Start, Target
from twoclocks.interpreters import Probe, check_packages, find_python, probe
from twoclocks.masks import masked, masked_argv, redact
from twoclocks.models import GB, Model, dtype_bytes, find_model, kv_bytes_per_token, weights_in_memory
from twoclocks.servers import (
    USUAL_START,
    Progress,
    Server,
    cache_folder,
    server_command,
    server_environment,
    started_command,
    usable_port,
)
from twoclocks.settings_yaml import load_yaml

GIB = 2**30
VLLM_SHARE = 0.9
"""Of a GPU: what vLLM takes by default at least (0.9, since 0.32 0.92), and refuses to start without."""


class Plan(msgspec.Struct, frozen=True):
    """A server that could be started now, as far as can be known before."""

    start: Start
    python: Path
    model: Model | None  # None: of a command that names none that is known here
    found: Probe  # what the interpreter says; of a command it is not asked

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the flags are chosen for; a --device among the user's own decides."""
        asked = flag(self.start.flags, "--device")
        if asked is not None:
            return "cpu" if asked == "cpu" else "cuda"
        return "cuda" if self.found.gpus else "cpu"


class Started(msgspec.Struct, frozen=True):
    """A server that answers."""

    server: Server
    facts: dict[str, Any]  # what run.json tells of it, secrets masked

    def settings(self, experiment: Experiment) -> list[str]:
        """KEY=VALUE of an experiment that uses it, as --set has them."""
        values = {"target.url": self.server.url, "target.model": self.server.model}
        if experiment.collect.log == "none":
            values["collect.log"] = f"file:{self.server.log_path}"
        settings = [f"{key}={_as_yaml(value)}" for key, value in values.items()]
        return settings + ([f"collect.process={self.server.pid}"] if experiment.collect.process == "none" else [])


def check(start: Start) -> Plan:
    """Find out what can be known before anything is started. Raises TargetError, in one line.

    Takes some seconds: the interpreter of the server imports torch.
    """
    python = find_python(start.kind, start.python, cache_folder())
    environ = os.environ | start.env
    if start.kind == "command":
        _check_command(start, python)
        model = _model_of_command(start)
    else:
        model = find_model(start.model or "", python, cache_folder(), environ)
    if start.port:
        usable_port(start.port)
    found = Probe(versions={}) if start.kind == "command" else probe(python, environ)
    plan = Plan(start, python, model, found)
    if start.kind != "command":
        check_packages(start.kind, python, found)
        _check_gpus(plan)
        _check_memory(plan)
    return plan


@contextlib.contextmanager
def started(
    target: Target,
    log_path: Path,
    progress: Progress = lambda _: None,
    *,
    plan: Plan | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[Started]:
    """The server that target.start asks for, until the end of the block; its log is written anew.

    plan: what `check` said, if it has just been asked. stopped: once it is set, waiting for the server ends with
    KeyboardInterrupt. Raises TargetError.
    """
    assert target.start is not None
    plan = plan or check(target.start)
    if (note := idle_gpu(plan)) is not None:
        progress(note)
    start, port = target.start, usable_port(target.start.port)
    command, name = command_line(plan, port)
    from_hub = start.kind == "command" or (plan.model is not None and plan.model.name != str(plan.model.folder))
    secrets = secrets_of(target)  # which a server may log, or say, where it refuses to start
    with (
        _without(secrets),
        started_command(
            command,
            name=target.name or start.kind,
            url=f"http://127.0.0.1:{port}",
            model=name,
            log_path=log_path,
            env=server_environment(start.kind, start.env, device=plan.device, from_hub=from_hub),
            ready_timeout_s=start.ready_s,
            progress=progress,
            api=target.api,
            stream=target.stream,
            headers=request_headers(target),
            usual=USUAL_START.get(start.kind) if plan.device == "cpu" else None,
            stopped=stopped,
        ) as server,
    ):
        yield Started(server, _facts(plan, command, server))


@contextlib.contextmanager
def _without(secrets: Sequence[str]) -> Iterator[None]:
    """TargetErrors of this block without what may be secret."""
    try:
        yield
    except TargetError as error:
        raise TargetError(redact(str(error), secrets)) from None


@contextlib.contextmanager
def served(
    experiment: Experiment,
    log_path: Path,
    progress: Progress = lambda _: None,
    *,
    plan: Plan | None = None,
    stopped: threading.Event | None = None,
) -> Iterator[tuple[Experiment, list[str]]]:
    """The experiment with its server started, and the options of Locust that make it so; itself if it asks for none.

    An engine without a server (api in-process) is started by the run itself.

    What is known of the server goes into a file beside its log, from which the run takes it into its run.json.
    """
    if experiment.target.start is None or experiment.target.api == "in-process":
        yield experiment, []
        return
    with started(experiment.target, log_path, progress, plan=plan, stopped=stopped) as server:
        facts = log_path.with_suffix(".json")
        facts.write_bytes(msgspec.json.format(msgspec.json.encode(server.facts), indent=1) + b"\n")
        options = ["--started", str(facts)]
        for setting in server.settings(experiment):
            options += ["--set", setting]
            key, _, value = setting.partition("=")
            experiment = experiments.replace(experiment, key, load_yaml(value))
        yield experiment, options


def idle_gpu(plan: Plan, driver: Path = Path("/dev/nvidia0")) -> str | None:
    """One line if this machine has a GPU that the interpreter cannot use, and nobody asked for the CPU."""
    start = plan.start
    if start.kind == "command" or plan.found.gpus or flag(start.flags, "--device") or not driver.exists():
        return None
    return (
        f"{start.kind}: this machine has an NVIDIA GPU, and torch of {plan.python} (built for {plan.found.built_for}) "
        "sees none; name an interpreter with a CUDA build in target.start.python"
    )


def command_line(plan: Plan, port: int) -> tuple[list[str], str | None]:
    """(argv of the server, the name under which it serves the model; None: the first of its /v1/models)."""
    start, model = plan.start, plan.model
    if start.kind == "command":
        named = model.name if model is not None else start.model or ""
        filled = {"port": str(port), "model": named, "python": str(plan.python)}
        words = [_fill(word, filled) for word in start.command]
        return [*words, *start.flags], start.served_model_name
    assert model is not None
    given = Path(start.model or "").name if model.name == str(model.folder) else model.name
    served_name = start.served_model_name or given
    version = plan.found.versions.get("vllm")
    command = server_command(
        start.kind, plan.python, model.name, served_name, port, start.flags, device=plan.device, version=version
    )
    return command, model.name if start.kind == "transformers" else served_name


def flag(flags: Sequence[str], *names: str) -> str | None:
    """The value of a flag in a command line, ``--name value`` or ``--name=value``; the last one counts."""
    found = None
    for word, following in zip(flags, [*flags, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name in names or name.replace("_", "-") in names:
            found = value if equals else following
    return found


def _fill(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _as_yaml(value: str) -> str:
    """Text that YAML reads as this very text."""
    return value if load_yaml(value) == value else msgspec.json.encode(value).decode()


def _check_command(start: Start, python: Path) -> None:
    word = _fill(start.command[0], {"python": str(python)})
    if shutil.which(word) is None:
        raise TargetError(f"target.start.command: {word!r} is not on this machine; install it, or give its path")


def _model_of_command(start: Start) -> Model | None:
    """Of a command: a folder or a name in the cache becomes the folder; anything else is the command's own affair."""
    if start.model is None:
        return None
    for path in (Path(start.model).expanduser(), cache_folder() / "models" / start.model):
        if path.exists():
            weights = path.stat().st_size if path.is_file() else None
            return find_model(str(path), Path(), cache_folder()) if path.is_dir() else Model(str(path), path, weights)
    if start.model.startswith(("/", "./", "../", "~")):
        raise TargetError(f"target.start.model: nothing at {start.model!r}")
    return None


def _gpus_needed(start: Start) -> int:
    words = [flag(start.flags, "--tensor-parallel-size", "-tp"), flag(start.flags, "--pipeline-parallel-size", "-pp")]
    sizes = [int(word) for word in words if word is not None and word.isdigit()]
    return max(1, sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1] if sizes else 1)


def _check_gpus(plan: Plan) -> None:
    """TargetError where flags ask for more GPUs than there are."""
    gpus, needed = plan.found.gpus, _gpus_needed(plan.start)
    if plan.device == "cuda" and not gpus:
        raise TargetError(
            f"target.start.flags: --device {flag(plan.start.flags, '--device')} needs a GPU, and torch of "
            f"{plan.python} (built for {plan.found.built_for}) sees none; leave it out to use the CPU"
        )
    if gpus and plan.device == "cuda" and needed > len(gpus):
        raise TargetError(
            f"target.start.flags: {needed} GPUs are asked for (tensor times pipeline parallel size), and there are "
            f"{len(gpus)} ({', '.join(gpu.name for gpu in gpus)})"
        )


def _check_memory(plan: Plan) -> None:
    """TargetError where the weights, and what the flags say of the KV cache, are more than is free."""
    start, model = plan.start, plan.model
    assert model is not None
    dtype = flag(start.flags, "--dtype") or ("float32" if plan.device == "cpu" else "auto")
    weights = weights_in_memory(model, dtype)
    if weights is None:
        return
    size = (
        f"{model.name} takes about {weights / GB:,.1f} GB as {dtype}"
        if dtype != "auto"
        else (f"{model.name} takes about {weights / GB:,.1f} GB")
    )
    if plan.device == "cpu":
        cache = _cpu_cache_bytes(start)
        available = available_memory()
        if available is not None and weights + cache > available:
            beside = f" and its KV cache {cache / GB:,.1f} GB (VLLM_CPU_KVCACHE_SPACE)" if cache else ""
            raise TargetError(
                f"target.start.model: {size}{beside}, and {available / GB:,.1f} GB of memory are available; take a "
                "smaller model or dtype, or end what uses the memory"
            )
        return
    used = plan.found.gpus[: _gpus_needed(start)]
    share = weights / len(used)
    for number, gpu in enumerate(used):
        limit = gpu.free_bytes
        where = f"GPU {number} ({gpu.name}) has {gpu.free_bytes / GB:,.1f} of {gpu.total_bytes / GB:,.1f} GB free"
        if start.kind == "vllm" and flag(start.flags, "--kv-cache-memory-bytes") is None:
            asked = _number(flag(start.flags, "--gpu-memory-utilization"), VLLM_SHARE)
            limit = int(asked * gpu.total_bytes)
            if limit > gpu.free_bytes:
                raise TargetError(
                    f"target.start.flags: {where}, and vLLM asks for {asked:g} of it all ({limit / GB:,.1f} GB); end "
                    "what uses it, or give --gpu-memory-utilization a smaller share"
                )
        if share > limit:
            each = f", {share / GB:,.1f} GB on each of {len(used)} GPUs" if len(used) > 1 else ""
            raise TargetError(
                f"target.start.model: {size}{each}; {where}, of which {limit / GB:,.1f} GB may be used; take a smaller "
                "or a quantised model, or more GPUs"
            )


def _number(text: str | None, default: float) -> float:
    try:
        return default if text is None else float(text)
    except ValueError:
        return default


def _cpu_cache_bytes(start: Start) -> int:
    """Of vLLM's CPU build: what it reserves. Of others: nothing that is known before."""
    if start.kind != "vllm":
        return 0
    return round(_number(start.env.get("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE")), 1.0) * GIB)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, or the container that we are in, can still give; None where Linux does not tell."""
    found = []
    with contextlib.suppress(OSError, LookupError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat.get("inactive_file", 0)))  # a page cache that can be given up
    return min(found, default=None)


def _facts(plan: Plan, command: Sequence[str], server: Server) -> dict[str, Any]:
    start, model = plan.start, plan.model
    cache_dtype = flag(command, "--kv-cache-dtype")
    if cache_dtype in (None, "auto"):
        cache_dtype = flag(command, "--dtype")
    config = model.config if model is not None else {}
    return {
        "kind": start.kind,
        "command_line": masked_argv(command),
        "env": masked(start.env),
        "python": str(plan.python),
        "versions": plan.found.versions,
        "device": None if start.kind == "command" else plan.device,
        "gpus": [gpu.name for gpu in plan.found.gpus],
        "model": start.model,
        "model_folder": str(model.folder) if model is not None and model.folder is not None else None,
        "weights_on_disk_bytes": model.weights_bytes if model is not None else None,
        "dtype_bytes": dtype_bytes(flag(command, "--dtype"), config) if config else None,
        "kv_bytes_per_token": kv_bytes_per_token(config, cache_dtype) if config else None,
        "pid": server.pid,
        "ready_s": server.ready_s,
        "log": str(server.log_path),
    }
