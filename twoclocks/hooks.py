"""Locust's hooks: our command-line options, and the side of a run that this process takes.

Nothing is made before Locust's init event, since `--processes` forks before it.
"""

import contextlib
import logging
import math
import resource
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust import events
from locust.argument_parser import ui_extra_args_dict
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from twoclocks.client import SPARE_FILES
from twoclocks.endpoint import make_endpoint, request_headers, secrets_of, token_counter
from twoclocks.errors import ExperimentError, TwoclocksError, plain
from twoclocks.experiment import Experiment, Load, load_experiment, replace
from twoclocks.export import open_port
from twoclocks.hosts import Agreed, agree, agreed_hosts, is_wide, origin_of, shown, somebody_is_there
from twoclocks.levels import one_run_only
from twoclocks.locust_options import apply_options, take_ours
from twoclocks.masks import tells_a_secret
from twoclocks.master import MasterSide
from twoclocks.run_folder import refuse_existing
from twoclocks.shapes import first_users, in_window, length_s, most_streams
from twoclocks.web_guard import check, guard, only_in_turn, web_password
from twoclocks.web_tab import add_tab
from twoclocks.worker import WorkerSide
from twoclocks.workload import load_workload

log = logging.getLogger("twoclocks")
OWN_FILES = 12
"""What a process has open beside its streams: run folder, pipes, the event loop, the collectors."""
DEFAULT_EXPERIMENT = Path(__file__).parent.parent / "configs" / "default.yaml"


def listen() -> None:
    """Called by the locustfile, once."""
    events.init_command_line_parser.add_listener(add_options)
    events.init.add_listener(on_init)


def add_options(parser: Any) -> None:
    """Our options beside Locust's; web UI and master port listen on this machine only unless told otherwise."""
    parser.add_argument(
        "--experiment",
        metavar="FILE",
        default=str(DEFAULT_EXPERIMENT),
        env_var="TWOCLOCKS_EXPERIMENT",
        include_in_web_ui=False,
        help="experiment file, e.g. configs/demo-vllm.yaml (default: configs/default.yaml)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        include_in_web_ui=False,
        help="change one key of the experiment, e.g. --set load.users=10; may be given several times",
    )
    for key in ("target", "variant"):
        parser.add_argument(
            f"--{key}", metavar="NAME", include_in_web_ui=False, help=f"which of the experiment's {key}s to take"
        )
    parser.add_argument(
        "--run-folder",
        metavar="PATH",
        type=Path,
        include_in_web_ui=False,
        help="folder of this run, which must not exist yet (default: a new one below the experiment's output)",
    )
    parser.add_argument(
        "--started",
        metavar="FILE",
        type=Path,
        include_in_web_ui=False,
        help="what `twoclocks run` knows of the server that it has started, for run.json",
    )
    parser.add_argument(
        "--no-report",
        action="store_true",
        include_in_web_ui=False,
        help="leave the report to a later `twoclocks report RUN`",
    )
    parser.add_argument(
        "--without-tables",
        action="store_true",
        include_in_web_ui=False,
        help="leave out Locust's own tables at the end; a run of many would fill the screen with them",
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        include_in_web_ui=False,
        help="load for a host that is neither this machine nor in a private network is meant; asked for once a host",
    )
    parser.add_argument(
        "--web-open",
        action="store_true",
        env_var="TWOCLOCKS_WEB_OPEN",
        include_in_web_ui=False,
        help="no login for a web UI that listens wider than this machine, since something else keeps others out",
    )
    # users of a worker that is gone move to the others; who speaks to the master's port is not asked who he is
    parser.set_defaults(web_host="127.0.0.1", master_bind_host="127.0.0.1", enable_rebalancing=True)


