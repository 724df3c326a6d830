"""GPU figures without a GPU: an invented pynvml with NVML's documented units, and data/dcgm_exporter_4.prom, a page
written after dcgm-exporter's default counters (its field names, units, labels and blank values).
"""

import socket
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks import gpu as gpu_module
from twoclocks.gpu import dcgm_rows, open_gpu, throttle_reasons
from twoclocks.gpu_summary import DEFINITIONS, gpu_figures

PAGE = (Path(__file__).parent / "data" / "dcgm_exporter_4.prom").read_text()
KEYS = {
    *("at", "source", "host", "gpu", "uuid", "name", "utilisation", "memory_used_bytes", "memory_total_bytes"),
    *("power_w", "energy_j", "sm_clock_hz", "temperature_c", "throttle"),
}


# NVML


def nvml(gpus=1, *, missing=(), init=None):
    """A module with the functions of pynvml that are used, in NVML's units; those in ``missing`` are not supported."""
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def answer(name, value):
        def function(*arguments):
            if name in missing:
                raise NVMLError_NotSupported("Not Supported")
            return value(*arguments) if callable(value) else value

        setattr(module, name, function)

    def begin():
        if init:
            raise getattr(module, init)("Driver Not Loaded")

    module.NVMLError, module.NVMLError_LibraryNotFound = NVMLError, NVMLError_LibraryNotFound
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    answer("nvmlInit", begin)
    answer("nvmlShutdown", None)
    answer("nvmlDeviceGetCount", gpus)
    answer("nvmlDeviceGetHandleByIndex", lambda index: f"handle {index}")
    answer("nvmlDeviceGetUUID", lambda handle: f"GPU-{handle[-1]}")
    answer("nvmlDeviceGetName", b"NVIDIA H100")  # bytes in older releases
    answer("nvmlDeviceGetUtilizationRates", types.SimpleNamespace(gpu=87, memory=40))  # per cent
    answer("nvmlDeviceGetMemoryInfo", types.SimpleNamespace(total=80 * 2**30, used=70 * 2**30, free=10 * 2**30))
    answer("nvmlDeviceGetPowerUsage", 412_500)  # mW
    answer("nvmlDeviceGetTotalEnergyConsumption", 61_208_465_431)  # mJ
    answer("nvmlDeviceGetClockInfo", lambda handle, kind: {1: 1_980}[kind])  # MHz
    answer("nvmlDeviceGetTemperature", lambda handle, sensor: {0: 54}[sensor])
    answer("nvmlDeviceGetCurrentClocksEventReasons", 0x4 | 0x40)
    answer("nvmlDeviceGetCurrentClocksThrottleReasons", 0x8)
    return module


@pytest.fixture
def with_nvml(monkeypatch):
    def put(**settings):
        monkeypatch.setitem(sys.modules, "pynvml", nvml(**settings))
        return open_gpu("auto")

    return put


def test_nvml_rows_are_in_base_units(with_nvml):
    sampler, missing = with_nvml(gpus=2)

    rows = sampler.sample(3.5)

    assert missing is None
    assert [row["gpu"] for row in rows] == [0, 1]
    assert rows[1] == {
        "at": 3.5,
        "source": "nvml",
        "host": None,
        "gpu": 1,
        "uuid": "GPU-1",
        "name": "NVIDIA H100",
        "utilisation": 0.87,
        "memory_used_bytes": 70 * 2**30,
        "memory_total_bytes": 80 * 2**30,
        "power_w": pytest.approx(412.5),
        "energy_j": pytest.approx(61_208_465.431),
        "sm_clock_hz": pytest.approx(1.98e9),
        "temperature_c": 54,
        "throttle": ["sw_power_cap", "hw_thermal_slowdown"],
    }
    sampler.close()


def test_what_a_gpu_does_not_tell_is_none(with_nvml):
    told = [name for name in vars(nvml()) if name.startswith("nvmlDeviceGet")]
    always = {"nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"}
    sampler, _ = with_nvml(missing=set(told) - always)

    (row,) = sampler.sample(1.0)

    assert set(row) == KEYS
    assert {key for key, value in row.items() if value is not None} == {"at", "source", "gpu"}


