import json
import re
from html.parser import HTMLParser

import pytest
from make_run import make_run, record, write_folder

from twoclocks import report
from twoclocks.errors import RunFolderError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vllm"
    make_run(folder, requests=30, failures=2)
    return folder, report.build(folder)


def test_all_files_are_written(built):
    folder, made = built

    for name in (
        "summary.json",
        "summary.txt",
        "vllm_bench.json",
        "report.html",
        "plots/client_vs_server_violin.png",
        "plots/timeline.png",
        "plots/waterfall.png",
    ):
        assert (folder / name).stat().st_size > 100, name
    assert made.html == folder / "report.html"
    assert made.violin == folder / "plots" / "client_vs_server_violin.png"
    assert json.loads((folder / "summary.json").read_text()) == made.summary


def test_the_page_is_self_contained_and_well_formed(built):
    folder, _ = built
    html = (folder / "report.html").read_text()
    opened, problems = [], []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name in ("src", "href") and not value.startswith("data:"):
                    problems.append((tag, value))
            if tag not in ("meta", "img", "br", "link"):
                opened.append(tag)

        def handle_endtag(self, tag):
            if not opened or opened.pop() != tag:
                problems.append(("end", tag))

    Checker().feed(html)

    assert problems == []
    assert opened == []
    assert html.count("data:image/png;base64,") == 3


def test_the_servers_text_is_escaped(built):
    folder, _ = built
    html = (folder / "report.html").read_text()

    assert "&lt;script&gt;" in html
    assert not re.search(r"<script", html)


def test_the_page_shows_the_figures_of_the_summary(built):
    folder, made = built
    html = (folder / "report.html").read_text()

    assert f"{made.summary['figures']['ttft']['p50'] * 1e3:,.1f}" in html
    assert "Both hold queue and prefill" in html
    assert "shape: ramp" in html


def test_each_part_of_the_waterfall_stands_there_with_its_definition(built):
    folder, made = built
    html = (folder / "report.html").read_text()
    (waterfall,) = made.summary["waterfall"]

    assert "The largest part of the time to the first token is" in html
    for bar in waterfall["bars"]:
        assert bar["label"] in html
        assert html.count(bar["definition"].replace(">", "&gt;").replace("'", "&#39;")) >= 2, bar["name"]


def test_a_report_can_be_made_again(built):
    folder, made = built

    assert report.build(folder).summary == made.summary


def test_a_partial_run_says_so_in_page_and_text(tmp_path):
    folder = write_folder(
        tmp_path / "r", [record()], status="running", in_flight=None, window={"started_at": None, "ended_at": None}
    )

    report.build(folder)

    for name in ("report.html", "summary.txt"):
        assert "Partial: the run was killed" in (folder / name).read_text()


def test_raw_files_stay_as_they_are(tmp_path):
    make_run(tmp_path / "r", requests=5)
    raw = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}

    report.build(tmp_path / "r")

    assert {path: path.read_bytes() for path in raw} == raw


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    folder = write_folder(tmp_path / "r", [record()])
    (folder / "plots").write_text("in the way")

    with pytest.raises(RunFolderError, match="cannot be written"):
        report.build(folder)
