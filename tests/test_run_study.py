"""A study as run folders: every cell there, what is missing said, what broke off gone on with."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
from fake_server import FakeServer
from make_run import make_run

from twoclocks import cli, run
from twoclocks.child import Child, alone_in
from twoclocks.errors import TargetError, TwoclocksError
from twoclocks.experiment import load_experiment
from twoclocks.load import load_run
from twoclocks.run_study import StudyRuns
from twoclocks.study import read_study

ALONE = ["collect.gpu=none", "collect.otlp_port=none", "collect.otlp_grpc_port=none", "collect.metrics_url=none"]


SERVER = "['{python}', -m, twoclocks.schedule_server, --port, '{port}', --ttft-ms, '5', --tpot-ms, '1']"


class PretendedRun(Child):
    """Makes the run folder that Locust would; the cells in `breaking` never begin, `stops` ends by Ctrl-C."""

    def __init__(self, breaking=(), stops=None):
        super().__init__()
        self.breaking, self.stops, self.ran = set(breaking), stops, []

    def run(self, argv):
        folder = Path(argv[argv.index("--run-folder") + 1])
        self.ran.append((folder.name, argv[argv.index("--target") + 1], argv[argv.index("--variant") + 1]))
        if folder.name in self.breaking:
            return 3
        make_run(folder, requests=12, seed=len(self.ran))
        if folder.name == self.stops:
            self.stopped.set()
            meta = folder / "run.json"
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"status": "interrupted"}))
        return 0


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.fixture
def study(tmp_path, server):
    path = tmp_path / "x.yaml"
    path.write_text(
        f"name: two\noutput: {tmp_path / 'out'}\ntarget: {{model: m, server: other}}\nrepeats: 2\norder: abba\n"
        f"targets: [{{name: A, url: '{server.url}'}}, {{name: B, url: '{server.url}'}}]\n"
        "variants: [{name: one, set: {load.users: 1}}, {name: two, set: {load.users: 2}}]\n"
    )
    return path, load_experiment(path)


def test_each_cell_is_run_in_its_place_and_a_broken_one_again(study):
    path, experiment = study
    said, child = [], PretendedRun(breaking=["06-B-one-r2"])
    runs = StudyRuns.begun(experiment, path, [])
    code = runs.run(child, 1, said.append)
    stored = read_study(runs.folder)

    assert child.ran == [
        ("01-A-one-r1", "A", "one"), ("02-A-two-r1", "A", "two"), ("03-B-one-r1", "B", "one"),
        ("04-B-two-r1", "B", "two"), ("05-B-two-r2", "B", "two"), ("06-B-one-r2", "B", "one"),
        ("07-A-two-r2", "A", "two"), ("08-A-one-r2", "A", "one"),
    ]  # fmt: skip
    assert (code, stored.status) == (3, "failed")
    assert [cell.folder for cell in stored.cells if cell.status != "finished"] == ["06-B-one-r2"]
    assert stored.cells[5].error == "the run could not begin; see above"
    assert "run 6 of 8: B, one, repeat 2" in said

    again = PretendedRun()
    resumed = StudyRuns.resumed(runs.folder, stored, experiment, path, [])

    assert resumed.run(again, 1, said.append) == 0
    assert again.ran == [("06-B-one-r2", "B", "one")]
    assert read_study(runs.folder).status == "finished"


def test_ctrl_c_ends_the_study_after_the_run(study):
    path, experiment = study
    child = PretendedRun(stops="03-B-one-r1")
    runs = StudyRuns.begun(experiment, path, [])

    assert runs.run(child, 1, lambda _: None) == 130
    stored = read_study(runs.folder)
    assert stored.status == "interrupted"
    assert [cell.status for cell in stored.cells] == ["finished", "finished", "interrupted", *["planned"] * 5]


def test_ctrl_c_says_how_to_go_on(study, tmp_path, monkeypatch, capsys):
    path, _ = study
    monkeypatch.setattr(run, "passing_signals_on", lambda: contextlib.nullcontext(PretendedRun(stops="02-A-two-r1")))
    place = tmp_path / "place"

    assert cli.main(["run", str(path), "--run-folder", str(place)]) == 130
    said = capsys.readouterr().err
    assert f"interrupted; what was measured is kept: `twoclocks report {place}` shows it" in said
    assert f"`twoclocks run --resume {place}` goes on" in said
    assert not (place / "report.html").exists()


def test_two_do_not_go_on_with_it_at_once(study, capsys):
    path, experiment = study
    runs = StudyRuns.begun(experiment, path, [])
    runs.save()

    with alone_in(runs.folder):
        assert cli.main(["run", "--resume", str(runs.folder)]) == 2
    assert f"{runs.folder}: another `twoclocks run` is at work here" in capsys.readouterr().err
    with alone_in(runs.folder):
        pass


def test_another_experiment_does_not_go_on_with_it(study):
    path, experiment = study
    runs = StudyRuns.begun(experiment, path, [])
    runs.save()
    other = load_experiment(path, ["repeats=3"])

    with pytest.raises(TwoclocksError, match="was begun with another experiment"):
        StudyRuns.resumed(runs.folder, read_study(runs.folder), other, path, ["repeats=3"])


def test_a_target_that_is_not_there(study, tmp_path):
    path, _ = study
    gone = "targets=[{name: gone, url: 'http://127.0.0.1:9'}, {name: A, url: '%s'}]"
    words = [gone % load_experiment(path, target="A").target.url]
    with pytest.raises(TargetError, match=r"target gone: http://127\.0\.0\.1:9: not reachable"):
        StudyRuns.begun(load_experiment(path, words), path, words)
    assert not (tmp_path / "out").exists()

    words += ["missing=skip"]
    runs = StudyRuns.begun(load_experiment(path, words), path, words)
    said, child = [], PretendedRun()

    assert runs.run(child, 1, said.append) == 0
    assert {target for _, target, _ in child.ran} == {"A"}
    assert [one.target for one in read_study(runs.folder).skipped] == ["gone"]
    assert any(line.startswith("gone is left out: http://127.0.0.1:9: not reachable") for line in said)


def test_a_cell_that_cannot_be_used_is_told_before_the_first_run(study, tmp_path):
    path, _ = study
    words = ["variants=[{name: ok}, {name: bad, set: {load.users: 0}}]"]

    with pytest.raises(TwoclocksError, match=r"load\.users"):
        StudyRuns.begun(load_experiment(path, words), path, words)
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_not_there_are_told_before_the_first_run(study, tmp_path):
    path, _ = study
    words = [f"variants=[{{name: ok}}, {{name: bad, set: {{workload.requests: '{tmp_path}/none.jsonl'}}}}]"]

    with pytest.raises(TwoclocksError, match=r"none\.jsonl: request file cannot be read"):
        StudyRuns.begun(load_experiment(path, words), path, words)
    assert not (tmp_path / "out").exists()


def test_a_study_by_the_command_line(study, tmp_path, server):
    path, _ = study
    settings = [word for setting in [*ALONE, "load.requests=6", "warmup.requests=0"] for word in ("--set", setting)]
    place = tmp_path / "place"
    code = cli.main(["run", str(path), "--no-report", "--run-folder", str(place), "--set", "repeats=1", *settings])
    stored = read_study(place)

    assert (code, stored.status) == (0, "finished")
    assert [cell.folder for cell in stored.cells] == ["01-A-one", "02-A-two", "03-B-one", "04-B-two"]
    runs = {cell.folder: load_run(place / cell.folder) for cell in stored.cells}
    assert {name: len(run.requests) for name, run in runs.items()} == dict.fromkeys(runs, 6)
    assert {name: run.experiment["load"]["users"] for name, run in runs.items()} == {
        "01-A-one": 1, "02-A-two": 2, "03-B-one": 1, "04-B-two": 2,
    }  # fmt: skip
    assert runs["03-B-one"].meta["target"]["name"] == "B"
    assert len(server.requests) == 24


def started_study(tmp_path, *settings):
    start = f"{{kind: command, command: {SERVER}}}"
    targets = [f"{{name: {name}, server: other, model: known, start: {start}}}" for name in ("A", "B")]
    path = tmp_path / "s.yaml"
    path.write_text(f"repeats: 2\ntargets: [{', '.join(targets)}]\noutput: {tmp_path}\n")
    settings = [*ALONE, "load.requests=2", "warmup.requests=0", *settings]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["run", str(path), "--no-report", "--run-folder", str(tmp_path / "place"), *words]


@pytest.mark.parametrize(
    ("settings", "servers"),
    [
        ([], ["01-A-r1", "03-B-r1"]),
        (["order=abba"], ["01-A-r1", "02-B-r1"]),
        (["order=abba", "keep_started=false"], ["01-A-r1", "02-B-r1", "04-A-r2"]),
    ],
)
def test_servers_are_started_as_the_order_needs_them(tmp_path, settings, servers):
    assert cli.main(started_study(tmp_path, *settings)) == 0
    place = tmp_path / "place"
    ports = {}
    for cell in read_study(place).cells:
        run = load_run(place / cell.folder)
        assert list(run.requests["status"]) == ["ok", "ok"]
        ports.setdefault(cell.target, set()).add(run.experiment["target"]["url"])

    assert sorted(path.name.removesuffix(".server.log") for path in place.glob("*.server.log")) == servers
    assert len(ports["A"]) == len([name for name in servers if "A" in name])
    for url in ports["A"] | ports["B"]:  # and nobody listens there any more
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1)


def test_a_server_that_ends_at_once_fails_its_cells_and_no_others(tmp_path):
    broken = "['{python}', -c, 'raise SystemExit(7)', '{port}']"
    targets = f"targets=[{{name: A, server: other, model: known, start: {{kind: command, command: {broken}}}}},"
    targets += f" {{name: B, server: other, model: known, start: {{kind: command, command: {SERVER}}}}}]"
    code = cli.main(started_study(tmp_path, targets))
    cells = read_study(tmp_path / "place").cells

    assert code == 3
    assert [(cell.target, cell.status) for cell in cells] == [
        ("A", "failed"), ("A", "failed"), ("B", "finished"), ("B", "finished"),
    ]  # fmt: skip
    assert "ended before it was ready (exit code 7)" in cells[0].error


def test_one_run_of_a_study_alone(study, tmp_path):
    path, _ = study
    settings = [word for setting in [*ALONE, "load.requests=2", "warmup.requests=0"] for word in ("--set", setting)]
    chosen = ["--target", "B", "--variant", "two"]
    code = cli.main(["run", str(path), *chosen, "--no-report", "--run-folder", str(tmp_path / "one"), *settings])

    assert code == 0
    assert load_run(tmp_path / "one").experiment["load"]["users"] == 2
