"""The exporter, seen from the run: its port, what it has to do, and the handle on its process.

The process itself is twoclocks.exporter. It is one of its own and reads the run folder as the run writes it, so that
the figures of a thousand streams cost the load generator nothing, and workers make no difference.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from twoclocks import otlp_metrics
from twoclocks.errors import ExperimentError, plain
from twoclocks.experiment import Experiment, Export
from twoclocks.hosts import is_wide, shown
from twoclocks.run_folder import RunFolder
from twoclocks.shapes import is_open

log = logging.getLogger("twoclocks")
LABEL = 200  # characters of a text of others in a label
END_S = 25.0  # for what is left to read, and for a last OTLP message, beyond linger_s


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child has to do."""

    run_folder: str
    about: dict[str, str]  # what names the run, as labels
    slo: dict[str, float | str]  # as the experiment has it
    is_open: bool  # do requests leave when they are due?
    socket: int | None  # file descriptor, listening; None: Prometheus cannot scrape this run
    linger_s: float
    otlp: bool = False  # send the same as OTLP
    began_unix: float = 0.0  # when the run began


def open_port(export: Export) -> socket.socket | None:
    """The port at which Prometheus will find the run; None if there is to be none. Raises ExperimentError."""
    if export.prometheus_port == "none":
        return None
    family = socket.AF_INET6 if ":" in export.host else socket.AF_INET
    try:
        return socket.create_server((export.host, export.prometheus_port), family=family)
    except OSError as error:
        raise ExperimentError(
            f"export.prometheus_port: {export.host}:{export.prometheus_port} cannot be listened at "
            f"({os.strerror(error.errno).lower() if error.errno and error.errno > 0 else error.strerror}); "
            f"is another run exporting there? set another port, such as --set export.prometheus_port="
            f"{export.prometheus_port % 65535 + 1}"
        ) from None


class Exporter:
    """The parent's handle on the child process, which takes the listening socket over."""

    def __init__(self, job: Job, listener: socket.socket | None) -> None:
        # a session of its own, so that Ctrl-C in the terminal ends the load first and the last scrape still happens
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twoclocks.exporter"],
            stdin=subprocess.PIPE,
            pass_fds=() if listener is None else (listener.fileno(),),
            start_new_session=True,
        )
        self.job = job
        if listener is not None:
            listener.close()
        self._say(msgspec.json.encode(job))

    def finish(self) -> str | None:
        """All that it counts is in the run folder: from now on it shows the end, for a last scrape.

        What the user should know, if it has ended before.
        """
        ended = self.process.poll()
        self._say(b"end")
        return None if ended is None else f"the exporter ended early (exit code {ended}); its last figures are missing"

    def wait(self) -> None:
        """Until it has ended and its port is free: the last scrape is done, or linger_s is over."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.job.linger_s + END_S)
        finally:  # also on Ctrl-C
            self.close()

    def close(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.communicate()  # also closes the pipe

    def _say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # which finish() tells
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()


def start_exporter(
    experiment: Experiment, folder: RunFolder, note: Callable[[str], None], *, otel: bool
) -> Exporter | None:
    """Shows a run while it goes on, to Prometheus and as OTLP; None where neither is wanted. Raises ExperimentError."""
    otlp = otel and otlp_metrics.is_wanted()
    if otlp and (package := otlp_metrics.missing_package()) is not None:
        note(f"--otel: no metrics are sent, as {package} is not installed; pip install 'twoclocks[otel]'")
        otlp = False
    listener = open_port(experiment.export)
    if listener is not None:
        host, port = listener.getsockname()[:2]
        log.info("Prometheus finds this run at http://%s:%s/metrics", shown(host), port)
        if is_wide(experiment.export.host):
            log.warning("export.host: whoever reaches %s:%s can read this run's figures and names", host, port)
    if listener is None and not otlp:
        return None
    told = folder.meta["target"]
    names = {"target": "name", "server": "server", "model": "model", "server_version": "server_version"}
    about = {label: plain(told[name] or "")[:LABEL] for label, name in names.items()}
    job = Job(
        run_folder=str(folder.path),
        about={"run": folder.path.name, "experiment": plain(experiment.name)[:LABEL]} | about,
        slo=msgspec.to_builtins(experiment.slo),
        is_open=is_open(experiment.load),
        socket=None if listener is None else listener.fileno(),
        linger_s=experiment.export.linger_s,
        otlp=otlp,
        began_unix=folder.meta["started_at_unix"],
    )
    return Exporter(job, listener)
