"""The report of a study, from cells made up for it; every figure against numpy by hand."""

import json

import msgspec
import numpy as np
import pytest
from make_run import make_run
from make_study import cell, make_cell, make_study, skipped

from twoclocks import load_run, study_arms, study_figures, study_findings, study_report, study_tables, study_text
from twoclocks.errors import RunFolderError
from twoclocks.experiment import Claim, Where
from twoclocks.run_levels import Level, Levels
from twoclocks.study import read_study

ANSWERS = {f"p{number}": f"answer {number}" for number in range(7)}
OTHERS = ANSWERS | {"p2": "another \x1b[31manswer</pre><script>alert(1)</script>"}
MEMORY = [{"name": "weights", "bytes": 3 * 2**20, "source": "run.json", "definition": "parameters as loaded"}]


@pytest.fixture(scope="module")
def duel(tmp_path_factory):
    """Two targets, two repeats, in the order A B B A, with claims; a third target was not there."""
    folder = tmp_path_factory.mktemp("study") / "duel"
    cells = [cell(1, "A"), cell(2, "B"), cell(3, "B", repeat=2), cell(4, "A", repeat=2)]
    for one in cells:
        is_a = one.target == "A"
        make_cell(
            folder / one.folder, seed=one.number, requests=30, slow=1.0 if is_a else 2.0,
            server="vllm" if is_a else "transformers", answers=ANSWERS if is_a else OTHERS,
            memory=MEMORY if is_a else (),
        )  # fmt: skip
    claims = [
        claim(
            "twice as fast", "e2e.mean", Where(target="B"), Where(target="A"), published=2.0, unit="x", source="a paper"
        ),
        claim("slower", "e2e.mean", Where(target="B"), Where(target="A"), published=0.5),
        claim("in ms", "ttft.p50", Where(target="A"), published=31.0, unit="ms"),
        claim("of the third", "ttft.p50", Where(target="C"), published=1.0),
        claim("of no consequence", "ttft.mean", Where(target="A"), Where(target="A"), published=1.5),
        claim("not there", "memory.gpu_used_peak", Where(target="A"), published=1.0),
    ]
    make_study(folder, cells, claims=claims, targets=["A", "B", "C"], skipped=[skipped("C", "no answer at :1")])
    return folder, study_report.build(folder)


def claim(says, figure, of, over=None, **fields):
    return msgspec.to_builtins(Claim(says=says, figure=figure, of=of, over=over, **fields))


def arm(summary, name):
    return next(one for one in summary["arms"] if one["name"] == name)


def pooled_column(folder, numbers, column):
    """A column of the requests that ended ok, of several cells, read by hand."""
    paths = sorted(path for path in folder.iterdir() if path.name[:2] in numbers and path.is_dir())
    return [load_run(path).ok[column].to_numpy(dtype=float) for path in paths]


def test_repeats_are_pooled_as_requests_and_no_percentile_is_averaged(duel):
    folder, built = duel
    figures = arm(built.summary, "A")["figures"]
    parts = pooled_column(folder, ("01", "04"), "e2e")
    together = np.concatenate(parts)

    assert figures["requests.ok"]["value"] == 60
    for p in (50, 95, 99):
        assert figures[f"e2e.p{p}"]["value"] == pytest.approx(np.percentile(together, p), rel=1e-12)
    assert figures["e2e.p95"]["by_repeat"] == pytest.approx([np.percentile(part, 95) for part in parts])
    assert figures["e2e.mean"]["low"] < together.mean() < figures["e2e.mean"]["high"]
    scatter = 1.96 * together.std(ddof=1) / np.sqrt(len(together))
    assert figures["e2e.mean"]["high"] - together.mean() == pytest.approx(scatter, rel=0.25)


def test_gaps_of_all_repeats_are_pooled(duel):
    folder, built = duel
    gaps = np.concatenate([load_run(folder / name).gaps.seconds for name in ("02-B", "03-B")])

    figure = arm(built.summary, "B")["figures"]["itl.p99"]
    assert figure["value"] == pytest.approx(np.percentile(gaps, 99), rel=1e-12)
    assert figure["n"] == len(gaps)