def test_older_drivers_tell_the_same_reasons_under_their_older_name(with_nvml):
    sampler, _ = with_nvml(missing={"nvmlDeviceGetCurrentClocksEventReasons"})

    assert sampler.sample(0.0)[0]["throttle"] == ["hw_slowdown"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"init": "NVMLError_LibraryNotFound"}, "no NVIDIA driver on this machine"),
        ({"init": "NVMLError"}, "NVML: Driver Not Loaded"),
        ({"gpus": 0}, "no NVIDIA GPU on this machine"),
        ({"missing": {"nvmlDeviceGetCount"}}, "NVML: Not Supported"),
    ],
)
def test_without_a_gpu_one_line_says_so(with_nvml, settings, line):
    sampler, missing = with_nvml(**settings)

    assert sampler is None
    assert missing.startswith(line)
    assert missing.endswith("GPU figures are absent (collect.gpu: address of a DCGM exporter reads them elsewhere)")


def test_without_the_library_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert open_gpu("auto")[1].startswith("nvidia-ml-py is not installed; GPU figures are absent")


def test_the_names_of_our_fake_and_the_reasons_are_those_of_the_library():
    pynvml = pytest.importorskip("pynvml")

    assert all(hasattr(pynvml, name) for name in vars(nvml()) if name.startswith(("nvml", "NVML")))
    reasons = {name: getattr(pynvml, name) for name in vars(pynvml) if name.startswith("nvmlClocksEventReason")}
    for bit, name in gpu_module.REASONS.items():
        assert reasons["nvmlClocksEventReason" + "".join(part.capitalize() for part in name.split("_"))] == bit


def test_none_means_none():
    assert open_gpu("none") == (None, None)


@pytest.mark.parametrize(
    ("bits", "names"),
    [(0, []), (1, ["gpu_idle"]), (0x84, ["sw_power_cap", "hw_power_brake_slowdown"]), (0x4000, ["bit_0x4000"])],
)
def test_throttle_reasons(bits, names):
    assert throttle_reasons(bits) == names


# DCGM


