"""Turn by turn: the table of a run with sessions, and what of them was not sent."""

import json

import numpy as np
import pytest
from make_run import record, write_folder

from twoclocks import report
from twoclocks.load import load_run
from twoclocks.prefix_cache import cached_share
from twoclocks.turns import MOST_TURNS, by_turn, sessions


def run_of(tmp_path, records, how="own", **meta):
    folder = write_folder(tmp_path / "run", records, **meta)
    (folder / "experiment.yaml").write_text(f"name: x\nworkload: {{sessions: {how}}}\n")
    return load_run(folder)


def turn(number, turn, **fields):
    given = {
        "prompt_id": f"a-{turn}", "session": f"a#{number // 3}", "turn": turn, "sent_at": 0.1 * number,
        "chunk_us": [100_000 + 1000 * number, 1000], "chunk_kinds": [("content", 2)], "token_source": "usage",
        "output_tokens": 2, "prompt_tokens": 100 * (turn + 1), "cached_tokens": 96 * turn,
    }  # fmt: skip
    return record(f"{number:032x}", **given | fields)


def test_each_turn_has_its_own_figures(tmp_path):
    records = [turn(number, number % 3) for number in range(30)]
    records[5] = turn(5, 2, status="error", error_kind="http_500", chunk_us=[], chunk_kinds=[])
    rows = by_turn(run_of(tmp_path, records))
    last = [0.1 + 0.001 * number for number in range(2, 30, 3) if number != 5]

    assert [(row["turn"], row["requests"], row["ok"]) for row in rows] == [(0, 10, 10), (1, 10, 10), (2, 10, 9)]
    assert [row["prompt_tokens_mean"] for row in rows] == [100, 200, 300]
    assert [row["cached_share"] for row in rows] == pytest.approx([0, 96 / 200, 192 / 300])
    assert (rows[2]["ttft_p50"], rows[2]["ttft_p95"]) == pytest.approx(tuple(np.percentile(last, [50, 95])))


def test_the_cached_share_is_of_the_requests_of_which_it_is_known(tmp_path):
    records = [turn(0, 0, cached_tokens=None), turn(1, 0, cached_tokens=50), turn(2, 0, prompt_tokens=None)]
    rows = by_turn(run_of(tmp_path, records))

    assert rows[0]["cached_share"] == 0.5
    assert cached_share(run_of(tmp_path, [turn(0, 0, cached_tokens=None)]).ok) is None


def test_turns_of_a_long_session_share_the_last_row(tmp_path):
    rows = by_turn(run_of(tmp_path, [turn(number, number) for number in range(MOST_TURNS + 5)]))

    assert [row["turn"] for row in rows] == list(range(MOST_TURNS + 1))
    assert (rows[-1]["requests"], rows[-1]["and_later"], rows[-2]["and_later"]) == (5, True, False)


def test_a_run_without_sessions_has_no_such_table(tmp_path):
    run = run_of(tmp_path, [turn(0, 0)], "none")

    assert (by_turn(run), sessions(run)) == ([], None)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"failed": 3, "stopped": 1}, "not sent: 3 that came after one that failed, 1 that were left at the end."),
        ({}, "no turn of these was left out"),
        (None, "how many more they had is not known"),
    ],
)
def test_the_report_says_what_was_not_sent(tmp_path, left, words):
    run = run_of(tmp_path, [turn(number, number % 3) for number in range(6)], turns_not_sent=left)
    report.build(run.path)
    told = json.loads((run.path / "summary.json").read_text())
    text = " ".join((run.path / "summary.txt").read_text().split())
    page = (run.path / "report.html").read_text()

    assert (told["sessions"]["begun"], told["sessions"]["turns_not_sent"]) == (2, left)
    assert f"2 sessions, 6 turns sent; {words}" in text
    assert words in page
    assert "Turn by turn" in page
    assert "64.0 %" in text
