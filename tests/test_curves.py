"""The report of a sweep or search, from run folders made up for it."""

import json

import msgspec
import numpy as np
import pytest
from make_run import make_run

from twoclocks import cli, curves, curves_plot
from twoclocks.errors import RunFolderError
from twoclocks.evidence import kept_up_with
from twoclocks.levels import Found, Probe
from twoclocks.run_levels import Level, Levels


def folder_of(tmp_path, levels, **fields):
    folder = tmp_path / "sweep"
    for level in levels:
        if level.status == "finished":
            make_run(folder / level.folder, requests=20, seed=level.number, users=int(level.value))
    folder.mkdir(exist_ok=True)
    given = {"kind": "sweep", "name": "demo", "over": "users", "twoclocks_version": "0", "overrides": []}
    given |= {"experiment_file": "x.yaml", "status": "finished", "levels": levels} | fields
    (folder / "sweep.json").write_bytes(msgspec.json.encode(Levels(**given)))
    return folder


def level(number, value, status="finished", **fields):
    return Level(number=number, over="users", value=value, folder=f"0{number}-users-{value}", status=status, **fields)


def test_a_broken_level_stands_in_the_table_and_the_others_in_the_curves(tmp_path, capsys):
    broken = level(2, 4, "failed", error="no <b>answer</b>", exit_code=3)
    folder = folder_of(tmp_path, [level(1, 2), broken, level(3, 6)], status="failed", planned=[2, 4, 6])

    assert cli.main(["report", str(folder)]) == 0

    printed = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "report.html").read_text()
    assert [("achieved" in row, row["status"]) for row in summary["levels"]] == [
        (True, "finished"),
        (False, "failed"),
        (True, "finished"),
    ]
    assert "2 levels have figures" in summary["partial"]
    assert "failed: no <b>answer</b>" in printed
    assert "no &lt;b&gt;answer" in page
    assert "<b>answer" not in page
    for name in ("01-users-2", "03-users-6"):
        assert f'href="{name}/report.html"' in page
        assert (folder / name / "report.html").exists()
    assert (folder / "plots" / "curves.png").stat().st_size > 10_000


def test_a_search_that_found_nothing_has_exit_code_1(tmp_path):
    probe = Probe(value=2, judgement="fail", passed=False, share=0.1, low=0.05, high=0.2, requests=20)
    found = Found(None, 2, "the SLO is not met at load.search.low = 2; nothing above it was tried")
    folder = folder_of(tmp_path, [level(1, 2)], kind="search", probes=[probe], found=found, rule="as it is judged")
    built = curves.build(folder)

    assert built.exit_code == 1
    assert built.summary["search"]["interval"] == [None, 2]
    assert "no users found" in built.html.read_text()


def test_a_sweep_with_an_invalid_level_has_exit_code_4(tmp_path):
    folder = folder_of(tmp_path, [level(1, 2), level(2, 4)], planned=[2, 4])
    meta = folder / "02-users-4" / "run.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"lost_records": 3}))

    assert cli.main(["report", str(folder)]) == 4


def test_no_level_at_all_still_makes_a_report(tmp_path):
    folder = folder_of(tmp_path, [level(1, 2, "failed", error="refused")], status="failed", planned=[2, 4])
    built = curves.build(folder)

    assert built.summary["knee"]["value"] is None
    assert "1 not begun" in built.summary["partial"]


def test_no_marker_covers_the_name_of_a_level(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves_plot.Figure, "savefig", lambda figure, _: drawn.append(figure))
    rows = [
        {"value": at, "achieved": at, "ttft_p50": 0.2, "ttft_p95": 0.21, "tpot_p50": 0.02, "tpot_p95": 0.03}
        | {"tokens_per_s": 9.0, "goodput": None}
        for at in (1.0, 2.0)
    ]
    told = {"name": "x", "levels": rows, "limits": {}, "knee": {"reached": False}, "unit": "requests/s", "over": "rate"}
    curves_plot.curves_plot(told, tmp_path / "x.png")
    named = [[(text.get_text(), text.xy[1]) for text in axes.texts] for axes in drawn[0].axes[:2]]

    assert named == [[("1", 210.0), ("2", 210.0)], [("1", 30.0), ("2", 30.0)]]  # above both of its points


@pytest.mark.parametrize("content", [None, "{", '{"kind": 1}'])
def test_what_is_no_sweep_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"sweep\.json"):
        curves.build(tmp_path)


def test_the_knee_of_a_server_with_ten_slots_is_ten_users():
    """E2E of n users on N slots of s seconds each: s up to N, then s n / N."""
    rng = np.random.default_rng(3)
    users = [1, 4, 8, 16, 32]
    rows = [{"value": value, "number": number} for number, value in enumerate(users)]
    e2e = {number: rng.normal(0.5 * max(1, value / 10), 0.02, 300) for number, value in enumerate(users)}
    point = curves.knee("users", rows, e2e)

    assert point["low"] < 10 < point["high"]
    assert point["high"] - point["low"] < 0.5
    assert point["reached"]
    assert not curves.knee("users", rows[:3], e2e)["reached"]


def test_the_knee_over_rates_is_the_bracket():
    rows = [{"value": value, "number": value, "kept_up": value < 30} for value in (10, 20, 30, 40)]

    point = curves.knee("rate", rows, {})
    assert (point["low"], point["high"], point["reached"]) == (20, 30, True)
    assert not curves.knee("rate", rows[:2], {})["reached"]


@pytest.mark.parametrize(
    ("kept_up", "bracket", "text"),
    [
        ([True, None, False], (10, 30), None),  # of the middle one nothing is known
        ([None, None, False], (None, 30), "cannot be told from these levels, but below 30 requests/s"),
        ([True, True, None], (20, None), "at least 20 requests/s; the levels above are too short to say more"),
        ([True, True, True], (30, None), "not reached by these levels, the highest of which is 30 requests/s"),
        ([None, None, None], (None, None), "cannot be told from these levels"),
    ],
)
def test_levels_that_say_nothing_widen_the_bracket(kept_up, bracket, text):
    point = curves.knee(
        "rate", [{"value": 10 * n, "number": n, "kept_up": one} for n, one in enumerate(kept_up, 1)], {}
    )

    assert (point["low"], point["high"]) == bracket
    assert point["reached"] == (text is None)
    assert text is None or curves.not_bracketed(point, 30, "requests/s") == text


@pytest.mark.parametrize("overload", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_requests_pile_up_above_capacity_only(overload):
    """A server of 4 slots of 40 ms under steady arrivals, worked out by hand: the n-th waits for the (n-4)-th."""
    began = np.arange(0, 5, 1 / (100 * overload))
    ended = np.empty_like(began)
    for n, at in enumerate(began):
        ended[n] = max(at, ended[n - 4] if n >= 4 else 0.0) + 0.04

    assert kept_up_with(began, ended, (0.0, 5.0)) == (overload <= 1.0)
