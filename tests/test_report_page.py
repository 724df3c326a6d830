"""The report's page as a reader has it: in a browser, offline, with a server that says what it likes."""

import hashlib
import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, PATIENCE_S, browser
from make_run import make_run, record, run_of_ttfts, write_folder
from matplotlib.image import imread

import twoclocks
from twoclocks import compare, report
from twoclocks.charts import charts
from twoclocks.record import encode_record

ECHARTS = Path(twoclocks.__file__).parent / "vendor" / "echarts" / "echarts.common.min.js"
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!-- \u2028 {{ 7 * 7 }}"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A run whose names, messages and answers are hostile, and some of whose requests failed."""
    folder = tmp_path_factory.mktemp("runs") / "a <img src=x onerror='window.hacked=1'> run"
    make_run(folder, requests=40, failures=2)
    lines = (folder / "requests.jsonl").read_bytes().splitlines(keepends=True)
    lines = [line.replace(b'"prompt_id":"p3"', json.dumps({"prompt_id": HOSTILE}).encode()[1:-1]) for line in lines]
    odd = {"output_text": HOSTILE, "error_kind": HOSTILE, "error_message": HOSTILE, "status": "error"}
    lines += [encode_record(record(f"{77_777:032x}", sent_at=5.0, ended_at=6.0, http_status=500, **odd))]
    (folder / "requests.jsonl").write_bytes(b"".join(lines))
    return report.build(folder)


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def charts_of(page):
    """(kind, is there something drawn) of each chart."""
    return page.ask(
        "[...document.querySelectorAll('figure[data-chart]')].map(f => "
        "[f.dataset.chart, f.querySelectorAll('.plot svg path').length > 2])"
    )


def test_the_library_is_the_file_that_was_published():
    told = re.search(r"SHA-256: `(\w+)`", (ECHARTS.parent.parent / "README.md").read_text())

    assert hashlib.sha256(ECHARTS.read_bytes()).hexdigest() == told[1]
    assert {"LICENSE", "NOTICE", "LICENSE-d3", "LICENSE-zrender"} <= {path.name for path in ECHARTS.parent.iterdir()}


def test_nothing_in_the_numbers_ends_their_script():
    coded = report.embedded({"text": HOSTILE, "more": "&lt; \u2029 ]]>"})

    assert not set("<>&\u2028\u2029") & set(coded)
    assert json.loads(coded)["text"] == HOSTILE


def test_questions_in_the_order_in_which_they_are_asked(built):
    asked = re.findall(r'<h2 id="(\w+)">', built.html.read_text())

    assert asked == ["trust", "fast", "where", "clocks", "when", "spread", "worst", "failed", "how"]


def test_headlines_have_their_intervals_and_their_slo(built):
    html, summary = built.html.read_text(), built.summary
    ends = summary["intervals"]["ttft"]["p50"]

    assert f"95 %: {ends['low'] * 1e3:,.1f} .. {ends['high'] * 1e3:,.1f}" in html
    assert "✓ within the SLO&#39;s 250 ms" in html
    assert "A reader at 5 words/s" in html
    assert summary["stutter"]["answers"] == 40


@needs_browser
def test_every_chart_is_drawn_and_no_text_of_a_server_is_code(built, page):
    page.open(built.html)

    assert page.problems == []
    assert charts_of(page) == [
        *[[kind, True] for kind, count in (("waterfall", 1), ("violin", 4), ("timeline", 1), ("ecdf", 4), ("answer", 1))
          for _ in range(count)],
    ]  # fmt: skip
    assert page.ask("window.hacked") is None
    assert "</script><script>window.hacked" in page.ask("document.body.innerText")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(built, page, width, dark):
    page.open(built.html, width, dark=dark)

    assert page.ask("document.documentElement.scrollWidth") <= width
    ink, paper = page.ask(
        "(s => [s.color, s.backgroundColor].map(c => c.match(/\\d+/g).map(Number)[0]))(getComputedStyle(document.body))"
    )
    assert (ink > paper) == dark
    texts = page.ask("[...document.querySelectorAll('.plot svg text')].map(t => t.getAttribute('fill'))")
    assert ("#ececf0" in texts) == dark  # the charts follow


