import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import worst


def test_the_worst_by_each_figure(tmp_path):
    make_run(tmp_path / "r", requests=60, failures=3)
    run = twoclocks.load_run(tmp_path / "r")

    rows = worst.worst(run)

    assert [row["e2e"] for row in rows] == sorted((row["e2e"] for row in rows), reverse=True)
    for name in worst.BY:
        among = {row["request_id"] for row in rows if name in row["worst_by"]}
        assert among == set(run.ok.sort_values(name)["request_id"].tail(worst.EACH)), name
    assert all(row["worst_by"] for row in rows)


def test_the_chunks_of_a_request(tmp_path):
    made = [record(f"{i:032x}", sent_at=3.0, chunk_us=[100_000, 50_000, 0, 250_000, 10], output_tokens=7,
                   chunk_kinds=[("role", 1), ("content", 3), ("usage", 1)], chunk_tokens=[0, 4, 1, 2, 0])
            for i in range(2)]  # fmt: skip
    run = twoclocks.load_run(write_folder(tmp_path / "r", made))

    ((key, (at, tokens)),) = worst.chunk_timelines(run, [f"{1:032x}"]).items()

    assert key == f"{1:032x}"
    assert at == pytest.approx([0.15, 0.15, 0.4])
    assert tokens.tolist() == [4, 5, 7]


def test_a_long_answer_keeps_its_longest_gaps(tmp_path):
    rng = np.random.default_rng(1)
    micros = rng.integers(10_000, 30_000, 5000)
    micros[[7, 2500, 4990]] = 900_000
    one = record(chunk_us=micros.tolist(), chunk_kinds=[("content", 5000)], output_tokens=5000)
    run = twoclocks.load_run(write_folder(tmp_path / "r", [one]))

    ((at, tokens),) = worst.chunk_timelines(run, [one.request_id]).values()

    assert len(at) <= worst.POINTS
    assert (np.diff(at) > 0.899).sum() >= 3
    assert {8, 2501, 4991, 5000} <= set(tokens.tolist())