def test_throughput_is_what_the_windows_let_through(duel):
    folder, built = duel
    rates = []
    for name in ("01-A", "04-A"):
        run = load_run(folder / name)
        start, end = run.window
        chunks = run.chunks.merge(run.requests[["request_id", "phase"]], on="request_id")
        inside = chunks[(chunks["phase"] != "warmup") & chunks["at"].between(start, end)]
        rates.append(inside["tokens"].sum() / (end - start))

    figure = arm(built.summary, "A")["figures"]["output_throughput"]
    assert figure["value"] == pytest.approx(np.mean(rates), rel=1e-9)
    assert figure["by_repeat"] == pytest.approx(rates, rel=1e-9)
    assert figure["low"] < figure["value"] < figure["high"]


def test_differences_are_paired_by_prompt_and_tell_the_direction(duel):
    folder, built = duel
    rows = {row["figure"]: row for row in built.summary["differences"] if row["target"] == "B"}
    of_a = np.concatenate(pooled_column(folder, ("01", "04"), "e2e"))
    of_b = np.concatenate(pooled_column(folder, ("02", "03"), "e2e"))

    row = rows["e2e.mean"]
    assert row["prompts"] == 7
    assert row["ratio"] == pytest.approx(of_b.mean() / of_a.mean(), rel=1e-9)
    assert row["ratio_low"] < 2.0 * 0.9 < row["ratio_high"] * 1.1
    assert row["difference"] == pytest.approx(of_b.mean() - of_a.mean(), rel=1e-9)
    assert (row["against"], row["verdict"]) == ("A", "slower")
    assert rows["output_throughput"]["verdict"] == "less"
    assert rows["ttft.p95"]["prompts"] is None  # seven prompts are too few to pair a p95


def test_what_is_published_is_set_against_what_was_measured_and_never_mixed(duel):
    _, built = duel
    twice, slower, in_ms, third, undecided, absent = built.summary["claims"]
    row = next(row for row in built.summary["differences"] if row["figure"] == "e2e.mean")

    assert (twice["value"], twice["low"], twice["high"]) == (row["ratio"], row["ratio_low"], row["ratio_high"])
    assert twice["same_direction"] is True
    assert twice["holds"] is (row["ratio_low"] <= 2.0 <= row["ratio_high"])
    assert (slower["same_direction"], slower["holds"]) == (False, False)
    assert (undecided["value"], undecided["same_direction"]) == (1, None)  # a target against itself
    assert "within chance" in next(
        row for row in study_tables.claims_table(built.summary).rows if row[0] == undecided["says"]
    )
    ttft = arm(built.summary, "A")["figures"]["ttft.p50"]
    assert in_ms["value"] == ttft["value"]
    assert in_ms["holds"] is (ttft["low"] <= 0.031 <= ttft["high"])
    assert (third["value"], third["why"]) == (None, "C was skipped: no answer at :1")
    assert (absent["value"], absent["why"]) == (None, "A does not tell memory.gpu_used_peak")


def test_a_published_value_inside_the_interval_is_said_to_lie_there(tmp_path):
    make_cell(tmp_path / "01-A", requests=40)
    told = float(load_run(tmp_path / "01-A").ok["e2e"].mean())
    claims = [claim("exactly", "e2e.mean", Where(target="A"), published=told * 1e3, unit="ms")]
    claims.append(claim("in minutes", "e2e.mean", Where(target="A"), published=1.0, unit="min"))
    built = study_report.build(make_study(tmp_path, [cell(1, "A")], claims=claims))

    exactly, minutes = built.summary["claims"]
    assert exactly["holds"] is True
    assert minutes["holds"] is None  # a unit that is not known is not guessed at
    assert f"{told * 1e3:,.4g}" in built.text.read_text()


def test_cells_stand_in_the_order_in_which_they_were_run(duel):
    folder, built = duel
    medians = [
        float(np.median(part)) for name in ("01", "02", "03", "04") for part in pooled_column(folder, name, "ttft")
    ]

    assert [row["target"] for row in built.summary["drift"]] == ["A", "B", "B", "A"]
    assert [row["values"]["ttft.p50"] for row in built.summary["drift"]] == pytest.approx(medians)
    assert "Run one after the other: A, B, A." in built.summary["order_words"]
    assert (folder / "plots" / "drift.png").stat().st_size > 10_000


