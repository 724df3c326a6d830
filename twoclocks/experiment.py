"""Experiment files: YAML -> one frozen Experiment, or one line of error naming file, key and what was expected.

Everything a user may set stands here once, with its unit in its name. Knows nothing of HTTP or Locust.
"""

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

from twoclocks.errors import ExperimentError
from twoclocks.experiment_checks import check, check_ramp, check_study
from twoclocks.masks import SECRET, masked
from twoclocks.prompts import DEMO
from twoclocks.settings_yaml import load_yaml

Server = Literal["vllm", "tgi", "transformers", "sglang", "llamacpp", "pytorch", "openai", "other"]
Api = Literal["chat", "completions", "tgi-generate", "in-process"]  # in-process: no HTTP, the engine of target.start
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
NoneWord = Literal["none"]


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing on the way from the client to the engine, such as a gateway, and where it tells of itself."""

    name: str  # how reports call it
    metrics_url: str | list[str] = "none"  # its own /metrics; a list: one a replica
    histogram: str | None = None  # in that page: seconds from its receipt of a request to the first byte or token
    service: str | None = None  # service.name of its OTLP spans


StartKind = Literal["vllm", "transformers", "pytorch", "command"]


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A server that `twoclocks run` starts on this machine before the load and ends after it."""

    kind: StartKind  # command: anything that speaks the API, such as llama.cpp, TGI or SGLang
    model: str | None = None  # a folder, a name in the models' cache (SmolLM2-135M-Instruct), or a hub id
    served_model_name: str | None = None  # what requests call it; not for transformers, which serves it by its path
    flags: list[str] = []  # after ours, and so over them
    env: dict[str, str] = {}  # beside this process's own
    command: list[str] = []  # of kind command; "{port}", "{model}" and "{python}" in it are filled in
    python: str = "auto"  # auto: the tester's cache, else what runs `vllm` or `transformers` on the PATH, else this one
    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # 0: a free one
    ready_s: Positive = 600  # how long it may take until its first token


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    url: str = "http://127.0.0.1:8000"  # of the server, with or without /v1
    name: str | None = None  # how reports call it; the server's kind if not given
    server: Server = "vllm"  # picks the dialect, the collectors and the join
    api: Api = "chat"  # which path is asked: chat and text completions as OpenAI has them, TGI's own, or none
    model: str = "auto"  # auto: the first of /v1/models
    api_key_env: str = "OPENAI_API_KEY"  # the variable's name; the key itself never enters a file
    api_key_file: str | None = None  # path of a file that holds the key and nothing else, in place of the variable
    headers: dict[str, str] = {}  # on every request; masked wherever settings are written down
    extra_body: dict[str, Any] = {}  # merged into every request
    stream: bool = True  # False: whole answers, whose first token nobody sees; TGI tells its own timings only then
    tls_verify: bool | str = True  # True, False, or the path of a CA bundle
    tls_cert: str | None = None  # path of a client certificate with its key (PEM)
    stages: list[Stage] = []  # what stands between the client and the server, the outermost first
    tokenizer: str | None = None  # path of a tokenizer.json; counts answers of servers that send no usage
    start: Start | None = None  # by `twoclocks run`, which then sets url, model, collect.log and .process


class MixPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One request file of a mix."""

    requests: str  # a request file
    weight: Positive = 1  # its share of all requests is weight / sum of the weights
    max_tokens: Count | None = None  # for its requests that bring none; workload.max_tokens if not given
    name: str | None = None  # stands before the ids of its prompts; the file's name without its ending if not given

    @property
    def prefix(self) -> str:
        """What stands before the ids of its prompts."""
        return self.name or Path(self.requests).stem


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    requests: str = DEMO  # a request file: JSON Lines, see requests/README.md
    mix: list[MixPart] = []  # several request files in place of one
    salt: Literal["none", "run", "request"] = "none"  # a line before each prompt, so that no cache knows it from before
    order: Literal["in-order", "shuffled", "random"] = "shuffled"  # shuffled: all before any again
    seed: int = 1  # of the order, the mix, think times and hang-ups: same seed, same requests
    sessions: Literal["none", "recorded", "own"] = "none"  # turns of a session as a conversation; whose answers
    think_s: NotNegative = 0  # from the end of a turn until the next one is due
    think: Literal["constant", "exponential"] = "constant"  # exponential: think_s is the mean
    max_tokens: Count = 128  # for requests that bring none
    ignore_eos: bool = False  # answers always as long as max_tokens; vLLM, SGLang and llama.cpp know it
    # users who leave: the connection is closed, so that the server can stop, and no failure is counted
    cancel_share: Annotated[float, Meta(ge=0, le=1)] = 0  # of the requests are hung up, drawn by seed
    cancel_after_s: Positive | list[NotNegative] = 1  # after the send; [low, high]: drawn between them
    patience_s: Positive | NoneWord = "none"  # a user without a first token by then gives up


class LevelRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename={"first": "from"}):
    """Levels of a sweep by their ends and number, both ends among them."""

    first: Positive  # `from` in the file, which Python keeps for itself
    to: Positive  # the last level
    count: Annotated[int, Meta(ge=2, le=1000)]  # levels in all
    scale: Literal["linear", "log"] = "linear"  # equal steps, or equal ratios


class Sweep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run after the other, each at a level of its own and for load.duration_s."""

    over: Literal["users", "rate"] = "users"  # of a ramp (users) or of an open loop (requests/s)
    levels: list[Positive] | LevelRange = []  # such as [1, 2, 4, 8], or from, to and count
    pause_s: NotNegative = 5  # from the end of one level to the start of the next
    reset: str = "none"  # path that the server is sent a POST to before each level, such as /reset_prefix_cache (vLLM)


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The highest level that meets the SLO; a probe lasts load.duration_s."""

    over: Literal["users", "rate"] = "rate"  # as in sweep
    low: Positive = 1  # the first probe; the next ones double until one fails
    high: Positive | NoneWord = "none"  # no probe goes above it
    probes: Count = 12  # at most so many runs
    tolerance: Annotated[float, Meta(gt=0, le=1)] = 0.05  # lowest that failed / highest that passed - 1, at the end
    pause_s: NotNegative = 5  # from the end of one probe to the start of the next
    reset: str = "none"  # as in sweep


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    shape: Literal["ramp", "steps", "rate", "trace", "batch", "sweep", "search"] = "ramp"  # see docs/load.md
    users: Count = 8  # closed loop: each user sends its next request when the last one has ended
    ramp_s: NotNegative = 0  # all users are there after this time
    duration_s: Positive = 60  # ramp included, drain not
    drain_s: NotNegative = 30  # how long running streams may go on after the end
    requests: Count | NoneWord = "none"  # the end after so many, if they come before duration_s
    steps: list[tuple[Count, Positive]] = []  # shape steps: [users, seconds] of each level, in place of duration_s
    # open loop (rate, trace, batch): requests leave when they are due, whether or not earlier ones have come back
    rate: NotNegative | list[tuple[NotNegative, NotNegative]] = 1  # requests/s, or [second, requests/s] points
    arrivals: Literal["constant", "poisson", "gamma"] = "poisson"  # of shape rate: how they are spaced
    burstiness: Positive = 1  # shape of the gamma: 1 is Poisson, less comes in bursts, more is steadier
    seed: int = 1  # of the arrivals
    max_in_flight: Count = 10_000  # what is due beyond them is not sent, and counted
    trace_scale: Positive = 1  # shape trace (the requests' own `at`): 2 is half as fast
    trace_window_s: tuple[NotNegative, Positive] | NoneWord = "none"  # this part of the trace alone
    batch: Count = 16  # shape batch: so many at once
    batches: Count | NoneWord = "none"  # so often
    batch_pause_s: NotNegative = 0  # from the end of the last of one to the next
    # several runs, by `twoclocks run`
    sweep: Sweep = Sweep()  # of shape sweep
    search: Search = Search()  # of shape search


class Warmup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    requests: Annotated[int, Meta(ge=0)] = 4  # of one round, sent at once; 0: no warm-up
    duration_s: Positive | NoneWord = "none"  # round after round, for so long
    until_stable: bool = False  # until two rounds have nearly the same median TTFT, for 60 s at most
    max_requests: Count = 64  # at which until_stable gives up


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    connect_s: Positive = 10  # until the connection stands, TLS included
    first_token_s: Positive = 120  # from the send to the first token
    idle_s: Positive = 30  # silence between two reads of a stream
    total_s: Positive = 600  # from the send to the end


RetryAfter = Literal["connect", "closed"] | Annotated[int, Meta(ge=400, le=599, title="an HTTP status")]
AFTER: list[RetryAfter] = ["connect", 429, 503]


class Retries(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """More attempts at a request that failed before its answer began. Off unless asked for: who measures a server wants
    to see its refusals.
    """

    max: Annotated[int, Meta(ge=0, le=20)] = 0  # attempts after the first; 0: none
    after: list[RetryAfter] = msgspec.field(default_factory=AFTER.copy)  # no connection, closed unanswered, HTTP status
    respect_retry_after: bool = True  # wait as long as the server asks; if longer than longest_pause_s, give up
    pause_s: Positive = 0.5  # where it does not ask: before the second attempt, doubled before each next one
    longest_pause_s: Positive = 30  # before any attempt


class Collect(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    metrics_url: str | list[str] = "auto"  # auto: URL/metrics; none; or a list of URLs, one a replica
    metrics_interval_s: Positive = 1  # from one scrape to the next
    otlp_port: Port | NoneWord = 4318  # OTLP over HTTP; none: no receiver
    otlp_grpc_port: Port | NoneWord = 4317  # OTLP over gRPC
    otlp_host: str = "127.0.0.1"  # where the receiver listens
    otlp_tail_s: NotNegative = 8  # how long the end of a run waits for spans: exporters send a batch every 5 s
    log: str = "none"  # the server's log: none, file:PATH or command:ARGV, which is never given to a shell
    gpu: str | list[str] = "auto"  # auto (NVML, on this machine) | none | the addresses of DCGM exporters
    process: Count | NoneWord = "none"  # id of the server's process on this machine: the memory of it and its children


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The run's own figures for Prometheus, while it goes on."""

    prometheus_port: Port | NoneWord = "none"  # where this run can be scraped; none: nowhere
    host: str = "127.0.0.1"  # where that port listens
    linger_s: NotNegative = 15  # how long the end waits for a last scrape, if there was any before


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    ttft_ms: Positive | NoneWord = "none"  # a request is good if its TTFT is within
    tpot_ms: Positive | NoneWord = "none"  # and its TPOT
    e2e_ms: Positive | NoneWord = "none"  # and its E2E
    share: Annotated[float, Meta(gt=0, le=1)] = 0.99  # of the measured requests must meet all; else exit code 1


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One way in which a study sends its load: dotted keys and their values, as --set has them."""

    name: str  # how reports call it
    set: dict[str, Any] = {}  # such as load.users: 2


class Where(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The runs of a study that a figure is of."""

    target: str  # its name
    variant: str = ""  # if the study has variants


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What somebody published, to stand beside what is measured."""

    says: str  # the claim, in words
    figure: str  # as the study's report names it, such as output_throughput, ttft.p50, memory.kv_used_peak
    of: Where  # the runs that it is of
    over: Where | None = None  # then the claim is on the ratio of / over
    published: float  # the figure that was published
    unit: str = ""  # of that figure; x: a ratio
    source: str = ""  # who published it
    conditions: str = ""  # machine, model, load


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str = "default"  # stands in the name of the run folder
    target: Target = Target()  # of a study: what its targets have in common
    # a study: the same load on several targets, or in several ways, or several times, by `twoclocks run`
    targets: list[dict[str, Any]] = []  # each a name and the keys of target in which it differs
    variants: list[Variant] = []  # ways in which the load is sent, a run each
    repeats: Count = 1  # so often each target and variant
    order: Literal["in-turn", "abba"] = "in-turn"  # abba: each repeat goes through the targets the other way round
    keep_started: bool = True  # in order abba: servers that were started stay until the end, all at the same time
    missing: Literal["stop", "skip"] = "stop"  # when a target cannot be had
    claims: list[Claim] = []  # published figures that stand beside the measured ones
    workload: Workload = Workload()  # what is sent
    load: Load = Load()  # how much, and when
    warmup: Warmup = Warmup()  # before the clock starts; kept, and in no figure
    timeouts: Timeouts = Timeouts()  # when a request is given up
    retries: Retries = Retries()  # what is asked for again; nothing unless told
    collect: Collect = Collect()  # what is read of the server meanwhile
    export: Export = Export()  # the run's own figures, for others to read
    slo: Slo = Slo()  # what a good request is
    labels: dict[str, str] = {}  # free text on runs
    output_text: bool = False  # keep the answers in requests.jsonl
    output: str = "output"  # the folder of all run folders


def load_experiment(
    path: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    target: str | None = None,
    variant: str | None = None,
) -> Experiment:
    """The experiment in a YAML file, with ``--set``-style overrides such as ``load.users=10`` applied.

    ``${NAME}`` and ``${NAME:-default}`` inside values are filled from the environment. ``target`` and ``variant``
    choose from a study one of its runs: an experiment without targets and variants. Overrides win over both.
    Raises ExperimentError, in one line, for anything that cannot be used.
    """
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExperimentError(
            f"{path}: no such experiment file; name one that is there (Locust: --experiment FILE.yaml)"
        ) from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ExperimentError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ExperimentError(f"{path}:{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ExperimentError(f"{path}: expected keys such as 'target:' and 'load:', found {type(raw).__name__}")
    for override in overrides:
        _set(raw, override)
    if target is not None or variant is not None:
        raw = _chosen(raw, target, variant, environ, str(path))
        for override in overrides:
            if re.split(r"[.=]", override)[0] not in STUDY_KEYS:
                _set(raw, override)
    experiment = _convert(_interpolate(raw, environ, str(path)), str(path))
    if is_study(experiment):
        check_study(experiment, str(path))
        return experiment
    check(experiment, str(path))
    if experiment.load.shape == "ramp":
        check_ramp(experiment.load, str(path))  # a shorter time on Locust's command line is the user's choice
    return experiment


def is_study(experiment: Experiment) -> bool:
    """Is it more than one target, variant and time?"""
    return bool(experiment.targets or experiment.variants or experiment.repeats > 1)


def _chosen(
    raw: dict[str, Any], target: str | None, variant: str | None, environ: Mapping[str, str], where: str
) -> dict[str, Any]:
    """The raw experiment of one target and variant of a study."""
    study = _convert(_interpolate(raw, environ, where), where)
    chosen = deepcopy({key: value for key, value in raw.items() if key not in STUDY_KEYS})  # it is changed below
    if target is not None:
        number = _place("targets", [str(one.get("name")) for one in study.targets], target, where)
        chosen["target"] = (chosen.get("target") or {}) | raw["targets"][number]
    if variant is not None:
        number = _place("variants", [one.name for one in study.variants], variant, where)
        for key, value in (raw["variants"][number].get("set") or {}).items():
            _set_value(chosen, key, value)
    return chosen


def _place(key: str, names: list[str], name: str, where: str) -> int:
    if name not in names:
        raise ExperimentError(f"{where}: {key}: none is called {name!r}; there: {', '.join(names) or 'none at all'}")
    return names.index(name)


STUDY_KEYS = ("targets", "variants", "repeats", "order", "keep_started", "missing", "claims")


def to_yaml(experiment: Experiment) -> str:
    """The experiment as resolved, without what may be secret."""
    raw = masked(msgspec.to_builtins(experiment))
    text: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    return text


def replace(experiment: Experiment, key: str, value: Any) -> Experiment:
    """The experiment with one dotted key changed, checked as if it had stood in the file."""
    raw = msgspec.to_builtins(experiment)
    _set_value(raw, key, value)
    changed = _convert(raw, "override")
    check(changed, "override")
    return changed


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        shown = "***" if SECRET.search(override) else repr(override)
        raise ExperimentError(f"--set {shown}: expected KEY=VALUE, such as load.users=10")
    kind: Any = Experiment
    for name in key.split("."):
        kind = _inside(kind, name)
    _set_value(raw, key, _read(text, kind))


def _set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ExperimentError(f"--set {key}: '{parent}' holds a value, not keys")
        node = child
    node[last] = value


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _interpolate(value: Any, environ: Mapping[str, str], where: str, kind: Any = Experiment) -> Any:
    """Fill ``${NAME}``; a value that is nothing but a variable is read as YAML, so that numbers stay numbers."""
    if isinstance(value, dict):
        return {key: _interpolate(child, environ, where, _inside(kind, key)) for key, child in value.items()}
    if isinstance(value, list):
        return [_interpolate(child, environ, where, _inside(kind, None)) for child in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        filled = environ.get(name) or default if default is not None else environ.get(name)  # as a shell has :-
        if filled is None:
            raise ExperimentError(f"{where}: ${{{name}}} is not set; export {name} or write ${{{name}:-default}}")
        return filled

    filled = _VARIABLE.sub(fill, value)
    return _read(filled, kind) if _VARIABLE.fullmatch(value) else filled


def _read(text: str, kind: Any) -> Any:
    """A value as YAML has it; what is no YAML, such as an unquoted message, is meant as text. So is a number where the
    type wants text: the number of a build, in a label.
    """
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    is_text = kind is str or get_args(kind) == (str, type(None))
    return text if is_text and not isinstance(value, str | dict | list | None) else value


def _inside(kind: Any, key: str | None) -> Any:
    """The type of what stands at a key of a mapping, or, without a key, in a list."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is (list if key is None else dict):
            return get_args(part)[-1]
        if key is not None and (structs := _structs_in(part)):
            return {field.encode_name: field.type for field in msgspec.structs.fields(structs[0])}.get(key, Any)
    return Any


