"""Memory: of a process tree as /proc tells it, and the rows of a run against what was planted in its folder."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from locust_runs import wait_for
from make_run import record, write_folder

from twoclocks import report, terminal
from twoclocks.load import load_run
from twoclocks.memory_summary import memory_rows
from twoclocks.process_memory import PSS_COST, ProcessMemory, pss_bytes, rss_bytes, tree

MIB = 2**20

# Takes 64 MiB that it writes to, starts a child that takes 32, and tells both ids.
TAKES = """
import subprocess, sys, time
mine = b"x" * (64 * 2**20)
code = "import time; mine = b'x' * (32 * 2**20); print('there', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def taking():
    """(pid of a process, of its child): 64 and 32 MiB."""
    with subprocess.Popen([sys.executable, "-c", TAKES], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            os.killpg(process.pid, 9)


def test_the_memory_of_a_process_and_its_child():
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as idle:
        idle.stdout.readline()
        nothing = rss_bytes(Path(f"/proc/{idle.pid}"))
        idle.communicate(b"\n")
    with taking() as (pid, child):
        row = ProcessMemory(pid).sample(1.5)
        assert tree(pid) == [pid, child]
    assert (row["at"], row["pid"], row["processes"]) == (1.5, pid, 2)
    assert row["rss_bytes"] == pytest.approx(96 * MIB + 2 * nothing, abs=8 * MIB)
    assert 96 * MIB < row["pss_bytes"] < row["rss_bytes"]  # the interpreter's own pages are shared


def fake_proc(proc, pid, parent, rss_pages=1, pss_kb=1, name="a) b (c"):
    folder = proc / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0")
    (folder / "statm").write_text(f"9 {rss_pages} 1 1 0 1 0")
    if pss_kb is not None:
        (folder / "smaps_rollup").write_text(
            f"0-f ---p 0 0 0 [rollup]\nRss: 9 kB\nPss:      {pss_kb} kB\nPss_Anon: 1 kB\n"
        )


def test_a_tree_is_all_descendants_and_nobody_else(tmp_path):
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1), (13, 12)):
        fake_proc(tmp_path, pid, parent)

    assert sorted(tree(10, tmp_path)) == [10, 11, 12, 13]
    assert tree(99, tmp_path) == []


def test_pss_is_read_as_seldom_as_it_is_dear(tmp_path):
    fake_proc(tmp_path, 10, 1)
    clock = [0.0]

    def now():
        clock[0] += 0.001  # each look at the clock is a millisecond later, so that a reading of PSS takes one
        return clock[0]

    memory = ProcessMemory(10, tmp_path, now)
    rows = []
    while clock[0] < 2 * 0.001 / PSS_COST:
        rows.append(memory.sample(clock[0]))
        clock[0] += 0.01

    assert [row["pss_bytes"] for row in rows if row["pss_bytes"] is not None] == [1024] * 2
    assert all(row["rss_bytes"] == os.sysconf("SC_PAGE_SIZE") for row in rows)


def test_pss_of_a_part_of_the_tree_is_not_given(tmp_path):
    fake_proc(tmp_path, 10, 1)
    fake_proc(tmp_path, 11, 10, rss_pages=2, pss_kb=None)  # of another user
    row = ProcessMemory(10, tmp_path).sample(0.0)

    assert (row["processes"], row["rss_bytes"], row["pss_bytes"]) == (2, 3 * os.sysconf("SC_PAGE_SIZE"), None)
    assert pss_bytes(tmp_path / "11") is None


def test_a_process_that_is_gone_is_told():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

    assert ProcessMemory(process.pid).sample(0.0)["error"] == f"there is no process {process.pid} on this machine"


# the rows of a run


def scrape(at, **samples):
    """A line of server_samples.jsonl; a value is {labels: value} with labels as JSON."""
    rows = [
        [name.replace("__", ":"), json.loads(labels), v] for name, of in samples.items() for labels, v in of.items()
    ]
    return json.dumps({"url": "http://h/metrics", "at": at, "until": at + 0.01, "samples": rows, "error": None}) + "\n"


def config(engine, blocks, **more):
    return json.dumps({"engine": engine, "num_gpu_blocks": str(blocks), "block_size": "16", **more})


@pytest.fixture
def planted(tmp_path):
    """A folder whose run measured from second 2 to 8, with figures outside that are larger."""
    started = {"weights_on_disk_bytes": 5000, "model_folder": "/m<b>", "kv_bytes_per_token": 100}
    brought = {"name": "allocator_peak", "bytes": 7, "source": "torch", "definition": "of its allocator"}
    broken = {"name": "x", "bytes": "many"}
    records = [record(sent_at=3.0, ended_at=4.0, chunk_us=[10], chunk_kinds=[("content", 1)])]
    window = {"started_at": 2.0, "ended_at": 8.0}
    write_folder(tmp_path, records, window=window, target={"started": started}, memory=[brought, broken])
    usage = '{"engine": "0"}'
    (tmp_path / "server_samples.jsonl").write_text(
        scrape(1.0, vllm__cache_config_info={config("0", 101): 1}, vllm__kv_cache_usage_perc={usage: 0.9})
        + scrape(3.0, vllm__kv_cache_usage_perc={usage: 0.03})
        + scrape(4.0, vllm__kv_cache_usage_perc={usage: 0.25})
        + scrape(9.0, vllm__kv_cache_usage_perc={usage: 0.8})
    )
    (tmp_path / "process_samples.jsonl").write_text(
        "".join(
            json.dumps({"at": at, "pid": 7, "processes": 2, "rss_bytes": rss, "pss_bytes": pss}) + "\n"
            for at, rss, pss in ((1.0, 900, 800), (3.0, 300, None), (4.0, 200, 150), (5.0, 250, 120), (9.0, 900, 800))
        )
        + json.dumps({"at": 6.0, "pid": 7, "error": "gone"})
        + "\n"
    )
    (tmp_path / "gpu_samples.jsonl").write_text(
        "".join(
            json.dumps({"at": at, "source": "nvml", "gpu": gpu, "uuid": str(gpu), "memory_used_bytes": size}) + "\n"
            for at, sizes in ((1.0, (9, 9)), (3.0, (5, 1)), (4.0, (2, 3)))
            for gpu, size in enumerate(sizes)
        )
    )
    return tmp_path