def test_both_clocks_of_the_same_requests_and_what_is_not_told(duel):
    folder, built = duel
    rows = {row["label"]: row for row in arm(built.summary, "A")["clocks"]}
    server = np.concatenate(pooled_column(folder, ("01", "04"), "server_ttft"))

    assert rows["TTFT p95"]["server"] == pytest.approx(np.percentile(server, 95))
    assert (rows["TTFT p95"]["tool_n"], rows["TTFT p95"]["server_n"]) == (60, 60)
    assert rows["ITL mean"]["source"].startswith("/metrics")
    other = {row["label"]: row for row in arm(built.summary, "B")["clocks"]}
    assert other["TTFT mean"]["server"] is None
    assert "not told" in built.text.read_text()


def test_what_is_missing_is_said_first_and_decides_the_exit_code(duel, tmp_path):
    _, built = duel
    assert built.summary["partial"] == ["C was skipped: no answer at :1"]
    assert built.exit_code == 0

    make_cell(tmp_path / "01-A", requests=10)
    broken = cell(2, "B", status="failed", error="it <b>died</b>", exit_code=3)
    made = study_report.build(make_study(tmp_path, [cell(1, "A"), broken], status="failed"))
    page = made.html.read_text()

    assert made.exit_code == 1
    assert made.summary["partial"] == [
        "The study is failed: 1 of 2 cells have figures.",
        "02-B: failed: it <b>died</b>",
    ]
    assert page.index("died") < page.index("<h2>")
    assert "<b>died" not in page


def test_an_invalid_cell_has_exit_code_4_and_each_reason_stands_once(tmp_path):
    for number in (1, 2):
        make_cell(tmp_path / f"0{number}-A", requests=10, seed=number)
        meta = json.loads((tmp_path / f"0{number}-A" / "run.json").read_text())
        (tmp_path / f"0{number}-A" / "run.json").write_text(json.dumps(meta | {"lost_records": 3}))
    made = study_report.build(make_study(tmp_path, [cell(1, "A"), cell(2, "A", repeat=2)]))

    assert made.exit_code == 4
    lost = [line for line in study_text.verdict_lines(made.summary) if "INVALID: " in line]
    assert len(lost) == 1
    assert "(01-A, 02-A)" in lost[0]


def test_a_cell_that_cannot_be_read_leaves_the_others(tmp_path):
    make_cell(tmp_path / "01-A", requests=10)
    (tmp_path / "02-B").mkdir()
    made = study_report.build(make_study(tmp_path, [cell(1, "A"), cell(2, "B")]))

    assert made.exit_code == 1
    assert "run.json" in made.summary["cells"][1]["error"]
    assert [one["name"] for one in made.summary["arms"]] == ["A"]


def test_answers_side_by_side(duel):
    _, built = duel
    rows = {row["prompt_id"]: row for row in built.summary["answers"]}
    page, terminal = built.html.read_text(), study_text.duel_text(built.summary)

    assert rows["p1"]["differ_at"] is None
    assert rows["p2"]["answers"] == [ANSWERS["p2"], OTHERS["p2"]]
    assert rows["p2"]["differ_at"] == 2
    assert "<script>" not in page
    assert "another \N{REPLACEMENT CHARACTER}[31manswer&lt;/pre&gt;" in page
    assert "\x1b" not in page + terminal + built.text.read_text()
    assert "The answers are the same." in terminal
    assert "The answers differ from character 3 on." in terminal


def test_the_terminal_cuts_no_verdict_and_no_figure(duel):
    folder, built = duel
    text = (folder / "summary.txt").read_text()

    assert max(map(len, text.splitlines())) <= 118
    for row in built.summary["differences"]:
        if row["figure"] in study_text.IN_SHORT:
            assert any(row["label"] in line and row["verdict"] in line for line in text.splitlines())


