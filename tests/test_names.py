"""A quantity has one name and one unit wherever it is told: terminal, summary.json, page, study, exporter."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from make_run import make_run
from make_study import cell, make_cell, make_study

from twoclocks import families, plots, report, study_report, wording
from twoclocks.load import load_run
from twoclocks.summary import summarise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "run"
    make_run(folder, requests=60)
    run = load_run(folder)
    return run, summarise(run)["figures"]


def test_the_terminal_has_a_label_for_each_distribution_and_no_others(summary):
    _, figures = summary
    told = {name for name, figure in figures.items() if "p50" in figure}

    assert told - set(wording.LABELS) <= {"first_event", "e2e_per_token"}  # kept in summary.json alone
    assert len(set(wording.LABELS.values())) == len(wording.LABELS)


def test_violins_are_titled_as_the_terminals_rows(summary):
    run, _ = summary
    assert [panel.title for panel in plots.violin_panels([run])] == [
        wording.LABELS[name] for name in ("ttft", "tpot", "e2e", "itl")
    ]


def test_a_study_calls_the_figures_of_a_run_as_its_summary_does(summary, tmp_path):
    _, figures = summary
    make_cell(tmp_path / "01-A", requests=60)
    (arm,) = study_report.build(make_study(tmp_path, [cell(1, "A")])).summary["arms"]
    shared = {
        name: told for name, told in arm["figures"].items()
        if not re.match(r"requests\.|server_|memory\.|kv_", name)  # what a run's summary keeps in tables of their own
    }  # fmt: skip

    assert len(shared) > 15
    for name, told in shared.items():
        metric, _, statistic = name.partition(".")
        figure = figures[metric]
        assert told["unit"] == figure["unit"]
        if statistic:
            assert statistic in figure
            assert np.isfinite(told["value"])


def test_the_exporter_calls_them_as_summary_json_does(summary):
    _, figures = summary
    open_loop = {"send_lateness"}
    assert set(families.HISTOGRAMS) - {"loop_lag"} - open_loop <= {n for n, f in figures.items() if f["unit"] == "s"}
    assert open_loop <= set(wording.LABELS)
    assert {"output_tokens", "prompt_tokens"} <= set(families.COUNTERS) & set(figures)


def test_the_dashboard_asks_for_nothing_else():
    text = (ROOT / "deploy/grafana/dashboards/twoclocks.json").read_text()
    asked = set(re.findall(r"twoclocks_(\w+?)_seconds_bucket", text))
    panels = [panel for panel in json.loads(text)["panels"] if panel.get("targets")]

    assert asked <= set(families.HISTOGRAMS)
    for panel in panels:
        told = " ".join(target["expr"] for target in panel["targets"])
        if "_seconds_bucket" in told:
            assert panel["fieldConfig"]["defaults"]["unit"] == "s"


def test_the_pages_table_has_the_terminals_labels(summary):
    run, figures = summary
    html = report.build(run.path).html.read_text()
    for name in set(wording.LABELS) & set(figures):
        assert wording.LABELS[name] in html
