import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from twoclocks import keeper, servers
from twoclocks.errors import RunFolderError, TargetError
from twoclocks.servers import Server

ROOT = Path(__file__).resolve().parent.parent

# Answers /health and completions; writes its own process id and its child's into the file named first.
SERVES = """
import http.server, os, pathlib, subprocess, sys
print("loading", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={new_session})
pathlib.Path(sys.argv[1]).write_text(f"{{os.getpid()}} {{child.pid}}")
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.send_response({status})
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")
    def log_message(self, *words):
        pass
    def do_GET(self):
        self.answer()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
DIES = (
    "import sys; print('starting'); print('ValueError: no such model: x', file=sys.stderr); print('bye'); sys.exit(7)"
)
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def run(tmp_path: Path, code: str, ready_timeout_s: float = 30, grace_s: float = 5) -> AbstractContextManager[Server]:
    port = servers.free_port()
    return servers.started_command(
        [sys.executable, "-c", code, str(tmp_path / "pids"), str(port)],
        name="fake",
        url=f"http://127.0.0.1:{port}",
        model="m",
        log_path=tmp_path / "server.log",
        env=dict(os.environ),
        ready_timeout_s=ready_timeout_s,
        grace_s=grace_s,
    )


def pids(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("new_session", [False, True])
def test_a_server_that_answers_is_given_and_nothing_of_it_is_left(tmp_path: Path, new_session: bool) -> None:
    with run(tmp_path, SERVES.format(new_session=new_session, status=200)) as server:
        command, grandchild = pids(tmp_path)

        assert server.pid == command
        assert alive(command)
        assert alive(grandchild)

    assert not alive(command)
    assert not alive(grandchild)


def test_an_exception_in_the_body_ends_the_server(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run(tmp_path, SERVES.format(new_session=False, status=200)):
        raise KeyboardInterrupt

    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_server_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    with run(tmp_path, DEAF + SERVES.format(new_session=False, status=200), grace_s=0.3):
        pass

    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_server_that_dies_early_is_one_line_with_its_last_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as error, run(tmp_path, DIES):
        pass

    message = str(error.value)
    assert "ended before it was ready (exit code 7)" in message
    assert "ValueError: no such model: x" in message
    assert str(tmp_path / "server.log") in message
    assert "\n" not in message


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    never_ready = run(tmp_path, SERVES.format(new_session=False, status=503), ready_timeout_s=3)
    with pytest.raises(TargetError, match=r"fake was not ready after 3 s: loading; its log: "), never_ready:
        pass

    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_refused_first_request_is_told_at_once(tmp_path: Path) -> None:
    serves_get_only = SERVES.format(new_session=False, status=200).replace(
        'self.rfile.read(int(self.headers["Content-Length"]))\n        self.answer()',
        "self.send_error(404, 'no such model')",
    )
    with pytest.raises(TargetError, match="fake refused a first request with HTTP 404"), run(tmp_path, serves_get_only):
        pass


def test_a_command_that_is_not_there_says_how_to_install_it(tmp_path: Path) -> None:
    server = servers.started_server(
        kind="vllm", python=Path("/nowhere/python"), model=tmp_path, log_path=tmp_path / "server.log"
    )
    expected = r"cannot start /nowhere/python: No such file or directory; .*prepare\.py vllm"
    with pytest.raises(TargetError, match=expected), server:
        pass


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = servers.started_server(
        kind="vllm", python=Path(sys.executable), model=tmp_path, log_path=tmp_path / "file" / "server.log"
    )
    with (
        pytest.raises(RunFolderError, match=r"the server's log cannot be written: .*; name another place: --set"),
        server,
    ):
        pass


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = servers.started_server(
            kind="vllm", python=Path(sys.executable), model=tmp_path, port=port, log_path=tmp_path / "server.log"
        )
        expected = rf"port {port} of 127\.0\.0\.1 cannot be used .*0 for a free one"
        with pytest.raises(TargetError, match=expected), server:
            pass

    assert not (tmp_path / "server.log").exists()


def test_it_works_where_gevent_has_patched_the_standard_library(tmp_path: Path) -> None:
    """As in Locust: subprocess, os.close and sockets are gevent's."""
    code = f"""
from gevent import monkey; monkey.patch_all()
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_servers import SERVES, run
with run(pathlib.Path({str(tmp_path)!r}), SERVES.format(new_session=False, status=200)) as server:
    print(server.pid)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert int(done.stdout) == pids(tmp_path)[0]
    assert not any(alive(pid) for pid in pids(tmp_path))


# A parent of its own, so that the test can end it in any way.
PARENT = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
from test_servers import SERVES, run
with run(pathlib.Path({folder!r}), SERVES.format(new_session={new_session}, status=200)):
    pathlib.Path({folder!r}, "ready").touch()
    time.sleep(600)
"""


