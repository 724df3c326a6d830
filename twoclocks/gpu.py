"""GPU: what the server's GPUs do while the load runs -> rows of gpu_samples.jsonl.

On this machine NVML says it (nvidia-ml-py, imported only when asked), elsewhere a DCGM exporter does, over HTTP. A
sampler gives one row a GPU; a value that a GPU does not tell is None. Where there is no GPU a line says so.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx

from twoclocks.fetch import fetch_page, open_client
from twoclocks.page import parse_page

Row = dict[str, Any]

MAX_PAGE_BYTES = 4 * 1024 * 1024
PAGE_S = 2.0  # for a whole page, however slowly it comes

REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Bits of NVML's clocks event reasons (nvml.h), which DCGM passes on as they are."""


class GpuSampler(Protocol):
    """Reads the GPUs of one machine or of several."""

    def sample(self, at: float) -> list[Row]:
        """One row a GPU, stamped with ``at`` (seconds on the run's clock).

        at, source (nvml | dcgm), host, gpu (index), uuid, name, utilisation (0..1), memory_used_bytes,
        memory_total_bytes, power_w, energy_j (since some time before), sm_clock_hz, temperature_c, throttle (names of
        REASONS); None where not told. A source that could not be read gives one row with at, source, host and error.
        """

    def close(self) -> None:
        """Nothing more will be read."""


def open_gpu(setting: str | list[str]) -> tuple[GpuSampler | None, str | None]:
    """(what reads the GPUs, one line on what is missing) for collect.gpu: auto, none, or addresses of DCGM exporters.

    The line is None where nothing is missing and where ``none`` was asked for.
    """
    if setting == "none":
        return None, None
    if setting == "auto":
        return _open_nvml()
    return _open_dcgm([setting] if isinstance(setting, str) else setting)


def throttle_reasons(bits: int) -> list[str]:
    """The names of the bits that are set; one without a name as ``bit_0x...``."""
    return [REASONS.get(1 << n, f"bit_0x{1 << n:x}") for n in range(bits.bit_length()) if bits >> n & 1]


class _Nvml:
    """NVML's own words; ``nvml`` is the module pynvml. Utilisation is its mean over the last 1/6 to 1 s."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.gpus = []  # what never changes of each: index, handle, uuid, name
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = self._told(nvml.nvmlDeviceGetUUID, handle)
            self.gpus.append((index, handle, _text(uuid), _text(self._told(nvml.nvmlDeviceGetName, handle))))

    def sample(self, at: float) -> list[Row]:
        return [
            {"at": at, "source": "nvml", "host": None, "gpu": index, "uuid": uuid, "name": name, **self._values(handle)}
            for index, handle, uuid, name in self.gpus
        ]

    def close(self) -> None:
        self._told(self.nvml.nvmlShutdown)

    def _values(self, handle: Any) -> Row:
        nvml, told = self.nvml, self._told
        utilisation = told(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = told(nvml.nvmlDeviceGetMemoryInfo, handle)
        reasons = told(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)  # driver 535 and newer
        if reasons is None:
            reasons = told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return {
            "utilisation": None if utilisation is None else utilisation.gpu / 100,  # per cent
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_total_bytes": None if memory is None else memory.total,
            "power_w": _scaled(told(nvml.nvmlDeviceGetPowerUsage, handle), 1e-3),  # mW
            "energy_j": _scaled(told(nvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3),  # mJ; Volta and newer
            "sm_clock_hz": _scaled(told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM), 1e6),  # MHz
            "temperature_c": told(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "throttle": None if reasons is None else throttle_reasons(reasons),
        }

    def _told(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What NVML answers; None where this GPU or this driver does not tell it, or the GPU is lost."""
        try:
            return function(*arguments)
        except self.nvml.NVMLError:
            return None


