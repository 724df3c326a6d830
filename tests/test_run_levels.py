"""`twoclocks run`: levels as run folders, what is kept of broken ones, and a planted limit found over a real socket."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import FakeServer, plain_answer
from locust_runs import ROOT, free_port, wait_for
from make_run import make_run, record, write_folder

from twoclocks import cli, run
from twoclocks.calibrate import known_schedule
from twoclocks.child import BUNDLED, INTERRUPTED, Child
from twoclocks.errors import TwoclocksError
from twoclocks.experiment import load_experiment
from twoclocks.levels import sweep_levels
from twoclocks.run_levels import LevelRuns, read_levels

ALONE = ["collect.gpu=none", "collect.otlp_port=none", "collect.otlp_grpc_port=none"]


class PretendedLocust(Child):
    """Makes the run folder that Locust would; the levels in `breaking` never begin, `stops` ends by Ctrl-C."""

    def __init__(self, breaking=(), stops=None):
        super().__init__()
        self.breaking, self.stops, self.ran = set(breaking), stops, []

    def run(self, argv):
        settings = dict(word.split("=", 1) for word in map(str, argv) if "=" in word)
        name, folder = settings["name"], Path(argv[argv.index("--run-folder") + 1])
        self.ran.append(name)
        if name in self.breaking:
            return 3
        make_run(folder, requests=12, seed=len(self.ran))
        if name == self.stops:
            self.stopped.set()
            meta = folder / "run.json"
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"status": "interrupted"}))
        return 0


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: demo\nload: {shape: sweep, sweep: {levels: [1, 2, 4], pause_s: 0}}\n")
    return load_experiment(path, [f"output={tmp_path / 'out'}"])


def test_one_broken_level_does_not_lose_the_others_and_is_run_again(tmp_path, experiment, capsys):
    child, said = PretendedLocust(breaking=["02-users-2"]), []
    runs = LevelRuns.begun(experiment, tmp_path / "x.yaml", [])
    runs.run(child, [], said.append)
    stored = read_levels(runs.folder)

    assert [(level.folder, level.status, level.exit_code) for level in stored.levels] == [
        ("01-users-1", "finished", 0),
        ("02-users-2", "failed", 3),
        ("03-users-4", "finished", 0),
    ]
    assert (stored.status, runs.exit_code()) == ("failed", 3)
    assert any("02-users-2: the run could not begin" in line for line in said)
    assert (runs.folder / "03-users-4" / "requests.jsonl").exists()

    again = PretendedLocust()
    resumed = LevelRuns.resumed(runs.folder, stored, experiment)
    resumed.run(again, [], said.append)

    assert again.ran == ["02-users-2"]
    assert (resumed.levels.status, resumed.exit_code()) == ("finished", 0)


def test_ctrl_c_ends_the_sweep_after_the_level_and_it_goes_on_later(tmp_path, experiment):
    runs = LevelRuns.begun(experiment, tmp_path / "x.yaml", [])
    runs.run(PretendedLocust(stops="02-users-2"), [], lambda _: None)

    assert [level.status for level in read_levels(runs.folder).levels] == ["finished", "interrupted"]
    assert runs.exit_code() == INTERRUPTED

    again = PretendedLocust()
    LevelRuns.resumed(runs.folder, read_levels(runs.folder), experiment).run(again, [], lambda _: None)

    assert again.ran == ["02-users-2", "03-users-4"]
    assert (runs.folder / "02-users-2-broken-1" / "requests.jsonl").exists()  # raw files are kept


def test_a_sweep_whose_server_does_not_come_up_can_be_resumed(tmp_path, capsys, monkeypatch):
    """Once the server fails; then, while it starts, the user has had enough."""
    command = [
        "{python}",
        "-c",
        "import pathlib, sys, time; time.sleep(99 * pathlib.Path('wait').exists()); sys.exit(7)",
    ]
    start = json.dumps({"kind": "command", "command": command, "port": free_port()})
    path, place = tmp_path / "x.yaml", tmp_path / "place"
    path.write_text(f"target: {{server: other, start: {start}}}\nload: {{shape: sweep, sweep: {{levels: [1]}}}}\n")

    assert cli.main(["run", str(path), "--run-folder", str(place)]) == 3
    assert read_levels(place).status == "failed"

    (place / "wait").touch()
    child = Child()
    monkeypatch.setattr(run, "passing_signals_on", lambda: contextlib.nullcontext(child))
    child.stopped.set()

    assert cli.main(["run", "--resume", str(place)]) == INTERRUPTED
    assert read_levels(place).status == "interrupted"
    assert f"`twoclocks run --resume {place}` goes on" in capsys.readouterr().err


def test_another_experiment_cannot_go_on_with_it(tmp_path, experiment):
    runs = LevelRuns.begun(experiment, tmp_path / "x.yaml", [])
    runs.run(PretendedLocust(), [], lambda _: None)
    other = load_experiment(tmp_path / "x.yaml", [f"output={tmp_path / 'out'}", "workload.max_tokens=7"])

    with pytest.raises(TwoclocksError, match="another experiment"):
        LevelRuns.resumed(runs.folder, read_levels(runs.folder), other)


def test_a_search_stops_at_a_server_that_never_meets_the_slo(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("load: {shape: search, search: {over: users, low: 2, pause_s: 0}}\nslo: {ttft_ms: 0.001}\n")
    experiment, said = load_experiment(path, [f"output={tmp_path / 'out'}"]), []

    class Slow(PretendedLocust):
        def run(self, argv):
            folder = Path(argv[argv.index("--run-folder") + 1])
            records = [record(f"{n:032x}", chunk_us=[1000], chunk_kinds=[("content", 1)]) for n in range(30)]
            write_folder(folder, records)
            (folder / "experiment.yaml").write_text("slo: {ttft_ms: 0.001}\n")
            return 0

    runs = LevelRuns.begun(experiment, path, [])
    runs.run(Slow(), [], said.append)

    assert (len(runs.levels.levels), runs.exit_code()) == (1, 1)

    again = PretendedLocust()
    resumed = LevelRuns.resumed(runs.folder, read_levels(runs.folder), experiment)
    resumed.run(again, [], said.append)

    assert (again.ran, resumed.levels.found) == ([], runs.levels.found)  # judged again from what the folders hold
    assert any("no users found: the SLO is not met at load.search.low = 2" in line for line in said)


def test_the_locustfile_in_the_package_is_that_of_the_project():
    assert BUNDLED.read_bytes() == (ROOT / "load_test.py").read_bytes()


@pytest.mark.parametrize("name", ["sweep.yaml", "search.yaml"])
def test_the_examples_can_be_used(name):
    experiment = load_experiment(ROOT / "configs" / name)

    assert experiment.name == experiment.load.shape
    assert experiment.load.shape == "search" or len(sweep_levels(experiment.load.sweep)) == 6


def words(tmp_path, *settings):
    return [word for setting in (f"output={tmp_path}", *ALONE, *settings) for word in ("--set", setting)]


def test_a_run_without_a_file(tmp_path, capfd):
    settings = words(tmp_path, "load.duration_s=1", "load.ramp_s=0", "warmup.requests=0")
    with FakeServer(lambda body: plain_answer(3)) as server:
        code = cli.main(["run", "--url", server.url, "--users", "2", "--no-report", *settings])
    (folder,) = tmp_path.iterdir()

    assert code == 0, capfd.readouterr()
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert "users: 2" in (folder / "experiment.yaml").read_text()


def test_a_run_goes_to_the_folder_that_is_named(tmp_path, capfd):
    """And a level of a sweep to its own; Locust's last line names a place that exists."""
    settings = words(tmp_path / "no", "load.duration_s=1", "load.ramp_s=0", "warmup.requests=0")
    sweep = ["--set", "load.shape=sweep", "--set", "load.sweep.levels=[2]"]
    default = str(ROOT / "configs" / "default.yaml")
    with FakeServer(lambda body: plain_answer(3)) as server:
        common = ["run", default, "--url", server.url, "--no-report", *settings]
        codes = [
            cli.main([*common, "--run-folder", str(tmp_path / "one")]),
            cli.main([*common, "--run-folder", str(tmp_path / "many"), *sweep]),
            cli.main([*common, "--run-folder", str(tmp_path / "one")]),
            cli.main(["run", "--resume", str(tmp_path / "many"), "--run-folder", str(tmp_path / "other")]),
        ]
    told = capfd.readouterr()
    named = [Path(line.split(": ")[1]) for line in told.out.splitlines() if line.startswith("run folder: ")]

    assert codes == [0, 0, 2, 2], told
    assert named == [tmp_path / "one", tmp_path / "many" / "01-users-2"]
    assert all((folder / "run.json").exists() for folder in named)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many"}
    assert f"--run-folder {tmp_path / 'one'}: exists already; name a folder that does not exist yet" in told.err
    assert "leave one of them out" in told.err


