"""Checks of a whole experiment: what the types of its keys cannot say. Each function says one error or nothing.

They ask this machine whether a file or a command is there, and do nothing else. All raise ExperimentError, in one line.
"""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from twoclocks.errors import ExperimentError
from twoclocks.masks import SECRET
from twoclocks.prompts import DEMO

if TYPE_CHECKING:  # which imports this module
    from twoclocks.experiment import Experiment, Load, Retries, Start, Target, Timeouts, Warmup, Workload


def check(experiment: "Experiment", where: str) -> None:
    """What types cannot say."""
    target, collect = experiment.target, experiment.collect
    _check_url("target.url", target.url, where)
    if experiment.workload.ignore_eos and target.server == "transformers":
        raise ExperimentError(f"{where}: workload.ignore_eos: transformers serve refuses this field; leave it out")
    if target.start is not None:
        _check_start(target, target.start, where)
    if target.api == "in-process":
        _check_in_process(experiment, target.start, where)
    _check_workload(experiment, where)
    _check_load(experiment.load, where)
    _check_levels(experiment, where)
    _check_warmup(experiment.warmup, where)
    _check_retries(experiment.retries, where)
    _check_log(collect.log, where)
    files = (("tls_cert", target.tls_cert), ("tokenizer", target.tokenizer), ("api_key_file", target.api_key_file))
    for key, path in files:
        if path is not None and not Path(path).is_file():
            raise ExperimentError(f"{where}: target.{key}: no file at {path!r}")
    if isinstance(target.tls_verify, str) and not Path(target.tls_verify).is_file():
        raise ExperimentError(f"{where}: target.tls_verify: no CA bundle at {target.tls_verify!r}")
    pages = [("collect.metrics_url", collect.metrics_url), ("collect.gpu", collect.gpu)]
    pages += [(f"target.stages[{number}].metrics_url", stage.metrics_url) for number, stage in enumerate(target.stages)]
    for key, setting in pages:
        for url in [setting] if isinstance(setting, str) else setting:
            if url not in ("auto", "none"):
                _check_url(key, url, where)


def check_study(experiment: "Experiment", where: str) -> None:
    """What types cannot say of the study itself; its runs are checked one by one when they are chosen."""
    targets = [one.get("name") for one in experiment.targets]
    for key, names in (("targets", targets), ("variants", [one.name for one in experiment.variants])):
        for number, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                raise ExperimentError(f"{where}: {key}[{number}].name: each needs a name, found {name!r}")
            if names.index(name) < number:
                raise ExperimentError(f"{where}: {key}: two are called {name!r}; give each a name of its own")
    for number, claim in enumerate(experiment.claims):
        for key, end in (("of", claim.of), ("over", claim.over)):
            if end is None:
                continue
            if end.target not in targets:
                raise ExperimentError(f"{where}: claims[{number}].{key}.target: no target is called {end.target!r}")
            if end.variant not in ([one.name for one in experiment.variants] or [""]):
                raise ExperimentError(f"{where}: claims[{number}].{key}.variant: none is called {end.variant!r}")


def _check_url(key: str, url: str, where: str) -> None:
    """An address that may be written down. Raises ExperimentError, which does not show what may be secret in it."""
    how = "put it into headers or the variable of api_key_env" if key == "target.url" else "it would be written down"
    if "@" in re.split(r"[/?#]", url.partition("//")[2])[0]:
        raise ExperimentError(f"{where}: {key}: holds a password; {how}")
    if SECRET.search(url.partition("?")[2]):
        raise ExperimentError(f"{where}: {key}: holds what may be a key; {how}")
    if not re.match(r"https?://[^/\s]+", url):
        expected = "http://HOST:PORT" if key == "target.url" else "auto, none or a list of URLs"
        raise ExperimentError(f"{where}: {key}: expected {expected}, found {url!r}")


