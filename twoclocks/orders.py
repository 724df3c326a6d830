"""Orders: what the master tells each worker before a run, and what the worker makes of it. No secret is in them.

Locust's connections are neither encrypted nor is anyone asked who he is, so what is secret (headers, the API key)
never travels: a worker takes it from its own experiment file and environment. Request files do not travel either; the
master's digest of them is compared with that of the worker's own copies.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from twoclocks import __version__
from twoclocks.endpoint import request_headers, secrets_of
from twoclocks.errors import ExperimentError
from twoclocks.experiment import Collect, Experiment, Export
from twoclocks.hosts import origin_of
from twoclocks.masks import HIDDEN, masked


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has to know to take part in a run."""

    run: str
    version: str  # of twoclocks
    clock: str  # names the master's boot, whose processes may share one clock
    experiment: dict[str, Any]  # as resolved, without what is secret and what only the master does
    has_key: bool  # does the master's environment hold the API key?
    digest: str  # of the request files
    model: str
    salt: str
    share: int
    shares: int
    late: bool  # did it come after the window had begun?


def shipped(experiment: Experiment) -> dict[str, Any]:
    """The experiment for workers: secrets masked; the master collects and exports alone."""
    target = msgspec.structs.replace(experiment.target, start=None, stages=[])
    alone = msgspec.structs.replace(experiment, target=target, collect=Collect(), export=Export(), claims=[])
    tree: dict[str, Any] = masked(msgspec.to_builtins(alone))
    return tree


def has_key(experiment: Experiment) -> bool:
    """Does this process's environment hold the API key? One in a file is asked for where requests are made."""
    return experiment.target.api_key_file is None and bool(os.environ.get(experiment.target.api_key_env, "").strip())


def digest(experiment: Experiment) -> str:
    """SHA-256 of the request files, in their order. Raises ExperimentError."""
    workload, found = experiment.workload, hashlib.sha256()
    for name in [part.requests for part in workload.mix] or [workload.requests]:
        try:
            with Path(name).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ExperimentError(f"{name}: request file cannot be read: {error.strerror}") from None
    return found.hexdigest()


def ordered(order: Order, own: Callable[[], Experiment]) -> Experiment:
    """The experiment that a worker is to run; ``own`` loads the worker's own, for what is secret in it.

    Raises ExperimentError, with what differs from the master and how to go on.
    """
    if order.version != __version__:
        raise ExperimentError(f"it has twoclocks {__version__}, the master {order.version}; install the same on both")
    tree = order.experiment
    experiment = msgspec.convert(tree, Experiment)
    if _is_masked(tree) or order.has_key or has_key(experiment) or experiment.target.api_key_file is not None:
        experiment = _with_secrets(tree, own())
    if order.has_key and not has_key(experiment):
        raise ExperimentError(
            f"{experiment.target.api_key_env} is not set in its environment, as it is in the master's; set it there, "
            "since no key travels between them"
        )
    if (here := digest(experiment)) != order.digest:
        names = ", ".join(part.requests for part in experiment.workload.mix) or experiment.workload.requests
        raise ExperimentError(
            f"{names}: is not the file that the master has (SHA-256 {here[:12]}, the master's {order.digest[:12]}); "
            "copy the master's to the same place there"
        )
    return experiment


def _with_secrets(tree: dict[str, Any], own: Experiment) -> Experiment:
    """The order's experiment with what is secret of the worker's own, which goes where its own says and nowhere else.

    Whoever reaches the worker's master port could be its master, and is not asked who he is.
    """
    experiment = msgspec.convert(_filled(tree, msgspec.to_builtins(own), ""), Experiment)
    keys = {"api_key_env": own.target.api_key_env, "api_key_file": own.target.api_key_file}
    target = msgspec.structs.replace(experiment.target, **keys)
    if (request_headers(target) or secrets_of(target)) and origin_of(target.url) != origin_of(own.target.url):
        raise ExperimentError(
            f"{target.url}: its key and headers are for {own.target.url} alone; start the worker with the same "
            "--experiment, --set and -H as the master"
        )
    return msgspec.structs.replace(experiment, target=target)


def _is_masked(tree: Any) -> bool:
    if isinstance(tree, dict | list):
        return any(map(_is_masked, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, str) and HIDDEN in tree


def _filled(tree: Any, own: Any, key: str) -> Any:
    """The tree with what is masked in it taken from ``own``, at the same place."""
    if isinstance(tree, dict):
        return {
            name: _filled(value, own.get(name) if isinstance(own, dict) else None, f"{key}.{name}".lstrip("."))
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        owned = own if isinstance(own, list) and len(own) == len(tree) else [None] * len(tree)
        pairs = enumerate(zip(tree, owned, strict=True))
        return [_filled(value, mine, f"{key}[{place}]") for place, (value, mine) in pairs]
    if not (isinstance(tree, str) and HIDDEN in tree):
        return tree
    if own is None or own == tree:
        raise ExperimentError(
            f"{key}: its value may be secret and does not travel; start the worker with the same --experiment and "
            "--set as the master"
        )
    return own