def test_memory_is_told_or_is_not(duel):
    _, built = duel
    assert arm(built.summary, "A")["figures"]["memory.weights"]["value"] == 3 * 2**20
    assert not any(name.startswith("memory.") for name in arm(built.summary, "B")["figures"])
    (row,) = built.summary["memory"]
    assert (row["name"], row["weights"], row["weights_on_disk"]) == ("A", 3 * 2**20, None)


def test_a_batch_takes_as_long_as_its_slowest_request(tmp_path):
    load = {"shape": "batch", "batch": 4}
    make_cell(tmp_path / "01-A", requests=24, users=4, batch=4, load=load)
    built = study_report.build(make_study(tmp_path, [cell(1, "A")]))

    rows = load_run(tmp_path / "01-A").ok.sort_values("sent_at")
    walls = [group["ended_at"].max() - group["sent_at"].min() for _, group in rows.groupby("intended_at")]
    assert len(walls) == 6
    figures = arm(built.summary, "A")["figures"]
    assert figures["batch_latency.mean"]["value"] == pytest.approx(np.mean(walls), rel=1e-9)
    assert figures["batch_latency_per_request.mean"]["value"] == pytest.approx(np.mean(walls) / 4, rel=1e-9)


def test_requests_of_a_batch_are_not_taken_for_so_many_chances(tmp_path):
    """Sixteen requests of a batch that are answered in step tell of one batch."""
    load = {"shape": "batch", "batch": 16}
    make_cell(tmp_path / "01-A", requests=128, users=16, batch=16, load=load)
    make_study(tmp_path, [cell(1, "A")])
    (made,), _ = study_arms.read_arms(tmp_path, read_study(tmp_path), lambda _line: None)
    found = study_figures.figures(made, study_arms.pooled(made))

    side = found["e2e.mean"], study_arms.pooled(made)
    assert study_findings.against("e2e.mean", side, side)[1] is None  # and not paired by prompt either
    assert found["e2e.p50"].interval is not None
    assert found["e2e.p95"].interval is None  # eight values say nothing of it
    for name in ("e2e.mean", "ttft.p50", "itl.mean", "stream_throughput.mean"):
        assert len(np.unique(np.concatenate(found[name].sample.units))) == 8
        assert sum(map(len, found[name].sample.values)) >= 128


def test_variants_that_are_rates_make_a_curve(tmp_path):
    cells = []
    for number, rate in enumerate((1, 2, 4), 1):
        cells.append(cell(number, "A", f"rate{rate}"))
        load = {"shape": "rate", "rate": rate}
        make_cell(tmp_path / cells[-1].folder, requests=30, users=2 * rate, seed=number, load=load)
    built = study_report.build(make_study(tmp_path, cells))

    (line,) = built.summary["lines"]
    assert [row["value"] for row in line["levels"]] == [1, 2, 4]
    for row, one in zip(line["levels"], built.summary["arms"], strict=True):
        assert row["tokens_per_s"] == one["figures"]["output_throughput"]["value"]
        assert row["ttft_p50"] == one["figures"]["ttft.p50"]["value"]
    assert (tmp_path / "plots" / "study_curves.png").exists()