def test_each_row_is_what_was_planted_inside_the_window(planted):
    rows = {row["name"]: row for row in memory_rows(load_run(planted))}

    assert {name: row["bytes"] for name, row in rows.items()} == {
        "allocator_peak": 7,
        "weights_on_disk": 5000,
        "kv_reserved": 101 * 16 * 100,
        "kv_used_peak": 0.25 * 100 * 16 * 100,  # of all blocks but the null block
        "process_pss_peak": 150,
        "process_rss_peak": 300,
        "gpu_used_peak": 6,
    }
    assert all(row["source"] and row["definition"] for row in rows.values())
    assert (rows["process_rss_peak"]["n"], rows["process_pss_peak"]["n"]) == (3, 2)


def test_the_table_stands_in_terminal_and_report(planted):
    made = report.build(planted)
    text = " ".join(terminal.to_text(terminal.render(made.summary)).split())
    html = made.html.read_text()

    assert "KV cache, peak in use" in text
    assert "39.1 KiB" in text  # 40,000 bytes
    assert "/m&lt;b&gt;" in html
    assert "/m<b>" not in html
    assert 'title="161600 bytes"' in html
    assert "model_folder: /m&lt;b&gt;" in html  # how the server was started
    assert "kv_bytes_per_token&#39;" not in html  # and not as it stands in run.json


def test_a_cache_that_no_scrape_saw_in_use_has_no_row(planted):
    (planted / "server_samples.jsonl").write_text(
        scrape(3.0, vllm__cache_config_info={config("0", 101): 1}, vllm__kv_cache_usage_perc={'{"engine": "0"}': 0})
    )
    names = {row["name"] for row in memory_rows(load_run(planted))}

    assert names & {"kv_reserved", "kv_used_peak"} == {"kv_reserved"}


def test_several_engines_add_up_and_say_so(planted):
    two = {config("0", 101): 1, config("1", 51): 1}
    (planted / "server_samples.jsonl").write_text(
        scrape(
            3.0, vllm__cache_config_info=two, vllm__kv_cache_usage_perc={'{"engine": "0"}': 0.5, '{"engine": "1"}': 0}
        )
        + scrape(4.0, vllm__kv_cache_usage_perc={'{"engine": "0"}': 0, '{"engine": "1"}': 0.1})
    )
    rows = {row["name"]: row for row in memory_rows(load_run(planted))}

    assert rows["kv_reserved"]["bytes"] == (101 + 51) * 1600
    assert rows["kv_used_peak"]["bytes"] == (50 + 5) * 1600
    assert "an upper bound" in rows["kv_used_peak"]["definition"]


def test_a_model_that_nobody_knows_has_no_bytes_unless_the_server_was_told_them(planted):
    meta = json.loads((planted / "run.json").read_text())
    (planted / "run.json").write_text(json.dumps(meta | {"target": {}}))
    names = [row["name"] for row in memory_rows(load_run(planted))]
    assert not {"kv_reserved", "kv_used_peak", "weights_on_disk"} & set(names)

    told = {config("0", 101, kv_cache_memory_bytes="1616"): 1}
    (planted / "server_samples.jsonl").write_text(
        scrape(3.0, vllm__cache_config_info=told, vllm__kv_cache_usage_perc={'{"engine": "0"}': 0.5})
    )
    rows = {row["name"]: row for row in memory_rows(load_run(planted))}
    assert (rows["kv_reserved"]["bytes"], rows["kv_used_peak"]["bytes"]) == (1616, 800)
    assert "as it was set" in rows["kv_reserved"]["definition"]


def test_a_run_without_any_has_no_table(tmp_path):
    write_folder(tmp_path, [record(chunk_us=[10], chunk_kinds=[("content", 1)])])
    made = report.build(tmp_path)

    assert made.summary["memory"] == []
    assert "<h2>Memory</h2>" not in made.html.read_text()


def test_the_collecting_process_samples_it(tmp_path):
    from twoclocks.collect import Collectors, Job

    with taking() as (pid, _):
        job = Job(
            run_folder=str(tmp_path),
            zero_ns=0,
            metrics_urls=[],
            interval_s=0.05,
            headers={},
            tls_verify=True,
            process=pid,
        )
        collectors = Collectors(job)
        path = tmp_path / "process_samples.jsonl"
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= 3)
        assert collectors.notes == []
        collectors.stop()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["processes"] == 2 and row["rss_bytes"] > 96 * MIB for row in rows)
    assert rows[0]["pss_bytes"] > 96 * MIB
    assert [row["at"] for row in rows] == sorted(row["at"] for row in rows)


def test_a_process_that_is_not_there_is_a_note(tmp_path):
    from twoclocks.collect import Collectors, Job

    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    job = Job(
        run_folder=str(tmp_path), zero_ns=0, metrics_urls=[], interval_s=1, headers={}, tls_verify=True,
        process=process.pid,
    )  # fmt: skip
    collectors = Collectors(job)
    collectors.stop()

    assert collectors.notes == [
        f"collect.process: {process.pid} is no process of this machine; its memory will be missing"
    ]
