"""The Grafana dashboard's queries, asked of a real Prometheus that scrapes a run on a server of known times."""

import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from locust_runs import ROOT, free_port, only_run, read, run
from real_prometheus import prometheus_binary, running_prometheus

from twoclocks.load import load_run
from twoclocks.summary import summarise
from twoclocks.totals import BOUNDS

DEPLOY, DATA = ROOT / "deploy", ROOT / "tests" / "data"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "twoclocks.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
TTFT_S, TPOT_S = 0.12, 0.025  # each well inside a bucket


class GrowingPage(BaseHTTPRequestHandler):
    """The /metrics of a vLLM before and, from the third scrape on, after some load."""

    scrapes = 0

    def do_GET(self):
        type(self).scrapes += 1
        page = (DATA / f"vllm_0.33_metrics_t{int(self.scrapes > 2)}.prom").read_bytes()
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


def scrape_config(client: int, server: int) -> dict:
    """deploy/prometheus/prometheus.yml with these ports, and a shorter interval."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    for job in config["scrape_configs"]:
        port = {"twoclocks": client, "server": server}[job["job_name"]]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    return config


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A run of an open loop that a real Prometheus has scraped: its folder, what the server sent, and how to ask."""
    prometheus_binary()  # skips
    folder, port = tmp_path_factory.mktemp("scraped"), free_port()
    pages = ThreadingHTTPServer(("127.0.0.1", 0), GrowingPage)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(scrape_config(port, pages.server_port)))
    command = [sys.executable, "-m", "twoclocks.schedule_server", "--ttft-ms", str(TTFT_S * 1e3)]
    command += ["--tpot-ms", str(TPOT_S * 1e3), "--log", folder / "sent.npz", "--until-eof"]
    settings = ["target.server=other", "workload.max_tokens=12", "load.shape=rate", "load.rate=10", "load.duration_s=5"]
    settings += ["slo.ttft_ms=10000", f"export.prometheus_port={port}"]
    with running_prometheus(folder / "prometheus.yml", folder / "data") as url, httpx.Client(timeout=20) as client:
        began = time.time()
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            target = json.loads(server.stdout.readline())["url"]
            words = (word for one in (f"target.url={target}", *settings) for word in ("--set", one))
            code, output = run(folder / "output", "--no-report", *words)
            server.communicate()
        assert code == 0, output

        def ask(kind: str, **words) -> list:
            answer = client.get(f"{url}/api/v1/{kind}", params=words)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"]["result"]

        made = load_run(only_run(folder / "output"))
        yield SimpleNamespace(ask=ask, began=began, ended=time.time(), folder=folder, run=made)
    pages.shutdown()
    pages.server_close()


def filled(query: str) -> str:
    """As Grafana sends it, with both variables at All."""
    made = query.replace("$__rate_interval", "4s").replace("$client", ".*").replace("$server", ".*")
    assert "$" not in made
    return made


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_brings_data(scraped, query):
    rows = scraped.ask("query_range", query=filled(query), start=scraped.began, end=scraped.ended, step="500ms")
    values = [float(value) for row in rows for _, value in row["values"]]

    assert np.isfinite(values).any()


def at_the_end(scraped, query: str) -> float:
    (row,) = scraped.ask("query", query=query, time=scraped.ended)
    return float(row["value"][1])


def bucket(value: float) -> tuple[float, float]:
    above = int(np.searchsorted(BOUNDS, value))
    return BOUNDS[above - 1], BOUNDS[above]


def sent(scraped) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and TPOT of the measured requests as the server's own log has them, seconds."""
    measured = {record.request_id for record in read(scraped.folder / "output")[0] if record.phase == "measure"}
    with np.load(scraped.folder / "sent.npz") as log:
        ends = np.cumsum(log["writes"])
        chosen = np.isin(log["request_id"], sorted(measured))
        first, last = log["after_ns"][ends - log["writes"]], log["after_ns"][ends - 1]
        ttft, tpot = (first - log["arrived_ns"]) / 1e9, (last - first) / 1e9 / (log["writes"] - 1)
    assert chosen.sum() == len(measured) > 20
    return ttft[chosen], tpot[chosen]


@pytest.mark.parametrize("name", ["ttft", "tpot", "itl", "e2e"])
@pytest.mark.parametrize("q", [0.5, 0.95])
def test_percentiles_lie_in_the_bucket_of_the_raw_records_own(scraped, name, q):
    values = scraped.run.gaps.seconds if name == "itl" else scraped.run.ok[name].to_numpy()
    low, high = bucket(float(np.quantile(values, q, method="inverted_cdf")))
    series = f"last_over_time(twoclocks_{name}_seconds_bucket[5m])"

    assert low <= at_the_end(scraped, f"histogram_quantile({q}, sum by (le) ({series}))") <= high


@pytest.mark.parametrize(("name", "planted"), [("ttft", TTFT_S), ("tpot", TPOT_S)])
def test_percentiles_agree_with_what_the_server_sent(scraped, name, planted):
    truth = float(np.median(dict(zip(("ttft", "tpot"), sent(scraped), strict=True))[name]))
    low, high = bucket(truth)
    series = f"last_over_time(twoclocks_{name}_seconds_bucket[5m])"
    shown = at_the_end(scraped, f"histogram_quantile(0.5, sum by (le) ({series}))")

    assert truth >= planted * 0.99  # the server may be late, and never early
    assert abs(shown - truth) <= high - low


def test_the_last_scrape_holds_what_the_summary_says(scraped):
    figures = summarise(scraped.run)["figures"]

    def last(series: str) -> float:
        return at_the_end(scraped, f"sum(last_over_time({series}[5m]))")

    assert last("twoclocks_run_ended") == 1
    assert last('twoclocks_requests_total{phase="measure"}') == figures["requests"]["value"] > 20
    assert last("twoclocks_ttft_seconds_count") == figures["ttft"]["n"]
    assert last("twoclocks_itl_seconds_count") == figures["itl"]["n"]
    assert last("twoclocks_output_tokens_total") == figures["output_tokens"]["value"]
    assert last("twoclocks_send_lateness_seconds_count") == figures["send_lateness"]["n"]
    assert last("twoclocks_not_sent_total") == figures["not_sent"]["value"]


def test_promtool_accepts_the_configuration():
    promtool = prometheus_binary().with_name("promtool")
    if not promtool.exists():
        pytest.skip("no promtool beside the prometheus binary")
    done = subprocess.run([promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml"], capture_output=True)

    assert done.returncode == 0, done.stderr


def test_panels_are_whole_and_do_not_overlap():
    cells = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells[panel["id"]] = {
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24

    assert not any(cells[one] & cells[other] for one, other in combinations(cells, 2))
    assert len(cells) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in PANELS)


def test_client_and_server_stand_side_by_side_and_say_what_they_are():
    sides = {panel["title"]: panel for panel in PANELS if panel["gridPos"]["w"] == 12}
    for word in ("TTFT", "ITL", "TPOT", "E2E"):
        client, server = sides[f"{word}, client"], sides[f"{word}, vLLM"]

        assert client["gridPos"]["y"] == server["gridPos"]["y"]
        assert all("twoclocks_" in target["expr"] for target in client["targets"])
        assert all("vllm:" in target["expr"] for target in server["targets"])


def test_provisioning_and_dashboard_name_the_same_things():
    places = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((places / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((places / "dashboards" / "twoclocks.yml").read_text())["providers"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())

    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert provider["type"] == "file"
    used = {variable for query in map(str, DASHBOARD["panels"]) for variable in re.findall(r"\$\{?(\w+)", query)}
    assert used - {"__rate_interval"} == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