@needs_browser
def test_the_worst_are_sorted_and_shown_by_keyboard(built, page):
    page.open(built.html)
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => +r.cells[1].dataset.value)"

    page.ask("document.querySelectorAll('table.sortable th button')[1].focus()")
    page.press("Enter", 13)
    falling = page.ask(column)
    page.press("Enter", 13)

    assert falling == sorted(falling, reverse=True)
    assert page.ask(column) == sorted(falling)
    assert page.ask("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    assert max(falling) == pytest.approx(built.summary["figures"]["ttft"]["max"])
    last = built.summary["worst"][-1]["request_id"]
    page.ask(f"document.querySelector('button[data-request=\"0/{last}\"]').focus()")
    page.press("Enter", 13)
    assert page.ask("document.querySelector('figure[data-chart=answer] figcaption b').textContent") == last


@needs_browser
def test_arrow_keys_move_the_pointer_and_plus_zooms(built, page):
    page.open(built.html)
    page.ask("document.querySelector('figure[data-chart=timeline] .plot').focus()")
    shown = "[...document.querySelectorAll('figure[data-chart=timeline] text')].map(t => t.textContent).join('|')"
    before = page.ask(shown)
    assert "client, by arrival: " not in before

    page.press("ArrowRight", 39)
    page.wait(f"/in flight, client \\(mean\\): [\\d.]+/.test({shown})")
    page.press("Escape", 27)
    page.wait(f"!/in flight, client \\(mean\\): [\\d.]+/.test({shown})")
    page.wait(f"{shown} === {json.dumps(before)}")
    page.press("+", 187)
    page.wait(f"{shown} !== {json.dumps(before)}")


@needs_browser
def test_a_curve_can_be_hidden(built, page):
    page.open(built.html)
    first = "document.querySelector('figure[data-chart=ecdf]')"
    curves = f"{first}.querySelectorAll('.plot svg path[stroke-width=\"2\"]').length"
    before = page.ask(curves)
    page.ask("document.querySelector('figure[data-chart=ecdf] .legend button').click()")

    assert before == 2
    assert page.ask(curves) == 1
    assert page.ask("document.querySelector('figure[data-chart=ecdf] .legend button').ariaPressed") == "false"


@needs_browser
def test_every_chart_can_be_saved_for_a_paper(built, page, tmp_path):
    page.open(built.html, dark=True)
    count = page.ask("+document.documentElement.dataset.charts")

    for at in range(count):
        svg = ET.fromstring(page.ask(f"twoclocksPicture({at}, 'SVG')"))  # noqa: S314, made by our own page
        texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert svg.get("width") == "960"
        assert page.ask(f"document.querySelectorAll('figure[data-chart]')[{at}].dataset.title") in texts
        assert "#ececf0" not in ET.tostring(svg, encoding="unicode")  # light, whatever the page is
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.ask("document.querySelectorAll('figure[data-chart=timeline] .tools button')[1].click()")
    deadline = time.monotonic() + PATIENCE_S
    while not (saved := list(tmp_path.glob("*-timeline.png"))):
        assert time.monotonic() < deadline, list(tmp_path.iterdir())
        time.sleep(0.05)
    assert imread(saved[0]).shape[1] == 3 * 960


NUMBERS = r"""[...document.querySelectorAll('figure[data-chart={}]')].map((one) =>
  [...one.querySelectorAll('.plot svg text')].map((one) => one.textContent).filter((one) => /^[\d,.]+$/.test(one)))"""


@needs_browser
def test_axes_have_numbers_and_round_ones(built, page, tmp_path):
    wide = run_of_ttfts(tmp_path / "wide", np.geomspace(0.06, 1.8, 40))  # not two powers of ten
    report.build(wide)
    page.open(wide / "report.html")
    of_curves = page.ask(NUMBERS.format("ecdf"))
    page.open(built.html)
    of_violins = page.ask(NUMBERS.format("violin"))

    assert min(map(len, of_curves)) >= 3, of_curves
    assert not [text for texts in of_violins for text in texts if re.search(r"\.\d{3}", text)]


@needs_browser
def test_runs_beside_each_other(tmp_path, page):
    for name, slow in (("quick", 1.0), ("slow", 2.0)):
        make_run(tmp_path / name, requests=30, slow=slow)
    made = compare.compare([tmp_path / "quick", tmp_path / "slow"])
    page.open(made.html, 400)

    kinds = [kind for kind, drawn in charts_of(page) if drawn]
    assert page.problems == []
    assert kinds == ["waterfall"] * 2 + ["violin"] * 4 + ["timeline"] * 2 + ["ecdf"] * 4 + ["answer"]
    legend = page.ask("document.querySelector('figure[data-chart=violin] .legend').innerText")
    assert [word in legend for word in ("quick, client", "quick, server", "slow, client", "slow, server")] == [True] * 4
    assert page.ask("document.documentElement.scrollWidth") <= 400


@needs_browser
@pytest.mark.parametrize("requests", [0, 1, 2])
def test_a_run_of_few_or_no_requests_has_a_page(tmp_path, page, requests):
    one = {"chunk_us": [100_000, 20_000], "chunk_kinds": [("content", 2)], "output_tokens": 2}
    made = [record(f"{i:032x}", sent_at=float(i), ended_at=i + 0.2, **one) for i in range(requests)]
    folder = write_folder(tmp_path / "r", made, status="running", window={"started_at": None, "ended_at": None})
    page.open(report.build(folder).html)

    assert page.problems == []
    assert page.ask("document.querySelector('.notice').innerText").startswith("Partial")


def test_the_size_of_the_numbers_does_not_follow_that_of_a_run(tmp_path):
    sizes = []
    for requests in (100, 1000):
        make_run(tmp_path / str(requests), requests=requests, users=40)
        run = twoclocks.load_run(tmp_path / str(requests))
        sizes.append(len(report.embedded(charts([run], [report.complete(run)]))))

    assert sizes[1] < sizes[0] + 100_000
