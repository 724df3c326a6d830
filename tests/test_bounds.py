"""What others send is bounded by structure: bytes taken, values counted, names kept below their folder."""

import contextlib
import gzip
import itertools
import os
import socket
import threading
import time
from pathlib import Path

import grpc
import httpx
import msgspec
import pytest
from fake_server import FakeServer, response
from make_run import make_run
from make_spans import export, sglang_span
from make_study import cell, make_study
from test_otlp_receiver import post, receiving, rows

from twoclocks import client, otlp_receiver, report
from twoclocks.bounded_input import MAX_HEAD_BYTES, BoundedInput
from twoclocks.client import Exchange
from twoclocks.dialect import Body, read_stream
from twoclocks.errors import ExperimentError, RunFolderError, TargetError
from twoclocks.experiment import Experiment, Target, load_experiment
from twoclocks.fetch import Moved, fetch, fetch_page
from twoclocks.log_tail import CommandTail
from twoclocks.otlp_receiver import EXPORT, MAX_BODY
from twoclocks.run_folder import beside, file_name, make_folder
from twoclocks.settings_yaml import MAX_VALUES, load_yaml
from twoclocks.study import cells, read_study
from twoclocks.target import resolve

# answers beside the load


class Endless:
    """An answer without end, and how much of it was taken."""

    def __init__(self, **headers):
        self.taken, self.asked, self.headers = 0, [], headers

    def __call__(self, request):
        self.asked.append(request)
        return httpx.Response(200, headers=self.headers, content=self._pieces())

    def _pieces(self):
        while True:
            self.taken += 1
            yield b"x" * 1000

    def client(self):
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://server")


def test_of_an_answer_without_end_no_more_is_taken_than_counts():
    server = Endless()
    with server.client() as asking, pytest.raises(ValueError, match="more than 5000 bytes"):
        fetch(asking, "/", max_bytes=5000, seconds=60)

    assert server.taken == 6
    assert server.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("begun", "error"),
    [(b"HTTP/1.1 200 OK\r\nX: ", httpx.ReadTimeout), (b"HTTP/1.1 200 OK\r\n\r\n", ValueError)],
    ids=["head", "body"],
)
def test_an_answer_that_comes_a_byte_at_a_time_is_given_up(begun, error):
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening, httpx.Client(timeout=60, trust_env=False) as asking:

        def dribble():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(begun)
                while True:  # until it is shut at the other end
                    connection.sendall(b"x")
                    time.sleep(0.02)
            ended.set()

        threading.Thread(target=dribble, daemon=True).start()
        with pytest.raises(error, match=r"not whole after 0\.5 s"):
            fetch(asking, f"http://127.0.0.1:{listening.getsockname()[1]}/", max_bytes=1_000_000, seconds=0.5)

    assert ended.wait(60)


def test_what_is_packed_is_not_unpacked():
    server = Endless(**{"content-encoding": "br"})
    with server.client() as asking, pytest.raises(ValueError, match="compressed"):
        fetch_page(asking, "/", max_bytes=5000, seconds=60)

    assert server.taken == 0


def test_a_redirect_is_told_and_not_followed():
    with FakeServer() as elsewhere, FakeServer() as server:
        away = response(307, b"", headers=f"location: {elsewhere.url}/v1/models\r\n")
        server.pages |= {"GET /v1/models": away, "GET /version": away, "GET /metrics": away}
        with pytest.raises(TargetError) as caught:
            resolve(Target(url=server.url, headers={"Authorization": "Bearer planted-0001"}))
        with httpx.Client() as asking, pytest.raises(Moved):
            fetch_page(asking, f"{server.url}/metrics", max_bytes=1000, seconds=10)

        assert elsewhere.connections == 0
    assert f"status 307 leads to '{elsewhere.url}/v1/models', which is not followed" in str(caught.value)


def test_of_a_long_message_a_part_is_looked_at(monkeypatch):
    seen = []

    class Words:
        def search(self, text):
            seen.append(len(text))

    monkeypatch.setattr(client, "REFUSES_LENGTH", Words())
    exchange, words = Exchange(), "context size " * 1_000_000
    exchange.body = Body(b'{"error": {"message": "' + words.encode() + b'"}}', [0], [1])
    exchange.response.status = 400
    told = client._failure(exchange, read_stream(Body(b"", [], [])), streams=True)

    assert (told.kind, told.message) == ("http_400", words.strip())
    assert seen == [client.MESSAGE_CHARS]


# clients of ours


def test_a_request_has_so_many_bytes_and_so_much_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 80_000)
        bounded = BoundedInput(ours, 5, 60)
        taken = 0
        with pytest.raises(TimeoutError):
            while True:
                taken += bounded.readinto(bytearray(9000))
        assert taken == MAX_HEAD_BYTES
        bounded.rest()
        bounded.allow(10)
        assert bounded.readinto(bytearray(80_000)) == 80_000 - MAX_HEAD_BYTES
        hurried = BoundedInput(ours, 5, 0)
        theirs.sendall(b"xx")
        assert hurried.readinto(bytearray(1)) == 1
        with pytest.raises(TimeoutError):  # though there is more
            hurried.readinto(bytearray(1))


@pytest.mark.parametrize("line", [b"x: " + b"y" * 60_000 + b"\r\n", b"x: y\r\n" * 50])
def test_a_head_without_end_is_hung_up(tmp_path, line):
    with receiving(tmp_path) as receiver:
        with socket.create_connection(("127.0.0.1", receiver.http.port), timeout=20) as endless:
            endless.sendall(b"POST /v1/traces HTTP/1.1\r\n")
            sent = 0
            with contextlib.suppress(ConnectionError):
                for _ in range(100_000):
                    sent += endless.send(line)
                    endless.settimeout(0.001)
                    with contextlib.suppress(TimeoutError):
                        if not endless.recv(1000):
                            break
                    endless.settimeout(20)
        post(receiver.http.port, export(sglang_span()).SerializeToString())

    assert sent < 8_000_000  # what two sockets hold, beside the 64 kB that are read
    assert len(rows(tmp_path)) == 1