@contextmanager
def serve(answer):
    """A server on a free port that gives each request to ``answer(connection)``."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    done = threading.Event()

    def loop():
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                try:
                    connection.recv(65536)
                    answer(connection)
                except OSError:
                    pass  # the client has gone, as some tests want it to

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    finally:
        done.set()
        thread.join(10)
        listener.close()


def page(text, status="200 OK"):
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    return lambda connection: connection.sendall(head + body)


def test_dcgm_rows_are_in_base_units_and_blanks_are_none():
    with serve(page(PAGE)) as url:
        sampler, missing = open_gpu([url])
        rows = sampler.sample(7.0)
        sampler.close()

    assert missing is None
    assert all(set(row) == KEYS for row in rows)
    assert rows[0] == {
        "at": 7.0,
        "source": "dcgm",
        "host": "node-a",
        "gpu": 0,
        "uuid": "GPU-604ac76c",
        "name": "NVIDIA H100 80GB HBM3",
        "utilisation": pytest.approx(0.97),
        "memory_used_bytes": 72885 * 2**20,
        "memory_total_bytes": (72885 + 8123) * 2**20,
        "power_w": 512.25,
        "energy_j": pytest.approx(61_208_465.431),
        "sm_clock_hz": pytest.approx(1.98e9),
        "temperature_c": 54,
        "throttle": ["sw_power_cap", "sw_thermal_slowdown"],
    }
    assert (rows[1]["power_w"], rows[1]["energy_j"], rows[1]["throttle"]) == (None, None, ["gpu_idle"])


def test_the_older_name_of_the_reasons():
    (row,) = dcgm_rows('DCGM_FI_DEV_CLOCK_THROTTLE_REASONS{gpu="3",UUID="a"} 8\n')

    assert (row["gpu"], row["throttle"]) == (3, ["hw_slowdown"])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (page("# nothing\n"), "no DCGM field"),
        (page("vllm:num_requests_running 1\n"), "no DCGM field"),
        (page("<html>hello</html>"), "ValueError"),
        (page("x 1 " + "9" * 400), "ValueError"),
        (page('x{b="c",\t="d"} 1'), "ValueError"),
        (page("no", "503 Service Unavailable"), "503"),
        (page("", "302 Found\r\nLocation: http://192.0.2.1/"), "302"),
        (page("x 1\n" * 1_100_000), "more than"),
        (lambda connection: None, "disconnected"),
    ],
)
def test_a_page_that_is_not_an_exporters_is_an_error_row_and_then_a_line(answer, why):
    with serve(page(PAGE)) as good, serve(answer) as bad:
        sampler, missing = open_gpu([good, bad])
        rows = sampler.sample(1.0)
        sampler.close()
        alone, line = open_gpu([bad])

    assert [row.get("gpu") for row in rows] == [0, 1, None]
    assert why in rows[2]["error"]
    assert missing.startswith("1 of 2 DCGM exporters could not be read")
    assert alone is None
    assert "GPU figures are absent" in line
    assert "\n" not in line


def test_nobody_there_is_a_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert open_gpu([f"http://127.0.0.1:{port}/metrics"])[0] is None
    assert open_gpu(["http://["])[0] is None


def test_a_page_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr(gpu_module, "PAGE_S", 0.3)

    def trickle(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"# \n")
            time.sleep(0.05)

    with serve(trickle) as url:
        begun = time.monotonic()
        sampler, line = open_gpu([url])

    assert sampler is None
    assert "not whole after" in line
    assert time.monotonic() - begun < 30


@given(st.text(alphabet='DCGM_FI_EV_P{}="gpu,UID \n0123456789.-+eNaInf#', max_size=200))
def test_whatever_a_page_holds_rows_or_a_value_error(text):
    try:
        rows = dcgm_rows(text)
    except ValueError:
        return
    assert rows


@given(st.one_of(st.floats(), st.integers(-(2**70), 2**70)), st.sampled_from(sorted(gpu_module._FIELDS)))
def test_whatever_a_value_is_it_is_possible_or_none(value, field):
    try:
        (row,) = dcgm_rows(f'{field}{{gpu="0",UUID="a"}} {value}\n')
    except ValueError:
        return
    name = gpu_module._FIELDS[field][0]
    assert name not in row or row[name] is None or isinstance(row[name], list) or 0 <= row[name] < 2.0**70


# the analysis


def row(at, gpu=0, **told):
    blank = dict.fromkeys(KEYS) | {"source": "nvml", "name": "invented"}
    return blank | {"at": at, "gpu": gpu, "uuid": f"GPU-{gpu}"} | told


def test_energy_is_the_rise_of_the_counter_in_the_window():
    power = lambda t: 300 + 100 * np.sin(t / 5)  # noqa: E731
    energy = lambda t: 300 * t - 500 * np.cos(t / 5)  # noqa: E731
    rows = [row(at, energy_j=1e7 + energy(at), power_w=power(at)) for at in np.arange(0, 40.01, 0.5)]

    one, total = gpu_figures(rows, (7.3, 31.1), 1000)

    true = energy(31.1) - energy(7.3)
    assert one["energy_source"] == "counter"
    assert one["energy_j"] == pytest.approx(true, rel=1e-3)
    assert one["power_mean_w"] == pytest.approx(true / 23.8, rel=1e-3)
    assert one["covered_s"] == pytest.approx(23.8)
    assert one["refresh_s"] == pytest.approx(0.5)
    assert total["joules_per_output_token"] == pytest.approx(true / 1000, rel=1e-3)


def test_without_a_counter_energy_is_power_over_time():
    rows = [row(at, power_w=100.0 + 10 * at) for at in range(11)]

    one, total = gpu_figures(rows, (2.0, 8.0), 75)

    assert one["energy_source"] == "power over time"
    assert one["energy_j"] == pytest.approx(6 * 150)
    assert total["joules_per_output_token"] == pytest.approx(900 / 75)


def test_a_counter_that_fell_is_not_believed():
    rows = [row(at, power_w=100.0, energy_j=energy) for at, energy in enumerate((500.0, 600.0, 0.0, 100.0))]

    assert gpu_figures(rows, (0.0, 3.0), 1)[0]["energy_source"] == "power over time"


def test_an_exporter_that_reads_seldom_is_seen_and_its_steps_do_no_harm():
    """Read each second, an exporter that reads each 30 s tells 29 old values out of 30."""
    rows = [row(at, energy_j=400.0 * (at // 30 * 30), source="dcgm") for at in range(200)]

    one, _ = gpu_figures(rows, (35.0, 170.0), None)

    assert one["refresh_s"] == 30
    assert one["energy_j"] == pytest.approx(400 * 135, rel=1e-6)


def test_energy_of_a_part_of_the_window_is_no_energy_per_token_if_it_is_small():
    rows = [row(at, energy_j=100.0 * at) for at in range(5)]

    most, little = (gpu_figures(rows, (0.0, end), 100)[-1] for end in (5.0, 50.0))

    assert (most["covered_s"], most["joules_per_output_token"]) == (4, pytest.approx(5.0))  # 100 W x 5 s / 100 tokens
    assert (little["covered_s"], little["joules_per_output_token"]) == (4, None)


def test_several_gpus_share_the_energy_of_a_token():
    rows = [row(at, gpu, energy_j=(100.0 + 50 * gpu) * at) for at in range(11) for gpu in (1, 0)]
    silent = [row(at, 2, utilisation=0.5) for at in range(11)]

    *each, total = gpu_figures(rows, (0.0, 10.0), 500)
    *_, untold = gpu_figures([*rows, *silent], (0.0, 10.0), 500)

    assert [found["gpu"] for found in each] == [0, 1]
    assert (total["gpu"], total["gpus"], total["energy_j"]) == ("all", 2, pytest.approx(2500))
    assert total["joules_per_output_token"] == pytest.approx(5.0)
    assert (untold["gpus"], untold["energy_j"], untold["joules_per_output_token"]) == (3, None, None)


def test_utilisation_memory_and_throttling_are_those_of_the_window():
    rows = [
        row(0, utilisation=1.0, memory_used_bytes=9e9, throttle=["hw_slowdown"]),
        row(1, utilisation=0.2, memory_used_bytes=1e9, throttle=[], temperature_c=50, sm_clock_hz=1e9),
        row(2, utilisation=0.6, memory_used_bytes=3e9, throttle=["sw_power_cap", "gpu_idle"], temperature_c=70),
        row(3, utilisation=None, memory_used_bytes=2e9, throttle=["gpu_idle"], sm_clock_hz=2e9),
        row(4, throttle=None),
        {"at": 2.0, "source": "dcgm", "host": "b", "error": "refused"},
    ]

    one, total = gpu_figures(rows, (1.0, 4.0), 10)

    assert one["samples"] == 4
    assert (one["utilisation_mean"], one["utilisation_max"]) == (pytest.approx(0.4), 0.6)
    assert one["memory_peak_bytes"] == 3e9
    assert (one["temperature_max_c"], one["sm_clock_mean_hz"]) == (70, 1.5e9)
    assert one["throttled_share"] == pytest.approx(1 / 3)
    assert one["throttle_reasons"] == {"sw_power_cap": pytest.approx(1 / 3)}
    assert (one["energy_j"], total["energy_j"], total["joules_per_output_token"]) == (None, None, None)
    assert set(DEFINITIONS) <= set(one) | set(total)


def test_nothing_read_in_the_window_is_no_figure():
    assert gpu_figures([], (0.0, 1.0), 1) == []
    assert gpu_figures([row(5, power_w=1.0)], (0.0, 1.0), 1) == []


@given(
    st.lists(
        st.builds(
            row,
            st.floats(0, 10),
            st.integers(0, 2),
            energy_j=st.none() | st.floats(0, 1e9),
            power_w=st.none() | st.floats(0, 1e3),
            throttle=st.none() | st.lists(st.sampled_from(["sw_power_cap", "gpu_idle"])),
        ),
        max_size=12,
    )
)
def test_figures_of_whatever_was_sampled_are_possible(rows):
    for found in gpu_figures(rows, (2.0, 8.0), 100):
        assert found["energy_j"] is None or found["energy_j"] >= 0
        assert 0 <= found["covered_s"] <= 6
        assert not found.get("throttled_share") or 0 < found["throttled_share"] <= 1
