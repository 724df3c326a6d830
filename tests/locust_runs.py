"""`locust -f load_test.py` started as a child process, as a user types it, and what it leaves."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from twoclocks.record import read_records

ROOT = Path(__file__).parent.parent
MARK = "TWOCLOCKS_TEST_OUTPUT"  # in the environment of whatever a run starts
LOCUST = str(Path(sys.executable).with_name("locust"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(tmp_path, *words_, headless=True, limits=None, environ=None):
    """Locust as a child that does not outlive the test, whatever becomes of it. limits: RLIMIT_... -> value."""
    port = str(free_port())  # Locust's own would meet another master of this machine
    alone = ["collect.otlp_port=none", "collect.otlp_grpc_port=none", "collect.gpu=none"]
    settings = [word for setting in (f"output={tmp_path}", *alone) for word in ("--set", setting)]
    command = [LOCUST, "-f", str(ROOT / "load_test.py"), "--only-summary", *settings, *words_]
    command += ["--master-bind-port", port, "--master-port", port, *(["--headless"] if headless else [])]

    def prepare():
        # a shell's background job, as tests may be, ignores Ctrl-C, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for limit, value in (limits or {}).items():
            resource.setrlimit(limit, (value, value))

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
        env=os.environ | {MARK: str(tmp_path)} | (environ or {}),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def left_behind(tmp_path) -> list[str]:
    """Command lines of the processes that a run there has started and that are still there, in whatever session."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if f"{MARK}={tmp_path}".encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.with_name("cmdline").read_text().replace("\0", " "))
    return found


def run(tmp_path, *words_, timeout=120, **options):
    with started(tmp_path, *words_, **options) as process:
        output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def only_run(tmp_path) -> Path:
    (folder,) = [path for path in tmp_path.iterdir() if (path / "run.json").exists()]
    return folder


def read(tmp_path):
    folder = only_run(tmp_path)
    return list(read_records(folder / "requests.jsonl")), json.loads((folder / "run.json").read_text())


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
