import os
import signal
import subprocess
import sys
import time

import pytest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, replace
from twoclocks.log_tail import CommandTail, FileTail, open_tail

WAIT_S = 20.0


def until(true, what="it"):
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S:g} s"
        time.sleep(0.01)


def python(program):
    return f"{sys.executable} -c '{program}'"


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# a file


class Log:
    """A log, its tail and what the tail has copied."""

    def __init__(self, folder):
        self.path, self.copied = folder / "s.log", folder / "copy.log"

    def tail(self):
        self.tail = FileTail(self.path, self.copied)
        return self.tail

    def append(self, text):
        with self.path.open("a") as file:
            file.write(text)

    def text(self):
        return self.copied.read_text()


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path)


def test_only_what_comes_from_now_on_is_copied(log):
    log.append("before the run\n")
    tail = log.tail()
    log.append("one\ntw")
    tail.copy()
    tail.copy()
    log.append("o\n")
    tail.copy()
    tail.close()

    assert log.text() == "one\ntwo\n"
    assert tail.failure is None


def test_a_key_that_the_server_logs_is_not_copied(log):
    tail = FileTail(log.path, log.copied, ["sk-secret-1", "sk-secret"])
    for piece in ("args: sk-sec", "ret-1, then sk-secret, sk-sec", "ond, sk-secret-1\n", "end s"):
        log.append(piece)
        tail.copy()
    tail.close()

    assert log.text() == "args: ***, then ***, sk-second, ***\nend s"


def test_a_secret_that_is_a_word_is_hidden_where_it_stands_alone(log):
    tail = FileTail(log.path, log.copied, ["benchmark"])
    log.append("benchmark benchmarks num_benchmark\n")
    tail.copy()
    tail.close()

    assert log.text() == "*** benchmarks num_benchmark\n"


def test_a_key_in_a_commands_last_words_is_not_told(tmp_path):
    tail = CommandTail(python('print("no such key: sk-secret-1")'), tmp_path / "copy.log", ["sk-secret-1"])
    until(lambda: tail.failure, "the end of the command")
    tail.close()

    assert tail.failure.endswith("no such key: ***")


def test_a_file_that_is_renamed_and_made_anew_is_read_to_its_end(log, tmp_path):
    log.append("before\n")
    tail = log.tail()
    log.append("one\n")
    tail.copy()
    log.append("two\n")
    log.path.rename(tmp_path / "s.log.1")
    tail.copy()  # nothing stands at the path for a moment
    log.path.touch()
    with (tmp_path / "s.log.1").open("a") as old:
        old.write("three, written before the server opened the new file\n")
        tail.copy()
        old.write("four\n")
    log.append("five\n")
    tail.copy()
    log.append("six\n")
    tail.copy()
    tail.close()

    assert log.text() == "one\ntwo\nthree, written before the server opened the new file\nfour\nfive\nsix\n"
    assert tail.failure is None


def test_a_file_that_is_truncated_in_place_is_read_from_its_beginning(log):
    tail = log.tail()
    log.append("one\ntwo\n")
    tail.copy()
    os.truncate(log.path, 0)
    tail.copy()
    log.append("three\n")
    tail.copy()
    tail.close()

    assert log.text() == "one\ntwo\nthree\n"
    assert "was truncated 1 times" in tail.failure


def test_a_file_that_grew_beyond_its_old_length_after_it_was_truncated(log):
    log.append("before\n")
    tail = log.tail()
    os.truncate(log.path, 0)
    log.append("longer than what stood there before\n")
    tail.copy()
    tail.close()

    assert log.text() == "longer than what stood there before\n"


def test_a_server_that_writes_on_behind_the_hole_of_a_truncation(log):
    with log.path.open("w") as server:  # `> s.log` does not append
        tail = log.tail()
        server.write("x" * 99_999 + "\n")
        server.flush()
        tail.copy()
        os.truncate(log.path, 0)
        server.write("after\n")
        server.flush()
        tail.copy()
    tail.close()

    first, second, rest = log.text().split("\n")
    assert first == "x" * 99_999
    assert second.strip("\0") == "after"
    assert len(second) < 10_000  # of the hole of 100,000 bytes at most its last block
    assert rest == ""


