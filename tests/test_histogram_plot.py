import json

import numpy as np
import pytest
from make_run import make_run
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch
from test_plots import blue, colours, orange

import twoclocks
from twoclocks import histogram_plot
from twoclocks.buckets import Distribution, binned


def with_pages_of(folder, names):
    """The run in a folder, its scraped pages cut down to the families whose names begin so."""
    path = folder / "server_samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["samples"] = [sample for sample in line["samples"] if sample[0].startswith(tuple(names))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return twoclocks.load_run(folder)


@pytest.mark.parametrize(("names", "rows"), [(["vllm:time_to"], 1), (["vllm:time_to", "vllm:inter"], 1), (["vllm"], 3)])
def test_a_panel_for_each_histogram_of_the_server(tmp_path, names, rows):
    make_run(tmp_path / "r", requests=40)
    run = with_pages_of(tmp_path / "r", names)

    drawn = histogram_plot.server_histograms(run, tmp_path / "h.png")

    pixels, found = imread(tmp_path / "h.png"), colours(tmp_path / "h.png")
    assert drawn
    assert pixels.shape[0] == pytest.approx((4.2 * rows + 0.8) * 110, abs=2)
    assert any(map(blue, found))
    assert any(map(orange, found))


def test_no_figure_for_a_server_without_histograms(tmp_path):
    make_run(tmp_path / "r", server="silent")

    assert not histogram_plot.server_histograms(twoclocks.load_run(tmp_path / "r"), tmp_path / "h.png")
    assert not (tmp_path / "h.png").exists()


def panel(gained, values):
    axes = Figure().subplots()
    histogram_plot._histogram(axes, "TTFT", gained, values, "as it came", footnote_width=100)
    return axes, " ".join(text.get_text() for text in axes.texts)


def test_step_densities_of_both_sides_enclose_what_lies_in_the_panel():
    values = np.random.default_rng(1).gamma(20, 0.01, 5000)
    bounds = np.append(np.arange(0.02, 0.6, 0.02), np.inf)
    gained = Distribution(5000, float(values.sum()), bounds, binned(values, bounds), ("x",), "start -> stop")

    axes, text = panel(gained, values + 0.005)

    areas = [
        float((steps.values * np.diff(steps.edges)).sum() * 1e3)
        for steps in (patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch))
    ]
    assert areas == pytest.approx([100, 100, 100], abs=1)  # per cent: the server's fill and line, the client's line
    assert "start -> stop (x)" in text
    assert "n = 5,000" in text


@pytest.mark.parametrize(("mean", "side"), [(0.06, "left"), (0.55, "right")])
def test_the_means_texts_lead_into_the_wider_half_each_on_its_own_line(mean, side):
    bounds = np.append(np.linspace(0.05, 0.6, 12), np.inf)
    counts = np.append(np.full(12, 10.0), 0.0)
    gained = Distribution(120, 120 * mean, bounds, counts, ("x",), "start -> stop")

    axes, _ = panel(gained, np.full(2000, mean + 0.005))

    means = {text.get_text().split()[0]: text for text in axes.texts if " mean " in text.get_text()}
    assert {text.get_ha() for text in means.values()} == {side}
    higher = "server" if side == "left" else "client"  # its text passes over the other's line
    assert max(means, key=lambda who: means[who].xy[1]) == higher


def test_intervals_of_a_restarted_server_say_so():
    gained = Distribution(
        10, 1.0, np.array([1.0, np.inf]), np.array([4.0, 6.0]), ("x",), "start -> stop", since_restart=True,
        caveats=("the server restarted",),
    )  # fmt: skip

    axes, text = panel(gained, np.array([]))

    assert axes.get_title(loc="left") == "TTFT, since the server's restart"
    assert "The server restarted." in text
    assert "> 1,000 ▶" in text
    assert "only 2 buckets hold anything" in text


def test_a_wide_spread_has_a_logarithmic_axis_and_names_what_lies_beyond():
    values = np.geomspace(0.002, 9.0, 1000)
    bounds = np.array([0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 8.0, np.inf])
    gained = Distribution(1000, float(values.sum()), bounds, binned(values, bounds), ("x",), "start -> stop")

    axes, text = panel(gained, values)

    assert axes.get_xscale() == "log"
    assert "beyond 8,000 ms" in text
    assert "server 1.4 %" in text


@pytest.mark.parametrize("total", [float("nan"), 0.0, -5.0])
def test_a_histogram_without_a_possible_sum_is_drawn_too(tmp_path, total):
    figure = Figure()
    gained = Distribution(3, total, np.array([]), np.array([]), ("x",), "start -> stop")

    histogram_plot._histogram(
        figure.subplots(), "TTFT", gained, np.array([]), "not seen from outside", footnote_width=100
    )
    figure.savefig(tmp_path / "h.png")

    assert imread(tmp_path / "h.png").size > 0
