"""OTLP metrics: the families that Prometheus is shown -> what OpenTelemetry's own exporter sends.

Needs opentelemetry-sdk and an exporter (pip install 'twoclocks[otel]'), as Locust's --otel does; where to, how often
and by which protocol say the same variables, OTEL_EXPORTER_OTLP_... and OTEL_METRIC_EXPORT_INTERVAL. Names are written
as OpenTelemetry has them, without unit: twoclocks.ttft in s becomes twoclocks_ttft_seconds again in Prometheus.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData
    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

EXPORT_MS = 10_000


def is_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Locust's --otel sends metrics as OTLP: it does unless OTEL_METRICS_EXPORTER names others."""
    return "otlp" in {name.strip().lower() for name in environ.get("OTEL_METRICS_EXPORTER", "otlp").split(",")}


def is_grpc(environ: Mapping[str, str] = os.environ) -> bool:
    """As Locust reads it."""
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    )
    return protocol.strip().lower() == "grpc"


def missing_package(environ: Mapping[str, str] = os.environ) -> str | None:
    """What is not installed; None if all is there."""
    kind = "grpc" if is_grpc(environ) else "http"
    for package, module in (
        ("opentelemetry-sdk", "opentelemetry.sdk"),
        (f"opentelemetry-exporter-otlp-proto-{kind}", f"opentelemetry.exporter.otlp.proto.{kind}"),
    ):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of a parent
            found = None
        if found is None:
            return package
    return None


def interval_s(environ: Mapping[str, str] = os.environ) -> float:
    """Between two messages."""
    try:
        return max(100.0, float(environ.get("OTEL_METRIC_EXPORT_INTERVAL", "60000"))) / 1e3
    except ValueError:
        return 60.0


class Pusher:
    """Sends what it is given. Not safe for several threads."""

    def __init__(self, began_ns: int) -> None:
        self.began_ns = began_ns  # when counting began, ns of the wall clock
        if is_grpc():
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # type: ignore[assignment, unused-ignore]
        self._exporter = OTLPMetricExporter()

    def push(self, families: "Iterable[Metric]", now_ns: int) -> bool:
        """Whether it was taken."""
        data = metrics_data(families, self.began_ns, now_ns)
        return self._exporter.export(data, timeout_millis=EXPORT_MS).name == "SUCCESS"

    def close(self) -> None:
        """Nothing more will be sent."""
        self._exporter.shutdown()


def metrics_data(families: "Iterable[Metric]", began_ns: int, now_ns: int) -> "MetricsData":
    """Cumulative, as Prometheus has it; what names the run becomes the resource's attributes."""
    from opentelemetry.sdk.metrics import export
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    attributes = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "twoclocks")}
    metrics: list[Any] = []
    cumulative = export.AggregationTemporality.CUMULATIVE
    for family in families:
        name = f"twoclocks.{family.name.removeprefix('twoclocks_').removesuffix('_seconds')}"
        unit = "s" if family.name.endswith("_seconds") else "1"
        data: Any
        if family.type == "info":
            attributes |= {f"twoclocks.{key}": text for key, text in family.samples[0].labels.items()}
            continue
        if family.type == "histogram":
            data = export.Histogram(
                [_point(family.samples, began_ns, now_ns)], export.AggregationTemporality.CUMULATIVE
            )
        else:
            is_counter = family.type == "counter"
            points = [
                export.NumberDataPoint(sample.labels, began_ns if is_counter else 0, now_ns, float(sample.value))
                for sample in family.samples
            ]
            data = export.Sum(points, cumulative, is_monotonic=True) if is_counter else export.Gauge(points)
        metrics.append(export.Metric(name, family.documentation, unit, data))
    scope = export.ScopeMetrics(InstrumentationScope("twoclocks"), metrics, "")
    return export.MetricsData([export.ResourceMetrics(Resource.create(attributes), [scope], "")])


def _point(samples: "Iterable[Sample]", began_ns: int, now_ns: int) -> Any:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    buckets = [(sample.labels["le"], sample.value) for sample in samples if sample.name.endswith("_bucket")]
    total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
    up_to = [0, *(int(count) for _, count in buckets)]
    return HistogramDataPoint(
        attributes={},
        start_time_unix_nano=began_ns,
        time_unix_nano=now_ns,
        count=up_to[-1],
        sum=total,
        bucket_counts=[later - earlier for earlier, later in pairwise(up_to)],
        explicit_bounds=[float(bound) for bound, _ in buckets[:-1]],
        min=None,  # type: ignore[arg-type, unused-ignore]  # not known, and left out of the message
        max=None,  # type: ignore[arg-type, unused-ignore]
    )