def test_a_file_that_comes_late_is_read_from_its_beginning(log):
    tail = log.tail()
    tail.copy()
    assert tail.failure == f"{log.path} cannot be read: No such file or directory"
    log.append("hello\n")
    tail.copy()
    tail.close()

    assert log.text() == "hello\n"
    assert tail.failure is None


def test_a_file_that_is_deleted_and_comes_back(log):
    log.append("before\n")
    tail = log.tail()
    log.append("one\n")
    log.path.unlink()
    tail.copy()
    log.append("two\n")
    tail.copy()
    tail.close()

    assert log.text() == "one\ntwo\n"


def test_what_is_no_file_is_told_and_does_not_block(log, tmp_path):
    os.mkfifo(log.path)
    tail = log.tail()
    tail.copy()
    folder = FileTail(tmp_path, tmp_path / "other.log")
    folder.copy()
    tail.close()
    folder.close()

    assert tail.failure == f"{log.path} is no regular file"
    assert folder.failure == f"{tmp_path} is no regular file"


def test_a_turn_and_the_whole_have_a_bound(log, monkeypatch):
    monkeypatch.setattr("twoclocks.log_tail.MAX_BYTES", 1000)
    monkeypatch.setattr("twoclocks.log_tail.MAX_TURN_BYTES", 400)
    tail = log.tail()
    log.append("x" * 1500)
    sizes = []
    for _ in range(3):
        tail.copy()
        sizes.append(len(log.text()))
    tail.close()

    assert sizes == [400, 800, 1000]
    assert tail.failure == "copy.log lacks 500 bytes, beyond what is copied of a log"


def test_what_a_rotation_left_unread_is_read_in_later_turns(log, tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.log_tail.MAX_TURN_BYTES", 400)
    tail = log.tail()
    tail.copy()
    log.append("x" * 900)
    tail.copy()
    log.path.rename(tmp_path / "s.log.1")
    log.append("y" * 100)
    for _ in range(3):
        tail.copy()
    tail.close()

    assert log.text() == "x" * 900 + "y" * 100
    assert tail.failure is None


def test_a_full_disk_is_told(log):
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("this system has no /dev/full")
    log.copied.symlink_to("/dev/full")
    tail = log.tail()
    tail.copy()
    log.append("lost\n")
    tail.copy()
    log.append("lost too\n")
    tail.copy()
    tail.close()

    assert tail.failure.startswith("copy.log cannot be written: No space left on device; copy.log lacks 14 bytes")


# a command


def test_both_outputs_of_a_command_are_copied_in_order(tmp_path):
    program = "import sys; print(1, flush=True); print(2, file=sys.stderr, flush=True); print(3)"
    tail = CommandTail(python(program), tmp_path / "copy.log")
    until(lambda: tail.failure, "the end of the command")
    tail.copy()
    tail.close()

    assert (tmp_path / "copy.log").read_text() == "1\n2\n3\n"
    assert tail.failure.endswith("ended with status 0: 3")


def test_a_command_that_fails_is_told_in_one_line(tmp_path):
    program = 'import sys; print("a", flush=True); sys.exit("\\x1b[31mno such container\\nsecond line")'
    tail = CommandTail(python(program), tmp_path / "copy.log")
    until(lambda: tail.failure, "the end of the command")
    tail.close()

    assert tail.failure.endswith("ended with status 1: second line")
    assert "\n" not in tail.failure


def test_a_command_that_is_not_there_is_told(tmp_path):
    tail = CommandTail("/nowhere/docker logs -f x", tmp_path / "copy.log")
    tail.copy()
    tail.close()

    assert tail.failure == "cannot start /nowhere/docker: No such file or directory"


def test_words_are_not_given_to_a_shell(tmp_path):
    tail = CommandTail("echo 'a  b' $HOME ; touch no", tmp_path / "copy.log")
    until(lambda: tail.failure, "the end of the command")
    tail.close()

    assert (tmp_path / "copy.log").read_text() == "a  b $HOME ; touch no\n"


def test_close_ends_the_command_and_what_it_started(tmp_path):
    child = "import time; time.sleep(600)"
    program = (
        "import os, subprocess, sys, time; "
        f'c = subprocess.Popen([sys.executable, "-c", "{child}"]); '
        "print(os.getpid(), c.pid, os.getsid(0), flush=True); time.sleep(600)"
    )
    tail = CommandTail(python(program), tmp_path / "copy.log")
    until(lambda: (tmp_path / "copy.log").read_text().endswith("\n"), "the first line")
    tail.copy()
    assert tail.failure is None
    tail.close()
    pid, child_pid, session = map(int, (tmp_path / "copy.log").read_text().split())

    assert not is_running(pid)
    assert not is_running(child_pid)
    assert session != os.getsid(0)
    assert tail.failure is None  # it was ended by us


def test_what_a_command_prints_when_it_is_ended_is_copied(tmp_path):
    program = (
        'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("last", flush=True))); '
        'print("first", flush=True); time.sleep(600)'
    )
    tail = CommandTail(python(program), tmp_path / "copy.log")
    until(lambda: (tmp_path / "copy.log").read_text(), "the first line")
    tail.close()

    assert (tmp_path / "copy.log").read_text() == "first\nlast\n"


def test_a_command_dies_with_the_process_that_tails_it(tmp_path):
    copy = tmp_path / "copy.log"
    command = python("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    program = (
        "import pathlib, time; from twoclocks.log_tail import CommandTail; "
        f"tail = CommandTail({command!r}, pathlib.Path({str(copy)!r})); time.sleep(600)"
    )
    collector = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: copy.exists() and copy.read_text().endswith("\n"), "the first line")
    pid = int(copy.read_text())
    assert is_running(pid)
    collector.send_signal(signal.SIGKILL)
    collector.wait()

    until(lambda: not is_running(pid), "the end of the command")