def test_ctrl_c_once_drains_and_twice_cuts_off(tmp_path):
    settings = words(tmp_path, "load.duration_s=60", "load.ramp_s=0", "warmup.requests=0", "load.drain_s=50")
    command = [sys.executable, "-m", "twoclocks", "run", "--users", "2", "--no-report", *settings]
    with FakeServer(lambda body: plain_answer(500, gap_s=0.1)) as server:
        with subprocess.Popen([*command, "--url", server.url], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for(lambda: len(server.requests) >= 2)
                process.send_signal(signal.SIGINT)
                wait_for(lambda: json.loads(next(tmp_path.glob("*/run.json")).read_text())["window"]["ended_at"])
                assert process.poll() is None  # what streams goes on
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=30)
            finally:
                process.kill()

    assert "cutting the running streams off" in errors
    assert json.loads(next(tmp_path.glob("*/run.json")).read_text())["status"] == "interrupted"


def test_ctrl_c_in_the_drain_that_follows_the_end_of_the_time_ends_the_run_once(tmp_path):
    settings = words(tmp_path, "load.duration_s=1", "load.ramp_s=0", "warmup.requests=0", "load.drain_s=50")
    command = [sys.executable, "-m", "twoclocks", "run", "--users", "2", "--no-report", *settings]
    with FakeServer(lambda body: plain_answer(50, gap_s=0.1)) as server:
        with subprocess.Popen([*command, "--url", server.url], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for(lambda: list(tmp_path.glob("*/run.json")))
                wait_for(lambda: json.loads(next(tmp_path.glob("*/run.json")).read_text())["window"]["ended_at"])
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
            finally:
                process.kill()
    meta = json.loads(next(tmp_path.glob("*/run.json")).read_text())

    assert "Traceback" not in errors
    assert meta["status"] in ("finished", "interrupted")
    assert (meta["in_flight"], meta["lost_records"]) == (0, 0)
    assert not any("ended early" in note for note in meta["notes"])
    assert process.returncode in (0, 1, 130)


def test_a_planted_limit_is_found(tmp_path, capfd):
    """Four slots of 40 ms are 100 requests/s. What 3 s let pile up under 100 ms of TTFT is 2 to 3 % more."""
    settings = words(
        tmp_path, "load.shape=search", "load.search.low=50", "load.search.pause_s=0", "load.duration_s=3",
        "load.arrivals=constant", "workload.max_tokens=5", "slo.ttft_ms=100", "slo.share=0.9", "warmup.requests=1",
    )  # fmt: skip
    with known_schedule(["--ttft-ms=20", "--tpot-ms=5", "--slots=4"]) as url:
        code = cli.main(["run", str(ROOT / "configs" / "default.yaml"), "--url", url, "--no-report", *settings])
    (folder,) = tmp_path.iterdir()
    levels = read_levels(folder)

    assert code == 0, capfd.readouterr()
    assert levels.found.value == pytest.approx(100, rel=0.05)
    assert levels.found.failed <= levels.found.value * 1.05
    assert len(levels.levels) <= 12


def test_locust_alone_names_the_command_for_it(tmp_path):
    command = [sys.executable, "-m", "locust", "-f", "load_test.py", "--experiment", "configs/sweep.yaml", "--headless"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert "start it with: twoclocks run" in done.stderr
