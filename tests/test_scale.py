"""docs/scale.md: the arithmetic of benchmarks/scale.py, its units against the measured ones, and its table."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "2026-11-21-2001-unit-costs.json"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

    return scale


def test_the_arithmetic_by_hand(scale):
    units = scale.Units(
        token_us=10, request_us=500, process_ms_per_s=0, process_mb=0, stream_bytes=10_000, kept_bytes=500,
        record_bytes=700, record_token_bytes=5, master_us=20, exporter_record_us=10, exporter_token_us=0.1,
    )  # fmt: skip
    chosen = scale.Chosen(load=0.5, event_bytes=300, packet_bytes=100, ports=20_000)
    made = scale.plan(100_000, 10, 100, units, chosen)

    assert asdict(made) == {
        "tokens_per_s": 1_000_000,
        "requests_per_s": 10_000,
        "cores": 15,  # 10 for tokens, 5 for requests
        "workers": 30,
        "streams_per_worker": pytest.approx(3333.333, abs=0.001),
        "memory_gb": pytest.approx(3.5),  # 100,000 x (10,000 + 50 x 500) bytes
        "down_gbit_s": pytest.approx(3.2),
        "up_gbit_s": pytest.approx(0.4),
        "addresses": 5,
        "records_mb_s": pytest.approx(12),
        "master_cores": pytest.approx(0.2),
        "exporter_cores": pytest.approx(0.2),
        "masters": 1,
        "disk_gb_per_h": pytest.approx(43.2),
    }


def test_idle_workers_cost_too(scale):
    units = scale.Units(token_us=10, request_us=0, process_ms_per_s=100, process_mb=1000)
    made = scale.plan(1000, 100, 100, units, scale.Chosen(load=0.5))

    assert made.workers == 3  # 1 core of tokens, 0.4 left of each worker's half
    assert made.cores == pytest.approx(1.3)


def test_the_units_are_the_measured_ones(scale):
    told, units = json.loads(MEASURED.read_text())["figures"], scale.Units()
    locust, exporter = told["units_s"]["locust"], told["units_s"]["exporter"]

    assert units.token_us == pytest.approx(locust["token"] * 1e6, rel=0.01)
    assert units.request_us == pytest.approx(locust["request"] * 1e6, rel=0.01)
    assert units.process_ms_per_s == pytest.approx(locust["second"] * 1e3, rel=0.01)
    assert units.process_mb == pytest.approx(told["process_mb"], rel=0.01)
    assert units.stream_bytes == pytest.approx(told["idle_stream_bytes"], rel=0.01)
    assert units.kept_bytes == pytest.approx(told["kept_bytes_per_token"], rel=0.01)
    assert units.record_token_bytes == pytest.approx(told["bytes_per_token"], rel=0.01)
    one = told["bytes_per_record"]["tokens_1"]
    assert units.record_bytes + units.record_token_bytes == pytest.approx(one, rel=0.01)
    assert units.master_us == pytest.approx(told["master_us_per_record"], rel=0.01)
    assert units.exporter_record_us == pytest.approx(exporter["request"] * 1e6, rel=0.01)
    assert units.exporter_token_us == pytest.approx(exporter["token"] * 1e6, rel=0.01)


def test_the_page_holds_what_is_printed(scale, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scale.py"])
    scale.main()

    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