def _check_start(target: "Target", start: "Start", where: str) -> None:
    at = f"{where}: target.start"
    if not re.match(r"http://(127\.0\.0\.1|localhost)([:/]|$)", target.url):
        raise ExperimentError(
            f"{at}: starts a server on this machine, but target.url names another ({target.url}); leave one of them out"
        )
    if start.kind != "command" and target.server != start.kind:
        raise ExperimentError(
            f"{at}.kind: starts {start.kind}, but target.server is {target.server}; write target.server: {start.kind}"
        )
    if start.kind != "command":
        if start.command:
            raise ExperimentError(f"{at}.command: is for kind command; {start.kind} takes flags")
        if not start.model:
            raise ExperimentError(
                f"{at}.model: {start.kind} needs one: a folder, a name in the models' cache or a hub id"
            )
        return
    if not start.command:
        raise ExperimentError(f'{at}.command: expected its words, such as [llama-server, --port, "{{port}}"]')
    words = " ".join(start.command)
    if "{port}" not in words and not start.port:
        raise ExperimentError(
            f'{at}.command: does not say on which port; put "{{port}}" into it, or its own port into target.start.port'
        )
    if "{model}" in words and not start.model:
        raise ExperimentError(f"{at}.model: the command has a {{model}}, and none is given")


def _check_in_process(experiment: "Experiment", start: "Start | None", where: str) -> None:
    at, load, workload = f"{where}: target.api in-process", experiment.load, experiment.workload
    if start is None or start.kind not in ("pytorch", "vllm"):
        raise ExperimentError(
            f"{at}: needs the engine that it is to run: target.start with kind pytorch or vllm, and a model"
        )
    if load.shape != "batch":
        raise ExperimentError(f"{at}: sends batches; set load.shape: batch, found {load.shape}")
    if workload.sessions != "none" or workload.cancel_share or workload.patience_s != "none":
        raise ExperimentError(f"{at}: nobody waits between turns or hangs up; leave sessions, cancel and patience out")
    if experiment.retries.max:
        raise ExperimentError(f"{at}: an engine refuses nothing; leave retries.max out")
    if experiment.export.prometheus_port != "none":
        raise ExperimentError(f"{at}: is not shown to Prometheus; leave export.prometheus_port out")


def _check_workload(experiment: "Experiment", where: str) -> None:
    workload, load = experiment.workload, experiment.load
    if workload.mix and workload.requests != DEMO:
        raise ExperimentError(f"{where}: workload.mix: stands in place of workload.requests; leave one of them out")
    if workload.mix and load.shape == "trace":
        raise ExperimentError(
            f"{where}: workload.mix: a trace has an order of its own; use it without load.shape trace"
        )
    _check_leaving(workload, experiment.timeouts, where)
    names = [part.prefix for part in workload.mix]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ExperimentError(f"{where}: workload.mix: two parts are called {repeated[0]!r}; give each a name")
    replaced = sorted({"messages", "prompt", "inputs"} & experiment.target.extra_body.keys())
    if workload.salt != "none" and replaced:
        raise ExperimentError(
            f"{where}: workload.salt: target.extra_body replaces the prompt ({replaced[0]}), so that none is salted"
        )
    if workload.sessions == "none":
        if workload.think_s:
            raise ExperimentError(f"{where}: workload.think_s: needs workload.sessions: recorded or own")
        return
    if experiment.target.api != "chat":
        raise ExperimentError(
            f"{where}: workload.sessions: a history is made of chat messages; expected target.api: chat, "
            f"found {experiment.target.api}"
        )
    if replaced:
        raise ExperimentError(f"{where}: workload.sessions: target.extra_body replaces the history ({replaced[0]})")
    if workload.sessions == "own" and experiment.target.extra_body.get("n", 1) != 1:
        raise ExperimentError(
            f"{where}: workload.sessions: own: of several answers (target.extra_body.n) none is the one for the history"
        )


def _check_leaving(workload: "Workload", timeouts: "Timeouts", where: str) -> None:
    """Of users who hang up or give up: a timeout of ours must not come before them."""
    after = workload.cancel_after_s
    # a list, since msgspec 0.22 reads a tuple beside a number with bounds out of wild memory
    if isinstance(after, list) and (len(after) != 2 or not after[0] <= after[1]):
        raise ExperimentError(f"{where}: workload.cancel_after_s: expected seconds or [low, high], found {after}")
    latest = after[1] if isinstance(after, list) else after
    if workload.cancel_share and latest >= timeouts.total_s:
        raise ExperimentError(
            f"{where}: workload.cancel_after_s: {latest:g} s is not before timeouts.total_s = {timeouts.total_s:g}; "
            "raise that"
        )
    if workload.patience_s != "none" and workload.patience_s >= timeouts.first_token_s:
        raise ExperimentError(
            f"{where}: workload.patience_s: {workload.patience_s:g} s is not before timeouts.first_token_s = "
            f"{timeouts.first_token_s:g}; raise that"
        )


