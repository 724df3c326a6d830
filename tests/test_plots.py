import numpy as np
import pytest
from make_run import make_run, record, write_folder
from matplotlib.image import imread

import twoclocks
from twoclocks import plots
from twoclocks.timeline import open_spans


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for server in ("vllm", "transformers", "silent"):
        make_run(root / server, server=server, requests=40)
    return {server: twoclocks.load_run(root / server) for server in ("vllm", "transformers", "silent")}


def colours(path):
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}


def blue(colour):
    return colour[2] > colour[0] + 60


def orange(colour):
    return colour[0] > colour[2] + 60


def test_both_sides_are_drawn(runs, tmp_path):
    plots.violins([runs["vllm"]], tmp_path / "v.png", "a $title$ with_marks")

    found = colours(tmp_path / "v.png")

    assert any(map(blue, found))
    assert any(map(orange, found))


def test_panels_say_where_the_server_tells_nothing(runs):
    panels = {
        panel.title.split(" (")[0]: panel
        for panel in plots.violin_panels([runs["vllm"], runs["transformers"], runs["silent"]])
    }

    servers = [server for _, server in panels["Time to first token"].pairs]

    assert [len(server.values) for server in servers] == [40, 0, 0]
    assert "no per-request figure" in servers[1].silence
    assert "its /metrics mean" in panels["Inter-token latency"].pairs[0][1].silence
    assert any("engine step ->" in note for note in panels["Inter-token latency"].footnotes)
    assert [len(server.values) for _, server in panels["Request duration"].pairs] == [40, 40, 0]


def test_one_half_violin_is_one_clocks(tmp_path):
    planted = make_run(tmp_path / "r", requests=40, spans=True)
    path = tmp_path / "r" / "server_requests.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:15]) + "\n")  # spans of 15 requests, the rest in-band

    panel = plots.violin_panels([twoclocks.load_run(tmp_path / "r")])[0]
    ((_, server),) = panel.pairs
    inside = np.array(planted.queue) + planted.prefill

    assert server.told_by == ("in-band", "vllm")
    assert server.left_out == 15
    assert sorted(server.values) == pytest.approx(sorted(inside[2:27]))
    assert any("Left out: 15 requests" in note for note in panel.footnotes)
    assert sum(note.startswith("Server (") for note in panel.footnotes) == 1


def test_many_runs_beside_each_other(runs, tmp_path):
    plots.violins(list(runs.values()), tmp_path / "v.png", "three")

    assert imread(tmp_path / "v.png").shape[0] > 2000


def test_timeline_with_and_without_a_talkative_server(runs, tmp_path):
    for name in ("vllm", "silent"):
        plots.timeline(runs[name], tmp_path / f"{name}.png")

    assert any(map(orange, colours(tmp_path / "vllm.png")))
    assert not any(map(orange, colours(tmp_path / "silent.png")))


def test_each_panel_of_the_timeline_says_what_it_shows(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, _: drawn.append(figure))

    plots.timeline(runs["vllm"], tmp_path / "t.png")

    labels = [axes.get_ylabel() for axes in drawn[0].axes]
    assert labels == ["requests", "Output tokens (tokens/s)", "TTFT (ms)", "KV cache used (%)"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_or_no_requests_are_drawn_too(tmp_path, count):
    made = [
        record(
            f"{i:032x}",
            chunk_us=[100_000 + i, 20_000],
            chunk_kinds=[("content", 2)],
            output_tokens=2,
            sent_at=float(i),
            ended_at=i + 0.2,
        )
        for i in range(count)
    ]
    run = twoclocks.load_run(write_folder(tmp_path / "r", made))

    plots.violins([run], tmp_path / "v.png", "few")
    plots.timeline(run, tmp_path / "t.png")

    assert imread(tmp_path / "v.png").size > 0
    assert imread(tmp_path / "t.png").size > 0


def test_a_long_tail_is_cut_and_a_wide_spread_is_logarithmic():
    body = np.linspace(0.5, 2.0, 1000)

    low, high, log = plots.limits([np.append(body, 50.0)])
    assert not log
    assert 2.0 < high < 3.0
    assert low == pytest.approx(0.0)

    low, high, _ = plots.limits([np.array([40.0, 41.0])])  # a narrow spread fills its panel
    assert (low, high) == pytest.approx((39.92, 41.08))

    assert plots.limits([np.geomspace(0.001, 10.0, 100)])[2]


def test_open_spans():
    times, count = open_spans(np.array([1.0, 2.0]), np.array([3.0, 2.0]))

    assert times.tolist() == [1, 2, 2, 3]
    assert count.tolist() == [1, 0, 1, 0]


def test_a_density_is_drawn_from_quantiles_of_many_values():
    values = np.random.default_rng(1).normal(10, 1, 50_000)

    grid, width = plots.density(values, log=False)

    assert grid[np.argmax(width)] == pytest.approx(10, abs=0.2)
    one_sigma = np.interp(11.0, grid, width)
    assert one_sigma == pytest.approx(np.exp(-0.5), abs=0.05)