def on_init(environment: Environment, runner: Any, **_: Any) -> None:
    """Read the experiment, fill Locust's own options from it, and listen."""
    _raise_file_limit()
    gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)  # which gevent else prints before it tells Locust
    if isinstance(runner, WorkerRunner):
        WorkerSide(environment, runner)
        return
    options = environment.parsed_options
    assert options is not None
    logging.getLogger("locust.stats_logger").disabled = options.without_tables
    logging.getLogger("locust.main").addFilter(_is_true)
    try:
        if options.run_folder is not None:
            refuse_existing(options.run_folder)
        experiment = load_experiment(
            Path(options.experiment), options.overrides, target=options.target, variant=options.variant
        )
        one_run_only(experiment)
        settings = apply_options(experiment, options)
        in_window(load_workload(settings), settings.load)  # so that what cannot be sent is told at once
        if (listener := open_port(settings.export)) is not None:  # a port that is taken is told at once
            listener.close()
        make_endpoint(settings.target, settings.timeouts)
        _check_file_limit(settings.load, options.expect_workers if isinstance(runner, MasterRunner) else 1)
        token_counter(settings.target.tokenizer)
        agreed, interactive = agreed_hosts(), somebody_is_there()
        agree(settings.target.url, agreed, yes=options.yes, interactive=interactive, say=log.warning)
        if environment.web_ui is not None:
            _close_to_others(environment.web_ui, options, settings, agreed)
    except TwoclocksError as error:
        sys.stderr.write(f"twoclocks: {plain(error)}\n")
        sys.exit(error.exit_code)
    for text in _warnings(settings, options, isinstance(runner, MasterRunner)):
        log.warning(text)
    load = settings.load
    users = first_users(load, options.expect_workers if isinstance(runner, MasterRunner) else 1)
    ramp_s = load.ramp_s if load.shape == "ramp" else 0.0
    options.num_users, options.spawn_rate = users, users / max(ramp_s, 1.0)
    options.host = environment.host = settings.target.url
    environment.stop_timeout = load.drain_s
    # the measured time begins after the warm-up, so the clock of a run is ours; elsewhere this fills the form
    options.run_time = None if options.headless or options.autostart else round(length_s(load))
    side = MasterSide(environment, runner, options, take_ours(options), experiment, settings)
    if environment.web_ui is not None:
        add_tab(environment.web_ui, options.web_base_path, side.shown)
        only_in_turn(environment.web_ui, side.may_begin)


def _is_true(record: logging.LogRecord) -> bool:
    """Locust says of a run without its --run-time that it has no end; the clock of a headless run is ours."""
    return not str(record.msg).startswith("No run time limit set")


def _close_to_others(web_ui: Any, options: Any, settings: Experiment, agreed: Agreed) -> None:
    password, tls = web_password(), bool(options.tls_cert and options.tls_key)
    host, port = options.web_host, options.web_port
    for text in check(host, port, password, login=options.web_login, is_open=options.web_open, tls=tls):
        log.warning(text)

    def may_send(host: str) -> None:
        url = settings.target.url
        replace(settings, "target.url", host)
        if origin_of(host) == origin_of(url):
            return
        if request_headers(settings.target) or secrets_of(settings.target):
            raise ExperimentError(f"{host}: the key and the headers are for {url} alone; start with -H {host} instead")
        agree(host, agreed, yes=options.yes, interactive=True, say=log.warning)

    display = urlsplit(f"//{(options.web_host_display_name or '').rpartition('//')[2]}")
    names = {host, display.hostname or ""}
    guard(web_ui, options.web_base_path, password, names, display.netloc, may_send, set(ui_extra_args_dict()))


def _warnings(settings: Experiment, options: Any, is_master: bool) -> list[str]:
    """What the user should know of who can reach this process's ports, and read its command line."""
    told = [
        f"--set {override.partition('=')[0]}: every user of this machine can read a command line; export the value and "
        f"write --set '{override.partition('=')[0]}=${{NAME}}'"
        for override in options.overrides
        if tells_a_secret(override)
    ]
    collect = settings.collect
    if is_wide(collect.otlp_host) and (collect.otlp_port, collect.otlp_grpc_port) != ("none", "none"):
        told.append(f"collect.otlp_host: whoever reaches {shown(collect.otlp_host)} can send spans as if a server's")
    host = options.master_bind_host
    if is_master and is_wide(host):
        told.append(
            f"--master-bind-host: whoever reaches {shown(host)}:{options.master_bind_port} can join as a worker, is "
            "told the experiment without its secrets, and can end or falsify the run; keep it in a network of your own"
        )
    return told


def _check_file_limit(load: Load, processes: int) -> None:
    """Raises ExperimentError where it is sure that some streams could not be opened."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    streams = math.ceil((most_streams(load) or 0) / max(processes, 1))
    if streams > limit - SPARE_FILES - OWN_FILES:
        key = "batch" if load.shape == "batch" else "steps" if load.shape == "steps" else "users"
        raise ExperimentError(
            f"load.{key}: {streams:,} streams in one process are as many open files, and this one may have {limit:,}; "
            "raise the limit (ulimit -n), use more processes (--processes 2), or ask for less"
        )


def _raise_file_limit() -> None:
    """A stream is an open file: take as many as the system lets this user have; self_samples.jsonl says how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