@pytest.fixture(params=[False, True], ids=["same session", "own session"])
def parent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has started a server whose child is in the server's session, or in one of its own."""
    code = PARENT.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), new_session=request.param)
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            wait_for((tmp_path / "ready").exists, "the server is ready")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_outlives_a_parent_that_is_ended(
    tmp_path: Path, parent: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    server, grandchild = pids(tmp_path)

    assert alive(server)
    assert alive(grandchild)

    parent.send_signal(number)
    parent.wait()

    wait_for(lambda: not alive(server), "the server has ended")
    wait_for(lambda: not alive(grandchild), "its child has ended")


def test_stopping_after_the_keeper_was_killed_leaves_nothing(tmp_path: Path) -> None:
    kept = keeper.start([sys.executable, "-c", SERVES.format(new_session=False, status=200), tmp_path / "pids", "0"])
    wait_for(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()), "the command has started")
    kept.keeper.kill()
    kept.keeper.wait()

    kept.stop()

    for pid in pids(tmp_path):
        wait_for(lambda pid=pid: not alive(pid), f"process {pid} has ended")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("code", "expected"), [("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_kept_command_passes_its_exit_code_on(code: str, expected: int) -> None:
    kept = keeper.start([sys.executable, "-c", code])

    assert kept.keeper.wait() == expected


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "its log is empty"),
        ("one\n\ntwo\n", "two"),
        ("OSError: [Errno 28] No space\nshutting down\n", "OSError: [Errno 28] No space"),
        (
            '{"message": "ok"}\n{"message": "RuntimeError: engine\\n  at x"}\n{"message": "bye"}\n',
            "RuntimeError: engine",
        ),
        ("KeyError: 1\nnoise\nvllm.errors.EngineDeadError: dead\n", "vllm.errors.EngineDeadError: dead"),
        ("OSError: cause\nRuntimeError: failed. See root cause above.\n", "OSError: cause"),
        ("RuntimeError: failed. See root cause above.\n", "RuntimeError: failed. See root cause above."),
    ],
)
def test_the_telling_line_of_a_log(tmp_path: Path, log: str, expected: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)

    assert servers.last_telling_line(path) == expected


def test_flags_of_the_caller_come_last() -> None:
    command = servers.server_command("vllm", Path("py"), Path("/m"), "name", 8000, ["--dtype", "bfloat16"])

    assert command[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-2:] == ["--dtype", "bfloat16"]
    assert command.index("--enable-per-request-metrics") > 0


def test_scripts_and_package_agree_on_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """scripts/prepare.py cannot import the package, so it has the rule a second time."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare; print(prepare.CACHE)"
    for variables in ({}, {"XDG_CACHE_HOME": str(tmp_path)}, {"TWOCLOCKS_CACHE": str(tmp_path / "own")}):
        with monkeypatch.context() as patch:
            for name in ("XDG_CACHE_HOME", "TWOCLOCKS_CACHE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            said = subprocess.run(
                [sys.executable, "-c", code, ROOT / "scripts"], capture_output=True, text=True, check=True
            )

            assert said.stdout.strip() == str(servers.cache_folder())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for torch==2.13.0+cpu",
            "the package index cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "TWOCLOCKS_TORCH_INDEX"),
        ("ERROR: No matching distribution found for numba==0.65.0", "no wheel of numba==0.65.0"),
        ("Error: Command '...' returned non-zero exit status 1.\nensurepip is not available", "python3-venv"),
        ("doing\nValueError: bad model\n", "ValueError: bad model"),
    ],
)
def test_a_failed_preparation_says_how_to_go_on(output: str, expected: str) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare; print(prepare.diagnosis(sys.argv[2]))"
    said = subprocess.run(
        [sys.executable, "-c", code, ROOT / "scripts", output], capture_output=True, text=True, check=True
    )

    assert expected in said.stdout
    assert said.stdout.count("\n") == 1


def test_the_disk_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import collections, shutil, sys
        sys.path.insert(0, sys.argv[1])
        import prepare
        shutil.disk_usage = lambda path: collections.namedtuple("Usage", "total used free")(10, 0, 900_000_000)
        sys.argv = ["prepare.py", "transformers"]
        sys.exit(prepare.main())
    """)
    environment = {**os.environ, "TWOCLOCKS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, ROOT / "scripts"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert said.returncode == 2
    assert "900 MB of free disk and 1700 MB are needed for transformers" in said.stderr
    assert not (tmp_path / "cache" / "venvs").exists()


def test_what_is_made_already_is_only_named(tmp_path: Path) -> None:
    """A stamp from the same list counts; one from another list does not, nor an environment that lost its Python."""
    code = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        import prepare
        folder = prepare.FOLDERS["vllm"]
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        print(prepare.is_made("vllm"))
        (folder / ".twoclocks").write_text("of another list")
        print(prepare.is_made("vllm"))
        (folder / ".twoclocks").write_text(prepare.DIGESTS["vllm"]())
        sys.argv = ["prepare.py", "vllm"]
        code = prepare.main()
        (folder / "bin" / "python").unlink()
        print(prepare.is_made("vllm"))
        sys.exit(code)
    """)
    environment = {**os.environ, "TWOCLOCKS_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, ROOT / "scripts"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert said.stdout.splitlines() == ["False", "False", f"vllm={tmp_path}/venvs/vllm/bin/python", "False"]
