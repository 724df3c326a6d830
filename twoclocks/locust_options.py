"""What a command line changes of an experiment: Locust's own options and --set, as run.json tells it, and --started."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from twoclocks import experiment as experiments
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import Experiment
from twoclocks.masks import masked, masked_word


class Ours(msgspec.Struct, frozen=True):
    """Those of our options that Locust need not know: it sends all that it knows to every worker."""

    overrides: list[str] = []
    run_folder: Path | None = None
    started: Path | None = None


def take_ours(options: Namespace) -> Ours:
    """Our options, which are then no longer among Locust's."""
    ours = Ours(options.overrides, options.run_folder, options.started)
    options.overrides, options.run_folder, options.started = [], None, None
    return ours


def apply_options(experiment: Experiment, options: Namespace) -> Experiment:
    """The experiment with Locust's -H, -u, -r, -t and --stop-timeout in their places. Raises ExperimentError."""
    changes: dict[str, Any] = {}
    if options.host:
        changes["target.url"] = options.host
    is_ramp = experiment.load.shape == "ramp"  # in any other shape the number of Locust users is not the user's to set
    if options.num_users is not None and is_ramp:
        changes["load.users"] = options.num_users
    if options.spawn_rate is not None and is_ramp:
        changes["load.ramp_s"] = (options.num_users or experiment.load.users) / options.spawn_rate
        if changes["load.ramp_s"] <= 1:
            changes["load.ramp_s"] = 0  # all of them in Locust's first step
    if options.run_time and experiment.load.shape != "steps":
        changes["load.duration_s"] = options.run_time
    if float(options.stop_timeout or 0):
        changes["load.drain_s"] = float(options.stop_timeout)
    for key, value in changes.items():
        experiment = experiments.replace(experiment, key, value)
    return experiment


def told_overrides(written: Experiment, experiment: Experiment, overrides: list[str]) -> dict[str, Any]:
    """What differs from the experiment's file, without what may be secret."""
    told: dict[str, Any] = masked(_differences(written, experiment) | dict(_split(overrides)))
    return told


def started(facts: Path | None) -> dict[str, Any]:
    """What is known of a server that was started for this run. Raises TwoclocksError."""
    if facts is None:
        return {}
    try:
        return {"started": msgspec.json.decode(facts.read_bytes())}
    except (OSError, msgspec.MsgspecError) as error:
        raise TwoclocksError(f"--started {facts}: cannot be read: {' '.join(str(error).split())}") from None


def _differences(before: Experiment, after: Experiment) -> dict[str, Any]:
    """Dotted keys whose value changed, with the new value."""
    old, new = _flat(msgspec.to_builtins(before)), _flat(msgspec.to_builtins(after))
    return {key: value for key, value in new.items() if old.get(key) != value and "headers" not in key}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _split(overrides: list[str]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        key, _, value = masked_word(override).partition("=")
        yield key, value