def _check_load(load: "Load", where: str) -> None:
    if load.shape == "steps" and not load.steps:
        raise ExperimentError(f"{where}: load.steps: shape steps needs levels, such as [[4, 30], [8, 30]]")
    if load.shape == "rate":
        points = [(0.0, load.rate)] if isinstance(load.rate, int | float) else load.rate
        if not any(rate > 0 for _, rate in points):
            raise ExperimentError(f"{where}: load.rate: sends nothing; expected requests/s above 0")
        if any(later[0] < earlier[0] for earlier, later in pairwise(points)):
            raise ExperimentError(f"{where}: load.rate: the seconds of its points go back")
    if load.trace_window_s != "none" and load.trace_window_s[0] >= load.trace_window_s[1]:
        raise ExperimentError(f"{where}: load.trace_window_s: expected [begin, end], found {load.trace_window_s}")


def check_ramp(load: "Load", where: str) -> None:
    """All users must be there before the end."""
    if load.ramp_s > load.duration_s:
        raise ExperimentError(
            f"{where}: load.ramp_s: the ramp ({load.ramp_s:g} s) is longer than load.duration_s ({load.duration_s:g} s)"
        )


def _check_levels(experiment: "Experiment", where: str) -> None:
    """Of a sweep or a search."""
    load = experiment.load
    if load.shape not in ("sweep", "search"):
        return
    sweep, search = load.sweep, load.search
    plan = sweep if load.shape == "sweep" else search
    at = f"{where}: load.{load.shape}"
    if plan.over == "users":
        check_ramp(load, where)
    if plan.reset != "none" and not plan.reset.startswith("/"):
        raise ExperimentError(f"{at}.reset: expected none or a path such as /reset_prefix_cache, found {plan.reset!r}")
    if load.shape == "sweep":
        if not sweep.levels:
            raise ExperimentError(f"{at}.levels: expected values such as [1, 2, 4, 8] or {{from: 1, to: 64, count: 7}}")
        values = sweep.levels if isinstance(sweep.levels, list) else []
    else:
        values = [search.low] if search.high == "none" else [search.low, search.high]
        if search.high != "none" and search.high <= search.low:
            raise ExperimentError(f"{at}.high: expected a value above low ({search.low:g}), found {search.high:g}")
        slo = experiment.slo
        if slo.ttft_ms == slo.tpot_ms == slo.e2e_ms == "none":
            raise ExperimentError(
                f"{where}: slo: a search needs what to meet; set slo.ttft_ms, slo.tpot_ms or slo.e2e_ms"
            )
    if plan.over == "users" and (broken := [value for value in values if value % 1]):
        raise ExperimentError(f"{at}: users are whole numbers, found {broken[0]:g}")


def _check_warmup(warmup: "Warmup", where: str) -> None:
    needed = 2 * warmup.requests
    if not needed and (warmup.until_stable or warmup.duration_s != "none"):
        raise ExperimentError(f"{where}: warmup.requests: a round of 0 requests warms nothing; expected 1 or more")
    if warmup.until_stable and warmup.max_requests < needed:
        raise ExperimentError(
            f"{where}: warmup.max_requests: two rounds to compare are {needed} requests, found {warmup.max_requests}"
        )


def _check_retries(retries: "Retries", where: str) -> None:
    if retries.max and not retries.after:
        raise ExperimentError(f"{where}: retries.after: says after what, such as [connect, 429, 503]; found nothing")
    if retries.pause_s > retries.longest_pause_s:
        raise ExperimentError(
            f"{where}: retries.pause_s: {retries.pause_s:g} s is longer than longest_pause_s = "
            f"{retries.longest_pause_s:g}"
        )


def _check_log(setting: str, where: str) -> None:
    kind, _, rest = setting.partition(":")
    if setting == "none" or (kind == "file" and rest):
        return
    try:
        argv = shlex.split(rest) if kind == "command" else []
    except ValueError as error:
        raise ExperimentError(
            f"{where}: collect.log: expected command:ARGV, found {rest!r} ({str(error).lower()})"
        ) from None
    if not argv:
        raise ExperimentError(
            f"{where}: collect.log: expected none or file:PATH or command:ARGV, such as "
            f"'command:docker logs --follow --tail 0 NAME', found {setting!r}"
        )
    if shutil.which(argv[0]) is None:
        raise ExperimentError(
            f"{where}: collect.log: expected a command that is on this machine, found {argv[0]!r}, which is not"
        )
