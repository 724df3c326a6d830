"""deploy/serve.py, which runs a server in its container: its log reaches the tester, its end is the server's own."""

import os
import signal
import subprocess
import sys

import pytest
from locust_runs import ROOT, wait_for

from twoclocks.log_tail import FileTail

SERVE = ROOT / "deploy" / "serve.py"


def command(folder, *words):
    return [sys.executable, str(SERVE), str(folder), "vllm", "org/model", *words]


def serve(folder, program, **environ):
    words = command(folder, sys.executable, "-c", program)
    return subprocess.run(words, capture_output=True, timeout=60, check=False, env={**os.environ, **environ})


def test_what_the_server_says_goes_both_ways_and_the_tester_is_told_of_it(tmp_path):
    done = serve(tmp_path, "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(7)")

    assert done.returncode == 7
    assert done.stdout == b"out\nerr\n"
    assert (tmp_path / "vllm.log").read_bytes() == done.stdout
    assert (tmp_path / "about").read_text() == "vllm\norg/model\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_server_which_may_end_in_its_own_way(tmp_path, number):
    program = """
import signal, sys, time
def end(number, _):
    print("ending", flush=True)
    sys.exit(3)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(command(tmp_path, sys.executable, "-c", program), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        rest = process.stdout.read()

    assert process.returncode == 3
    assert rest == b"ending\n"
    assert (tmp_path / "vllm.log").read_bytes() == b"ready\nending\n"


def test_a_server_that_a_signal_ends_has_the_shells_exit_code(tmp_path):
    assert serve(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + 9


def test_a_child_that_holds_the_output_open_does_not_hold_up_the_end(tmp_path):
    program = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    done = serve(tmp_path, program)
    os.kill(int(done.stdout), signal.SIGKILL)  # it was still there

    assert done.returncode == 0


def test_a_command_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(command(tmp_path, "/no/such"), capture_output=True, text=True, check=False)

    assert done.returncode == 127
    assert done.stderr == "serve.py: /no/such: No such file or directory\n"


def test_a_log_that_cannot_begin_anew_costs_the_copy_alone(tmp_path):
    """Where NAME.1 stands there is a folder, so that the full file cannot be put there."""
    (tmp_path / "vllm.log.1" / "in the way").mkdir(parents=True)
    program = "import time\nfor _ in range(3): print(7 * 'x', flush=True); time.sleep(0.3)"
    done = serve(tmp_path, program, SERVE_MAX_BYTES="10")

    assert done.returncode == 0
    assert done.stdout == 3 * b"xxxxxxx\n"
    assert b"the tester will miss the server's log" in done.stderr


def test_bad_usage_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, SERVE, tmp_path], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == "usage: serve.py FOLDER KIND MODEL COMMAND [ARGUMENT ...], or serve.py --healthy URL\n"


def test_a_folder_that_cannot_be_written_costs_the_copy_alone(tmp_path):
    done = serve(tmp_path / "missing", "print('served')")

    assert done.returncode == 0
    assert done.stdout == b"served\n"
    assert b"the tester will miss the server's log" in done.stderr


def test_the_log_of_an_earlier_start_is_kept_once(tmp_path):
    for word in ("first", "second", "third"):
        serve(tmp_path, f"print('{word}')")

    assert (tmp_path / "vllm.log").read_text() == "third\n"
    assert (tmp_path / "vllm.log.1").read_text() == "second\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about", "vllm.log", "vllm.log.1"]


def test_the_log_is_bounded_and_the_tester_follows_it_without_a_gap(tmp_path):
    """A server that writes four times what a file holds, and goes on each time the collector has copied."""
    most, batches = 20_000, 20  # of 4,000 bytes
    copied = tmp_path / "copied"
    copied.touch()
    program = f"""
import pathlib, time
for batch in range({batches}):
    while pathlib.Path({str(copied)!r}).stat().st_size < batch:
        time.sleep(0.001)
    print("\\n".join(f"{{batch * 200 + line:019d}}" for line in range(200)), flush=True)
"""
    log, copy, folder = tmp_path / "server" / "vllm.log", tmp_path / "server.log", tmp_path / "server"
    folder.mkdir()
    log.touch()  # the tester may come before the server; what it finds there it leaves out
    tail = FileTail(log, copy)
    words, environ = command(folder, sys.executable, "-c", program), {**os.environ, "SERVE_MAX_BYTES": str(most)}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environ) as process:
        for batch in range(batches):
            wait_for(lambda last=f"{batch * 200 + 199:019d}\n": tail.copy() or copy.read_text().endswith(last))
            with copied.open("a") as file:
                file.write(".")
    tail.close()
    kept = [path.stat().st_size for path in folder.glob("vllm.log*")]

    assert process.returncode == 0
    assert max(kept) <= most
    assert len(kept) == 2
    assert copy.read_text().split() == [f"{number:019d}" for number in range(batches * 200)]
    assert tail.failure is None