def test_cells_that_are_sweeps(tmp_path):
    cells = [cell(1, "A"), cell(2, "B")]
    for one in cells:
        levels = []
        for number, users in enumerate((2, 4), 1):
            make_run(tmp_path / one.folder / f"0{number}", requests=20, seed=number, users=users)
            levels.append(Level(number=number, over="users", value=users, folder=f"0{number}", status="finished"))
        sweep = Levels(
            kind="sweep", name="s", over="users", twoclocks_version="0", experiment_file="x", overrides=[],
            status="finished", levels=levels,
        )  # fmt: skip
        (tmp_path / one.folder / "sweep.json").write_bytes(msgspec.json.encode(sweep))
    built = study_report.build(make_study(tmp_path, cells))

    rates = [load_run(tmp_path / "01-A" / level) for level in ("01", "02")]
    most = max(
        json.loads((run.path / "summary.json").read_text())["figures"]["output_throughput"]["value"] for run in rates
    )
    assert arm(built.summary, "A")["figures"]["saturation.output_throughput"]["value"] == pytest.approx(most)
    figure = arm(built.summary, "A")["figures"]["saturation.output_throughput"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert [line["target"] for line in built.summary["lines"]] == ["A", "B"]
    assert built.summary["cells"][0]["verdict"] == "SUSPECT"


def test_choices_that_share_a_prompt_against_requests_that_do_not(tmp_path):
    """The invented server's gauge stands at 6 % a running request."""
    cells = [cell(1, "A", "alone"), cell(2, "A", "n4"), cell(3, "A", "separate4")]
    for one, users, n in zip(cells, (1, 1, 4), (1, 4, 1), strict=True):
        load = {"shape": "ramp", "users": users}
        make_cell(tmp_path / one.folder, requests=20, users=users, load=load, extra_body={"n": n})
    built = study_report.build(make_study(tmp_path, cells))

    rows = {row["variant"]: row for row in built.summary["sharing"]}
    assert rows["alone"]["used"] == pytest.approx(0.06)
    assert rows["separate4"]["sequences"] == rows["n4"]["sequences"] == 4
    assert rows["n4"]["share_saved"] == pytest.approx(1 - rows["n4"]["used"] / rows["separate4"]["used"])
    assert rows["separate4"]["share_saved"] is None
    assert (tmp_path / "plots" / "kv_sharing.png").exists()


def test_choices_that_seem_to_use_less_than_one_alone_have_saved_nothing_that_was_seen(tmp_path):
    """The invented server's gauge stands higher for the one alone than for its four choices."""
    cells = [cell(1, "A", "alone"), cell(2, "A", "n4"), cell(3, "A", "separate4")]
    for one, users, asked, n in zip(cells, (2, 1, 6), (1, 1, 4), (1, 4, 1), strict=True):
        load = {"shape": "ramp", "users": asked}
        make_cell(tmp_path / one.folder, requests=20, users=users, load=load, extra_body={"n": n})
    built = study_report.build(make_study(tmp_path, cells))

    rows = {row["variant"]: row for row in built.summary["sharing"]}
    assert rows["n4"]["used"] < rows["alone"]["used"] < rows["separate4"]["used"]
    assert rows["n4"]["share_saved"] is None
    assert [name for name, row in rows.items() if row["missed"]] == ["n4"]


def test_hostile_names_steer_neither_page_nor_markdown_nor_plots(tmp_path):
    name = "a<script>|$x_y$\x1b[31m`*"
    cells = [cell(1, name, folder="01"), cell(2, "B", folder="02")]
    for one in cells:
        make_cell(tmp_path / one.folder, requests=10, seed=one.number)
    built = study_report.build(make_study(tmp_path, cells, name=name))
    text = built.text.read_text()

    assert "\x1b" not in text + built.html.read_text() + (tmp_path / "summary.txt").read_text()
    assert "<script>" not in text.replace(r"\<script\>", "") + built.html.read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.replace(r"\|", "").count("|") for line in table]
    rulers = [place for place, line in enumerate(table) if line.startswith("| ---")]
    assert all(widths[place - 1] == widths[place] == widths[place + 1] for place in rulers)


def test_a_study_of_which_nothing_finished_still_has_a_report(tmp_path):
    built = study_report.build(make_study(tmp_path, [cell(1, "A", status="failed", error="refused")], status="failed"))

    assert built.exit_code == 1
    assert "NO FIGURES" in built.html.read_text()
    # no title, letter by letter, of a table without columns
    assert all(len(line) > 2 for line in (tmp_path / "summary.txt").read_text().splitlines() if line)


@pytest.mark.parametrize("content", [None, "{", '{"kind": "study"}'])
def test_what_is_no_study_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"study\.json"):
        study_report.build(tmp_path)


@pytest.mark.parametrize(("claims", "text"), [("[{says: x}]", "claims"), ("[", "experiment")])
def test_an_experiment_that_cannot_be_read_is_one_line(tmp_path, claims, text):
    make_study(tmp_path, [])
    (tmp_path / "experiment.yaml").write_text(f"claims: {claims}")
    with pytest.raises(RunFolderError, match=text):
        study_report.build(tmp_path)