def test_a_bomb_over_grpc_is_not_unpacked(tmp_path):
    with receiving(tmp_path) as receiver:
        taken = []
        receiver.store.take = lambda body, **_: taken.append(len(body))
        with grpc.insecure_channel(f"127.0.0.1:{receiver.grpc.port}", compression=grpc.Compression.Gzip) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(EXPORT)(bytes(64 * 1024 * 1024), timeout=60)

    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert taken == []


def test_a_bomb_over_http_is_not_unpacked(tmp_path, monkeypatch):
    sizes = []
    unzip = otlp_receiver.unzip
    monkeypatch.setattr(otlp_receiver, "unzip", lambda body, limit: sizes.append(limit) or unzip(body, limit))
    with receiving(tmp_path) as receiver:
        bomb = gzip.compress(bytes(64 * 1024 * 1024))
        headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
        status, _ = post(receiver.http.port, bomb, headers)

    assert (status, sizes) == (413, [MAX_BODY])


def test_the_command_of_a_log_meets_no_shell(tmp_path):
    words = f"echo $(touch {tmp_path}/a) ; touch {tmp_path}/b `touch {tmp_path}/c` > {tmp_path}/d | cat"
    tail = CommandTail(words, tmp_path / "copy.log")
    deadline = time.monotonic() + 30
    while not (tmp_path / "copy.log").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    tail.close()

    assert [path.name for path in tmp_path.iterdir()] == ["copy.log"]
    assert (tmp_path / "copy.log").read_text().startswith(f"$(touch {tmp_path}/a) ; touch {tmp_path}/b `touch")


# experiments


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)),
            "values",
        ),
        ("labels: &a {b: *a}", "levels"),
        ("labels: " + "[" * 5000, "levels"),
        ("labels: " + "{a: " * 60 + "1" + "}" * 60, "levels"),
        ("name: !!python/object/apply:os.system [touch hacked]", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        ("name: 2026-13-45", "month must be in 1..12"),
        ("name: " + "x" * 5_000_000, "more than 4,194,304 characters"),
    ],
    ids=["aliases", "itself", "deep", "deep mapping", "call", "name", "date", "large"],
)
def test_yaml_that_is_more_or_other_than_data(tmp_path, text, problem):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path)

    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["x.yaml"]


def test_aliases_as_people_use_them_are_read():
    told = load_yaml("common: &common {a: 1, b: [x]}\none: {<<: *common, c: 2}\nmany: [*common, *common]")

    assert told["one"] == {"a": 1, "b": ["x"], "c": 2}
    assert told["many"] == [{"a": 1, "b": ["x"]}] * 2
    assert len(load_yaml(f"[{'x,' * (MAX_VALUES - 1)}]")) == MAX_VALUES - 1
    assert load_yaml("") is None


NAMES = [
    "../../x",
    "/etc/passwd",
    "a\0b",
    "..",
    ".",
    "x" * 5000,
    "\N{SNOWMAN}" * 5000,
    "é" * 5000,
    "a/../../b",
    "-rf",
    "\n",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_do_not_leave_the_output_folder(tmp_path, name):
    output = tmp_path / "output"
    folder = make_folder(Experiment(name=name, output=str(output)))
    study = Experiment(targets=[{"name": name}], variants=[{"name": name}], repeats=2)
    made = cells(msgspec.convert(msgspec.to_builtins(study), Experiment))

    assert folder.resolve().parent == output
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    for one in [folder.name, *(planned.folder for planned in made)]:
        assert len(os.fsencode(one)) < 200
        assert not set("/\\\0\n") & set(one)
        assert one not in (".", "..")
    beside(tmp_path, [planned.folder for planned in made])


def test_names_are_cut_between_letters():
    assert file_name("é" * 50, 9) == "é" * 4
    assert file_name("a b/c", 80) == "a-b-c"


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", "", "a\\b", "a\0b"])
def test_a_study_that_names_folders_elsewhere_is_refused(tmp_path, name):
    make_study(tmp_path, [cell(1, "one", folder=name)])

    with pytest.raises(RunFolderError, match="which is no folder beside it"):
        read_study(tmp_path)


@pytest.mark.parametrize("name", ["report.html", "summary.json", "plots", "plots/waterfall.png"])
def test_a_report_is_not_written_through_a_link(tmp_path, name):
    folder, mine = tmp_path / "run", tmp_path / "mine"
    make_run(folder, requests=6)
    mine.mkdir() if name == "plots" else mine.write_text("mine")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(mine)
    with pytest.raises(RunFolderError, match="is a link"):
        report.build(folder)

    assert list(mine.iterdir()) == [] if name == "plots" else mine.read_text() == "mine"


def test_the_folder_of_a_run_is_never_one_that_is_there(tmp_path):
    """A link that waits under the name of the next run is no place to write to."""
    from datetime import datetime

    now = datetime(2026, 1, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "20260101-000000-x").symlink_to(elsewhere)
    folder = make_folder(Experiment(name="x", output=str(tmp_path / "output")), now=now)

    assert folder.name == "20260101-000000-x-2"
    assert list(elsewhere.iterdir()) == []
    assert list(itertools.islice(Path(folder).iterdir(), 2)) == [folder / "experiment.yaml"]