def _convert(raw: Any, where: str) -> Experiment:
    _refuse_unknown(raw, Experiment, "", where)
    try:
        return msgspec.convert(raw, Experiment)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        key = at.rstrip("`").removeprefix(".") or "the file"
        if message.startswith("Invalid enum value"):
            message = f"expected {' | '.join(_choices(key))}, found{message.removeprefix('Invalid enum value')}"
        if ".start.command[" in key and "got `object`" in message:
            message = 'braces without quotes are keys to YAML; write "{port}" and "{model}"'
        message = message.replace("got `null`", "found nothing")  # an empty variable, as often as not
        raise ExperimentError(f"{where}: {key}: {message[0].lower()}{message[1:]}") from None


def _choices(key: str) -> list[str]:
    """What may stand at a dotted key whose type is made of literals and numbers."""
    kind: Any = Experiment
    for name in re.sub(r"\[.*?\]", "", key).split("."):
        kind = {field.encode_name: field.type for field in msgspec.structs.fields(_structs_in(kind)[0])}[name]
    words = _words_in(kind)
    return words if len(words) > 1 else ["a number above 0", *words]


def _words_in(kind: Any) -> list[str]:
    """The words of a type made of literals, and the titles of what else may stand there."""
    if isinstance(kind, Meta):
        return [kind.title] if kind.title else []
    return [kind] if isinstance(kind, str) else [word for part in get_args(kind) for word in _words_in(part)]


def _refuse_unknown(raw: Any, struct: type[msgspec.Struct], prefix: str, where: str) -> None:
    """Name the unknown key together with the ones that exist, which msgspec does not."""
    if not isinstance(raw, dict):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in raw.items():
        if key not in fields:
            raise ExperimentError(f"{where}: unknown key '{prefix}{key}'; known here: {', '.join(fields)}")
        for inner in _structs_in(fields[key]):
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for number, child in children:
                at = key if number is None else f"{key}[{number}]"
                _refuse_unknown(child, inner, f"{prefix}{at}.", where)


def _structs_in(kind: Any) -> list[type[msgspec.Struct]]:
    """The struct of a type such as S, S | None or list[S]; none for a type without one."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [struct for part in get_args(kind) for struct in _structs_in(part)]
