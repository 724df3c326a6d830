import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks.errors import RunFolderError


def test_importing_the_package_is_light():
    heavy = ("locust", "gevent", "torch", "pandas", "numpy", "matplotlib")
    code = f"import sys, twoclocks; print([name for name in {heavy!r} if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_analysis_never_imports_locust():
    code = "import sys, twoclocks.report, twoclocks.compare; print({'locust', 'gevent'} & {*sys.modules})"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_record_becomes_rows(tmp_path):
    made = record(
        "a" * 32,
        intended_at=0.9,
        sent_at=1.0,
        ended_at=1.6,
        chunk_us=[100_000, 150_000, 50_000, 100_000, 1],
        chunk_kinds=[("role", 1), ("content", 2), ("reasoning", 1), ("usage", 1)],
        chunk_tokens=[None, 1, 2, 1, None],
        output_tokens=4,
    )

    run = twoclocks.load_run(write_folder(tmp_path / "r", [made]))
    row = run.requests.iloc[0]

    assert row["ttft"] == pytest.approx(0.25)
    assert row["first_event"] == pytest.approx(0.1)
    assert row["e2e"] == pytest.approx(0.4)
    assert row["tpot"] == pytest.approx(0.15 / 3)
    assert row["itl_mean"] == pytest.approx(0.075)
    assert row["itl_max"] == pytest.approx(0.1)
    assert row["e2e_per_token"] == pytest.approx(0.1)
    assert row["latency_from_intended"] == pytest.approx(0.5)
    assert row["ttft_from_intended"] == pytest.approx(0.35)
    assert run.chunks["kind"].tolist() == ["role", "content", "content", "reasoning", "usage"]
    assert run.chunks["tokens"].tolist() == [0, 1, 2, 1, 0]
    assert run.chunks["at"].to_numpy() == pytest.approx([1.1, 1.25, 1.3, 1.4, 1.400001])
    assert set(run.chunks["request_id"]) == {"a" * 32}


def test_the_contract_columns_are_there(tmp_path):
    make_run(tmp_path / "r", requests=5)

    run = twoclocks.load_run(tmp_path / "r")

    promised = (
        "request_id target prompt_id session turn user worker phase intended_at connect_started_at connected_at "
        "sent_at written_at first_byte_at ended_at chunk_us chunk_tokens chunk_kinds chunk_choice timestamp_source "
        "reads_merged prompt_tokens "
        "output_tokens cached_tokens token_source finish_reason http_status status error_kind error_message server "
        "ttft tpot e2e itl_mean itl_max e2e_per_token latency_from_intended "
        "server_ttft server_queue server_prefill server_decode server_tpot server_e2e server_source"
    )
    assert set(promised.split()) <= set(run.requests.columns)
    assert {"request_id", "at", "tokens", "kind", "choice"} <= set(run.chunks.columns)
    assert {"at", "series", "labels", "value"} <= set(run.server_samples.columns)
    assert run.meta["status"] == "finished"


def test_every_scrape_holds_every_series(tmp_path):
    make_run(tmp_path / "r", requests=20)
    run = twoclocks.load_run(tmp_path / "r")

    counter = run.server_samples[run.server_samples["series"] == "vllm:generation_tokens_total"]

    assert len(counter) == len(run.scrapes[0].at)
    assert counter["labels"].unique().tolist() == ['engine="0",model_name="tiny"']
    assert counter["value"].iloc[-1] == run.requests["output_tokens"].sum()


def test_choices_and_requests_without_chunks(tmp_path):
    kinds, choices = [("content", 4)], [(0, 1), (1, 2), (0, 1)]
    several = record("b" * 32, chunk_us=[1, 2, 3, 4], chunk_kinds=kinds, chunk_choice=choices, output_tokens=4)
    refused = record("c" * 32, sent_at=None, status="error", error_kind="refused")

    run = twoclocks.load_run(
        write_folder(tmp_path / "r", [refused, several, record("d" * 32, status="timeout", error_kind="idle")])
    )

    assert run.chunks["choice"].tolist() == [0, 1, 1, 0]
    assert np.isnan(run.requests["ttft"].iloc[[0, 2]]).all()
    assert run.requests["ttft"].iloc[1] == pytest.approx(1e-6)


def test_measured_leaves_out_the_warm_up_and_what_was_sent_after_the_end(tmp_path):
    made = [
        record("1" * 32, phase="warmup"),
        record("2" * 32, sent_at=2.0, ended_at=12.0),
        record("3" * 32, sent_at=11.0, ended_at=12.0, phase="drain"),
        record("4" * 32, sent_at=None, status="error", error_kind="refused"),
    ]

    run = twoclocks.load_run(write_folder(tmp_path / "r", made))

    assert run.measured["request_id"].str[0].tolist() == ["2", "4"]


def test_a_killed_run_is_read_up_to_its_last_whole_line(tmp_path):
    folder = write_folder(
        tmp_path / "r",
        [record(sent_at=1.0, ended_at=3.0)],
        status="running",
        window={"started_at": 1.0, "ended_at": None},
    )
    with (folder / "requests.jsonl").open("a") as file:
        file.write('{"request_id": "cut o')

    run = twoclocks.load_run(folder)

    assert run.partial
    assert len(run.requests) == 1
    assert run.window == (1.0, 3.0)


def test_a_run_killed_before_its_first_request(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "running"}')

    run = twoclocks.load_run(folder)

    assert len(run.requests) == len(run.chunks) == len(run.server_samples) == 0


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "run.json").unlink(), "no run.json"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json: cannot be read"),
        (lambda folder: (folder / "run.json").write_text("[]"), "expected an object"),
        (lambda folder: (folder / "requests.jsonl").write_text("{}\n"), "line 1 is no record"),
        (lambda folder: (folder / "experiment.yaml").write_text("a: ["), "experiment.yaml: cannot be read"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, spoil, told):
    folder = write_folder(tmp_path / "r", [record()])
    spoil(folder)

    with pytest.raises(RunFolderError, match=told) as raised:
        twoclocks.load_run(folder)

    assert "\n" not in str(raised.value)


def test_chunk_lists_of_different_length_are_refused(tmp_path):
    folder = write_folder(tmp_path / "r", [record(), record("e" * 32, chunk_us=[1, 2], chunk_kinds=[("content", 3)])])

    with pytest.raises(RunFolderError, match="line 2: chunk_kinds tells of 3 chunks, chunk_us of 2"):
        twoclocks.load_run(folder)


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match="no such run folder"):
        twoclocks.load_run(tmp_path / "nowhere")


def test_the_maker_of_test_runs_writes_valid_json(tmp_path):
    make_run(tmp_path / "r", requests=3)

    for text in (tmp_path / "r" / "server_samples.jsonl").read_text().splitlines():
        assert {"url", "at", "until", "samples"} <= set(json.loads(text))


def test_the_example_that_the_readme_shows_is_there_and_loads():
    root = Path(__file__).parent.parent
    run = twoclocks.load_run(root / "output" / "example")
    counter = run.server_samples.query("series == 'vllm:generation_tokens_total'")["value"]

    assert "(output/example/plots/client_vs_server_violin.png)" in (root / "README.md").read_text()
    assert (root / "output" / "example" / "plots" / "client_vs_server_violin.png").stat().st_size > 10_000
    assert run.ok["server_source"].eq("in-band").all()
    assert run.requests["output_tokens"].sum() == counter.iloc[-1] - counter.iloc[0]