def test_a_flood_is_bounded_in_every_turn_and_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr("twoclocks.log_tail.MAX_BYTES", 300_000)
    monkeypatch.setattr("twoclocks.log_tail.MAX_TURN_BYTES", 200_000)
    tail = CommandTail("yes", tmp_path / "copy.log")
    copy = tmp_path / "copy.log"
    until(lambda: tail.taken >= 200_000, "the first turn")
    time.sleep(0.2)  # without a new turn nothing more may come
    first = copy.stat().st_size
    began = time.monotonic()
    tail.copy()
    assert time.monotonic() - began < 1
    until(lambda: copy.stat().st_size == 300_000, "the second turn")
    tail.close()

    assert not tail.reader.is_alive()
    assert 200_000 <= first < 200_000 + 65_536
    assert "bytes, beyond what is copied of a log" in tail.failure
    assert copy.stat().st_size == 300_000


# the setting


def test_a_setting_opens_its_tail(tmp_path):
    tails = [open_tail(setting, tmp_path / "c") for setting in ("none", "file:a:b", "command:true")]
    for tail in tails[1:]:
        tail.close()

    assert [type(tail) for tail in tails] == [type(None), FileTail, CommandTail]
    assert str(tails[1].source) == "a:b"


@pytest.mark.parametrize("setting", ["none", "file:/not/there/yet.log", "command:sh -c 'echo \"a b\"'"])
def test_settings_that_can_be_used(setting):
    assert replace(Experiment(), "collect.log", setting).collect.log == setting


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("x.log", "expected none or file:PATH or command:ARGV, such as 'command:docker logs --follow"),
        ("file:", "expected none or file:PATH or command:ARGV"),
        ("command: ", "expected none or file:PATH or command:ARGV"),
        ("command:docker logs 'x", 'expected command:ARGV, found "docker logs \'x" (no closing quotation)'),
        ("command:no-such-command -f x", "expected a command that is on this machine, found 'no-such-command', which"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_the_key(setting, expected):
    with pytest.raises(ExperimentError) as caught:
        replace(Experiment(), "collect.log", setting)

    assert f"collect.log: {expected}" in str(caught.value)
    assert "\n" not in str(caught.value)
