"""What a run sends as OTLP where Locust's --otel is on, against what Prometheus is shown of the same totals."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_server import FakeServer, plain_answer
from locust_runs import free_port, only_run, run
from make_run import record
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from twoclocks import otlp_metrics
from twoclocks.experiment import Experiment
from twoclocks.export import start_exporter
from twoclocks.families import families
from twoclocks.load import load_run
from twoclocks.otlp_metrics import interval_s, is_wanted, metrics_data, missing_package
from twoclocks.record import encode_record
from twoclocks.summary import summarise
from twoclocks.totals import BOUNDS, Meta, Totals, Window


class Collector:
    """Takes OTLP over HTTP and keeps the metrics messages of twoclocks."""

    def __init__(self) -> None:
        self.messages: list[ExportMetricsServiceRequest] = []
        keep = self.messages.append

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/metrics" and b"twoclocks" in body:
                    keep(ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_the_same_counts_under_names_without_units():
    two = {"chunk_us": [100_000, 20_000], "chunk_kinds": [("content", 2)], "output_tokens": 2}
    totals = Totals({}, is_open=False)
    totals.meta = Meta(window=Window(0.0, 10.0))
    totals.add_requests(encode_record(record(**two)) * 3 + encode_record(record(status="error", error_kind="http_500")))
    (resource,) = metrics_data(families(totals, {"run": "x"}, ended=False), 1, 2).resource_metrics
    metrics = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    (point,) = metrics["twoclocks.ttft"].data.data_points
    failed = {str(one.attributes["error_kind"]): one.value for one in metrics["twoclocks.requests"].data.data_points}

    assert (metrics["twoclocks.ttft"].unit, metrics["twoclocks.users"].unit) == ("s", "1")
    assert (point.count, point.sum, tuple(point.explicit_bounds)) == (3, pytest.approx(0.3), BOUNDS)
    assert [bound for bound, count in zip(BOUNDS, point.bucket_counts, strict=False) if count] == [
        min(bound for bound in BOUNDS if bound >= 0.1)
    ]
    assert len(point.bucket_counts) == len(BOUNDS) + 1
    assert failed == {"none": 3, "http_500": 1}
    assert resource.resource.attributes["twoclocks.run"] == "x"


def test_a_run_sends_its_totals_and_at_the_end_those_of_the_summary(tmp_path, monkeypatch):
    for name in ("TRACES", "LOGS"):  # Locust's own
        monkeypatch.setenv(f"OTEL_{name}_EXPORTER", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with FakeServer(lambda body: plain_answer(3, gap_s=0.01)) as server, Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        # a Prometheus that never comes is not waited for, or this would take a quarter of an hour
        settings = (f"export.prometheus_port={free_port()}", "export.linger_s=1000")
        words = ("-u", "2", "-r", "2", "-t", "2", "--no-report", "--otel")
        code, output = run(tmp_path, "-H", server.url, *words, *(w for one in settings for w in ("--set", one)))
    figures = summarise(load_run(only_run(tmp_path)))["figures"]
    (resource,) = collector.messages[-1].resource_metrics
    told = {metric.name: metric for metric in resource.scope_metrics[0].metrics}

    assert code == 0, output
    assert "Prometheus finds this run at http://127.0.0.1:" in output
    assert {attribute.key for attribute in resource.resource.attributes} >= {"service.name", "twoclocks.run"}
    for name in ("ttft", "itl", "tpot", "e2e"):
        (point,) = told[f"twoclocks.{name}"].histogram.data_points
        assert (point.count, sum(point.bucket_counts)) == (figures[name]["n"],) * 2
        assert point.sum == pytest.approx(figures[name]["n"] * figures[name]["mean"])
        assert not point.HasField("max")
    (tokens,) = told["twoclocks.output_tokens"].sum.data_points
    assert tokens.as_double == figures["output_tokens"]["value"]
    assert told["twoclocks.output_tokens"].sum.is_monotonic


def test_without_the_sdk_there_is_one_line_and_nothing_is_started(monkeypatch):
    monkeypatch.setattr(otlp_metrics.importlib.util, "find_spec", lambda name: None)
    notes: list[str] = []

    assert start_exporter(Experiment(), None, notes.append, otel=True) is None
    assert notes == [
        "--otel: no metrics are sent, as opentelemetry-sdk is not installed; pip install 'twoclocks[otel]'"
    ]


def test_the_variables_of_opentelemetry_say_what_is_sent():
    assert [is_wanted({}), is_wanted({"OTEL_METRICS_EXPORTER": "console"})] == [True, False]
    assert is_wanted({"OTEL_METRICS_EXPORTER": "console, OTLP"})
    assert [interval_s({"OTEL_METRIC_EXPORT_INTERVAL": text}) for text in ("500", "x", "1")] == [0.5, 60.0, 0.1]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(otlp_metrics.importlib.util, "find_spec", lambda name: None if "grpc" in name else name)

    assert missing_package({}) == "opentelemetry-exporter-otlp-proto-grpc"
    assert missing_package({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}) is None