class _Dcgm:
    """The /metrics of DCGM exporters, one after another."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self.clients: dict[str, httpx.Client] = {}

    def sample(self, at: float) -> list[Row]:
        rows: list[Row] = []
        for url in self.urls:
            stamp = {"at": at, "source": "dcgm", "host": _host(url)}
            try:
                if url not in self.clients:
                    self.clients[url] = open_client(url, timeout=PAGE_S)
                page = fetch_page(self.clients[url], url, max_bytes=MAX_PAGE_BYTES, seconds=PAGE_S)
                rows += [stamp | row for row in dcgm_rows(page)]
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                rows.append(stamp | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return rows

    def close(self) -> None:
        for client in self.clients.values():
            client.close()


_FIELDS: dict[str, tuple[str, float]] = {
    "DCGM_FI_DEV_GPU_UTIL": ("utilisation", 0.01),
    "DCGM_FI_DEV_FB_USED": ("memory_used_bytes", 2.0**20),
    "DCGM_FI_DEV_FB_FREE": ("memory_free_bytes", 2.0**20),
    "DCGM_FI_DEV_FB_RESERVED": ("memory_reserved_bytes", 2.0**20),
    "DCGM_FI_DEV_FB_TOTAL": ("memory_total_bytes", 2.0**20),
    "DCGM_FI_DEV_POWER_USAGE": ("power_w", 1.0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_j", 1e-3),
    "DCGM_FI_DEV_SM_CLOCK": ("sm_clock_hz", 1e6),
    "DCGM_FI_DEV_GPU_TEMP": ("temperature_c", 1.0),
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": ("throttle", 1.0),
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": ("throttle", 1.0),  # its older name
}
"""DCGM field -> (our name, our unit in its unit: %, MiB, W, mJ, MHz, degrees, bits)."""

_BLANK = 2.0**47
"""From here on DCGM's number says that there is none: blanks begin at 2**47 (floating point) and near 2**63 (int64)."""


def dcgm_rows(page: str) -> list[Row]:
    """One row a GPU of a DCGM exporter's page. MIG instances are taken as their GPU: of several values the largest.

    Raises ValueError for what is no exposition, or holds no field of _FIELDS.
    """
    gpus: dict[str, dict[str, float]] = {}
    labels: dict[str, dict[str, str]] = {}
    for (name, label_pairs), value in parse_page(page)[0].items():
        # the parser gives each counter the ending _total, and the exporter types the energy as one
        field, scale = _FIELDS.get(name.removesuffix("_total"), ("", 0.0))
        told = dict(label_pairs)
        key = told.get("UUID") or told.get("gpu")
        if not field or not key or not 0 <= value < _BLANK:
            continue
        values = gpus.setdefault(key, {})
        labels.setdefault(key, told)
        values[field] = max(values.get(field, 0.0), value * scale)
    if not gpus:
        raise ValueError("no DCGM field of a GPU in this page; is it a DCGM exporter's?")
    return [_dcgm_row(labels[key], values) for key, values in gpus.items()]


def _dcgm_row(labels: dict[str, str], values: dict[str, float]) -> Row:
    index = labels.get("gpu", "")
    told: Row = dict.fromkeys(
        ("utilisation", "memory_used_bytes", "memory_total_bytes", "power_w", "energy_j", "sm_clock_hz")
    )
    told |= {name: values[name] for name in told if name in values}
    parts = [values.get(f"memory_{part}_bytes") for part in ("used", "free")]
    if told["memory_total_bytes"] is None and None not in parts:
        told["memory_total_bytes"] = sum(part or 0.0 for part in parts) + values.get("memory_reserved_bytes", 0.0)
    host = labels.get("Hostname")
    return {
        **({"host": host} if host else {}),
        "gpu": int(index) if index.isdecimal() and len(index) < 6 else None,
        "uuid": labels.get("UUID"),
        "name": labels.get("modelName"),
        **told,
        "temperature_c": values.get("temperature_c"),
        "throttle": throttle_reasons(int(values["throttle"])) if "throttle" in values else None,
    }


def _open_nvml() -> tuple[GpuSampler | None, str | None]:
    elsewhere = "GPU figures are absent (collect.gpu: address of a DCGM exporter reads them elsewhere)"
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return None, f"nvidia-ml-py is not installed; {elsewhere}"
    try:
        pynvml.nvmlInit()
        sampler = _Nvml(pynvml)
    except pynvml.NVMLError_LibraryNotFound:
        return None, f"no NVIDIA driver on this machine; {elsewhere}"
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}; {elsewhere}"
    if not sampler.gpus:
        sampler.close()
        return None, f"no NVIDIA GPU on this machine; {elsewhere}"
    return sampler, None


def _open_dcgm(urls: Sequence[str]) -> tuple[GpuSampler | None, str | None]:
    sampler = _Dcgm(urls)
    rows = sampler.sample(0.0)
    failed = [f"{row['host']}: {row['error']}" for row in rows if "error" in row]
    if not failed:
        return sampler, None
    what = f"{len(failed)} of {len(urls)} DCGM exporters could not be read ({failed[0]})"
    if len(failed) < len(urls):
        return sampler, f"{what}; its GPUs are absent while it cannot be"
    sampler.close()
    return (
        None,
        f"{what}; GPU figures are absent (collect.gpu: http://HOST:9400/metrics is an exporter's usual address)",
    )


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * unit


def _host(url: str) -> str:
    """Host and port of an address, whatever is wrong with it; without a password."""
    return url.partition("//")[2].partition("/")[0].rpartition("@")[2]


def _text(value: Any) -> str | None:
    """Names are bytes in older releases of nvidia-ml-py."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
