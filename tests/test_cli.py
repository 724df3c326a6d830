import subprocess
import sys

import pytest
from make_run import make_run, record, write_folder

from twoclocks import cli
from twoclocks.errors import RunFolderError
from twoclocks.load import load_run


def test_report_ends_with_where_to_look(tmp_path, capsys):
    make_run(tmp_path / "r", requests=10)

    assert cli.main(["report", str(tmp_path / "r")]) == 0

    out, err = capsys.readouterr()
    assert "Load test results" in out
    assert out.splitlines()[-2:] == [
        f"report: {tmp_path / 'r' / 'report.html'}",
        f"violin: {tmp_path / 'r' / 'plots' / 'client_vs_server_violin.png'}",
    ]
    assert "drawing the plots" in err


def test_compare_prints_its_place(tmp_path, capsys):
    make_run(tmp_path / "a", requests=10)
    make_run(tmp_path / "b", requests=10, seed=2)

    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0

    assert f"comparison: {tmp_path / 'c' / 'report.html'}" in capsys.readouterr().out


def test_rosetta_names_every_tool(tmp_path, capsys):
    make_run(tmp_path / "r", requests=10)

    assert cli.main(["rosetta", str(tmp_path / "r")]) == 0

    out = capsys.readouterr().out
    assert all(f"\n{tool}" in out for tool in ("twoclocks", "vLLM bench serve", "guidellm", "aiperf", "Locust"))


@pytest.mark.parametrize(
    "arguments",
    [["report", "nowhere"], ["rosetta", "nowhere"], ["compare", "nowhere"], ["compare", "nowhere", "either"]],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, capsys):
    assert cli.main(arguments) == 2

    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert len(lines) == 1
    assert lines[0].startswith("twoclocks: ")


def test_debug_shows_the_traceback():
    with pytest.raises(RunFolderError):
        cli.main(["report", "nowhere", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--url", ""], "target.url: expected `str`, found nothing"),
        (["run", "--users", "0"], "load.users: expected `int` >= 1"),
        (["doctor", "--url", ""], "target.url: expected `str`, found nothing"),
        (["duel", "--repeats", "0"], "repeats: expected `int` >= 1"),
        (["duel", "--a", "", "--b", ""], "a duel needs both"),
    ],
)
def test_an_empty_option_is_not_one_that_was_left_out(arguments, told, capsys):
    assert cli.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_log_is_of_one_run(tmp_path, capsys):
    (tmp_path / "sweep.json").touch()

    assert cli.main(["report", str(tmp_path), "--server-log", "x.log"]) == 2
    assert "holds several runs; give the folder of one of them" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["report"], ["no-such-command"], ["run", "--processes", "0"]])
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)

    assert raised.value.code == 2
    assert "usage: twoclocks" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "rosetta", "compare", "export"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])

    assert f"Example: twoclocks {command}" in capsys.readouterr().out


def test_version_through_python_m():
    done = subprocess.run([sys.executable, "-m", "twoclocks", "--version"], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("twoclocks ")


def test_help_loads_nothing_heavy():
    heavy = ("pandas", "numpy", "matplotlib", "rich")
    code = f"import sys, twoclocks.cli as c; c._parser(); print([name for name in {heavy!r} if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_exit_codes_say_whether_the_slo_was_met_and_the_run_holds(tmp_path, capsys):
    slo = tmp_path / "slo"
    make_run(slo, requests=30)
    failed = write_folder(tmp_path / "failed", [record(status="error", error_kind="refused")])
    codes = {}
    for limit in (1, 60_000):
        (slo / "experiment.yaml").write_text(f"slo: {{ttft_ms: {limit}}}")
        codes[limit] = cli.main(["report", str(slo)])

    assert codes == {1: 1, 60_000: 0}
    assert cli.main(["report", str(failed)]) == 4
    assert "Verdict: INVALID" in capsys.readouterr().out


def test_a_log_given_later_is_kept_and_used(tmp_path, capsys):
    run, log = tmp_path / "r", tmp_path / "from-the-server.log"
    make_run(run, requests=10, server="transformers")
    (run / "server.log").rename(log)
    unjoined = load_run(run).requests
    kept = run / "server-added.log"

    for _ in range(2):
        assert cli.main(["report", str(run), "--server-log", str(log)]) == 0
        assert f"server's log: {kept}" in capsys.readouterr().out
    joined = load_run(run).requests
    assert cli.main(["report", str(run)]) == 0

    assert kept.read_text() == log.read_text()
    assert [path.name for path in run.glob("server*.log")] == ["server-added.log"]
    assert unjoined["server_queue"].isna().all()
    assert joined["server_queue"].notna().all()
    assert set(joined["server_source"]) == {"log"}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("nowhere.log", "nowhere.log: cannot be copied: No such file or directory"),
        (".", "is no regular file; give --server-log a file with the server's log"),
        ("huge.log", "huge.log: with it the run's logs are 1024 MiB, at most 512 MiB are read; cut it to the time"),
    ],
)
def test_a_log_that_cannot_be_used_is_one_line(tmp_path, capsys, log, expected):
    run = write_folder(tmp_path / "r", [record()])
    with (tmp_path / "huge.log").open("wb") as file:
        file.truncate(1 << 30)  # a hole: takes no room

    assert cli.main(["report", str(run), "--server-log", str(tmp_path / log)]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("twoclocks: ")
    assert expected in line
    assert not list(run.glob("server-added*"))


def test_a_log_is_not_put_into_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "x.log").write_text("a\n")

    assert cli.main(["report", str(tmp_path), "--server-log", str(tmp_path / "x.log")]) == 2

    assert "is no run folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.log"]
