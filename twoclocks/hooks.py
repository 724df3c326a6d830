"""Locust's hooks: our command-line options, and the side of a run that this process takes.

Nothing is made before Locust's init event, since `--processes` forks before it.
"""

import contextlib
import logging
import resource
import sys
from pathlib import Path
from typing import Any

from locust import events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from twoclocks.endpoint import make_endpoint, token_counter
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import load_experiment
from twoclocks.export import open_port
from twoclocks.levels import one_run_only
from twoclocks.master import MasterSide, apply_options
from twoclocks.run_folder import refuse_existing
from twoclocks.shapes import first_users, in_window, length_s
from twoclocks.web_tab import add_tab
from twoclocks.worker import WorkerSide
from twoclocks.workload import load_workload

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
    parser.set_defaults(web_host="127.0.0.1", master_bind_host="127.0.0.1")


def on_init(environment: Environment, runner: Any, **_: Any) -> None:
    """Read the experiment, fill Locust's own options from it, and listen."""
    _raise_file_limit()
    if isinstance(runner, WorkerRunner):
        WorkerSide(environment, runner)
        return
    options = environment.parsed_options
    assert options is not None
    logging.getLogger("locust.stats_logger").disabled = options.without_tables
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
        token_counter(settings.target.tokenizer)
    except TwoclocksError as error:
        sys.stderr.write(f"twoclocks: {error}\n")
        sys.exit(error.exit_code)
    load = settings.load
    users = first_users(load, options.expect_workers if isinstance(runner, MasterRunner) else 1)
    ramp_s = load.ramp_s if load.shape == "ramp" else 0.0
    options.num_users, options.spawn_rate = users, users / max(ramp_s, 1.0)
    options.host = environment.host = settings.target.url
    environment.stop_timeout = load.drain_s
    # the measured time begins after the warm-up, so the clock of a headless run is ours; elsewhere this fills the form
    options.run_time = None if options.headless else round(length_s(load))
    side = MasterSide(environment, runner, options, experiment, settings)
    if environment.web_ui is not None:
        add_tab(environment.web_ui, options.web_base_path, side.shown)


def _raise_file_limit() -> None:
    """A stream is an open file: take as many as the system lets this user have; self_samples.jsonl says how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
