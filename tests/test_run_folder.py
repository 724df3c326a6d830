import errno
import json
import os
import resource
from datetime import datetime
from pathlib import Path

import pytest

from twoclocks.errors import RunFolderError, TwoclocksError
from twoclocks.experiment import Experiment
from twoclocks.record import Record, encode_record, read_records
from twoclocks.run_folder import RESERVE_BYTES, RunFolder, first_meta, make_folder

NOW = datetime(2026, 1, 2, 3, 4, 5)
RECORD = Record(
    request_id="a", target="t", prompt_id="p", user=0, worker=0, phase="measure", intended_at=0, ended_at=1, status="ok"
)


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path):
    experiment = Experiment(name="a/b c", output=str(tmp_path))
    folders = [make_folder(experiment, now=NOW) for _ in range(2)]

    assert [folder.name for folder in folders] == ["20260102-030405-a-b-c", "20260102-030405-a-b-c-2"]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = RunFolder.create(Experiment(output=str(tmp_path)))
    folder.append(encode_record(RECORD) + encode_record(RECORD)[:40])
    folder.close()

    assert list(read_records(folder.path / "requests.jsonl")) == [RECORD]


def test_a_full_disk_leaves_whole_lines_and_the_others_are_counted(tmp_path):
    line = encode_record(RECORD)
    folder = RunFolder.create(Experiment(output=str(tmp_path)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(line) + 40, hard))
    try:
        for lines in (4 * line, line):
            with pytest.raises(TwoclocksError, match=r"requests\.jsonl: cannot be written: File too large"):
                folder.append(lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.append(line)  # there is room again
    folder.close()

    assert (folder.path / "requests.jsonl").read_bytes() == 3 * line
    assert folder.unwritten == {"requests.jsonl": 3}
    assert [path.name for path in sorted(folder.path.iterdir())] == [
        "experiment.yaml", "requests.jsonl", "self_samples.jsonl",
    ]  # fmt: skip


def test_records_that_fill_the_disk_again_leave_room_for_the_last_run_json(tmp_path, monkeypatch):
    folder = RunFolder.create(Experiment(output=str(tmp_path)))
    replace, taken = folder._replace_meta, 0

    def free():
        return RESERVE_BYTES - os.fstat(folder._reserve.fileno()).st_blocks * 512 - taken

    def replace_if_there_is_room(text):
        if free() < len(text):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(text)

    monkeypatch.setattr(folder, "_replace_meta", replace_if_there_is_room)
    for status in ("running", "stopping", "finished"):
        folder.write_meta(status=status)
        taken += free()
    folder.close()

    assert json.loads((folder.path / "run.json").read_text())["status"] == "finished"


def test_a_disk_without_room_for_a_last_word_is_told_before_the_load(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunFolderError, match="cannot be written: No space left on device"):
        RunFolder.create(Experiment(output=str(tmp_path)))


def test_what_is_known_so_far_stands_in_run_json(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["locust", "--set", "target.headers.Authorization=Bearer secret", "-u", "3"])
    folder = RunFolder.create(Experiment(output=str(tmp_path)))
    folder.write_meta(**first_meta(0))
    folder.write_meta(status="finished")
    folder.close()
    meta = json.loads((folder.path / "run.json").read_text())

    assert (meta["status"], meta["lost_records"]) == ("finished", 0)
    assert f"model name\t: {meta['host']['cpu_model']}" in Path("/proc/cpuinfo").read_text()
    assert meta["command_line"] == ["locust", "--set", "target.headers.Authorization=***", "-u", "3"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="the run folder cannot be made"):
        RunFolder.create(Experiment(output=str(tmp_path / "file")))
    with pytest.raises(RunFolderError, match="another place with --run-folder PATH"):
        RunFolder.create(Experiment(), tmp_path / "file" / "run")


def test_a_place_may_be_named_that_does_not_exist_yet(tmp_path):
    asked = tmp_path / "new" / "run"

    assert make_folder(Experiment(output="elsewhere"), asked) == asked
    assert (asked / "experiment.yaml").exists()
    for there in (asked, asked / "experiment.yaml"):
        with pytest.raises(RunFolderError, match=f"--run-folder {there}: exists already"):
            make_folder(Experiment(), there)
