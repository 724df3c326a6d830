"""Machine: what is so on this machine, found by looking and measuring for a second or two. Judges nothing: doctor does.

Linux tells most of it in /proc and /sys; what a machine does not tell is None or empty.
"""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from twoclocks import __version__
from twoclocks.client import SO_TIMESTAMPNS
from twoclocks.errors import TargetError
from twoclocks.experiment import Experiment
from twoclocks.gpu import open_gpu
from twoclocks.interpreters import PACKAGES, find_python
from twoclocks.models import models_folder
from twoclocks.preflight import ServerFacts
from twoclocks.servers import cache_folder
from twoclocks.start import available_memory

ROOT = Path("/")
PINS = Path(__file__).resolve().parent.parent / "requirements.lock"
STAMPS = 50
"""Messages that are sent over a loopback socket to see their stamps."""
STAMPS_BEGIN_S = 0.5
"""The kernel begins to stamp a moment after the first socket of the machine has asked; if not by then, never."""
LOOK_S = 1.0
"""How long the machine is watched: its CPU time, and how late a sleeper is woken."""
NAP_S = 0.002
_TIMESPEC = struct.Struct("@ll")


class Stamps(msgspec.Struct, frozen=True):
    """Kernel receive stamps, as found on a loopback socket."""

    sent: int  # messages
    stamped: int  # those that came with a stamp
    before_read_s: float | None = None  # median time from the stamp to the end of the read


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """This machine. Shares are 0 .. 1."""

    twoclocks: str
    python: tuple[int, int, int]
    system: str  # as platform.system() has it
    release: str
    pins: dict[str, str] = {}  # package -> the version that requirements.lock of this checkout names
    installed: dict[str, str | None] = {}  # package that twoclocks needs -> its version; None: not there
    cores: int = 1  # of the machine
    usable_cores: float = 1  # that this process may run on, by affinity and by the container's quota (cgroup v2)
    memory_bytes: int | None = None  # that can still be had
    output: str = "output"
    disk_bytes: int | None = None  # free where run folders go
    files_soft: int = 0  # open files a process may have
    files_hard: int = 0  # as many as a run raises it to; 0: no limit
    native_reader: bool = False
    stamps: Stamps = Stamps(0, 0)
    clock_source: str | None = None
    clock_read_s: float = 0.0  # what one reading of the monotonic clock takes
    governors: list[str] = []  # of the CPU frequency; empty: the machine does not tell
    stolen: float | None = None  # share of the CPU time that the hypervisor gave to others while we looked
    busy: float | None = None  # share of the CPU time that other processes took meanwhile
    woken_late_s: float | None = None  # p99 of how late a sleeper came back
    ports: dict[int, bool] = {}  # port on the loopback -> is it free?
    gpus: list[str] = []
    no_gpu: str | None = None  # why none can be read
    engines: dict[str, str | None] = {}  # kind of target.start -> its interpreter; None: not installed
    models: list[str] = []  # in the cache
    server: ServerFacts | None = None


def look(experiment: Experiment, ports: Mapping[int, str], server: ServerFacts | None = None) -> Facts:
    """What is so here, for this experiment's output folder and engine. Takes about two seconds."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    gpus, no_gpu = _gpus()
    stolen, busy, late = _watched()
    limits = [0 if limit == resource.RLIM_INFINITY else limit for limit in files]
    return Facts(
        twoclocks=__version__,
        python=sys.version_info[:3],
        system=platform.system(),
        release=platform.release(),
        pins=pins(PINS),
        installed=installed(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=available_memory(),
        output=experiment.output,
        disk_bytes=_free_disk(Path(experiment.output)),
        files_soft=limits[0],
        files_hard=limits[1],
        native_reader=_has_native_reader(),
        stamps=kernel_stamps(),
        clock_source=_text(ROOT / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        clock_read_s=_clock_read_s(),
        governors=_governors(),
        stolen=stolen,
        busy=busy,
        woken_late_s=late,
        ports={port: is_free(port) for port in ports},
        gpus=gpus,
        no_gpu=no_gpu,
        engines={kind: _engine(kind) for kind in PACKAGES},
        models=_models(),
        server=server,
    )


def kernel_stamps(messages: int = STAMPS) -> Stamps:
    """Send messages over a TCP connection of this machine and look whether the kernel stamps their arrival."""
    if not sys.platform.startswith("linux"):
        return Stamps(0, 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()[:2], 5) as reader,
        listener.accept()[0] as sender,
    ):
        try:
            reader.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OSError:
            return Stamps(messages, 0)
        until = time.monotonic() + STAMPS_BEGIN_S
        while _age(sender, reader) is None and time.monotonic() < until:
            time.sleep(NAP_S)
        ages = [age for age in (_age(sender, reader) for _ in range(messages)) if age is not None]
    return Stamps(messages, len(ages), statistics.median(ages) if ages else None)


def _age(sender: socket.socket, reader: socket.socket) -> float | None:
    """Time from the kernel's stamp of a byte to the end of its read, in s; None where it came without."""
    sender.sendall(b"x")
    _, control, _, _ = reader.recvmsg(1, socket.CMSG_SPACE(_TIMESPEC.size))
    read_ns = time.time_ns()
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, ns = _TIMESPEC.unpack_from(data)
            return (read_ns - int(seconds) * 10**9 - int(ns)) / 1e9
    return None


def pins(path: Path) -> dict[str, str]:
    """The versions that a lock file names, by package in small letters; none without the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;\\]+)", line) for line in lines)
    return {_name(match[1]): match[2] for match in found if match}


def installed() -> dict[str, str | None]:
    """Each package that twoclocks needs, with its version; extras are left out."""
    try:
        needed = importlib.metadata.requires("twoclocks") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return {}
    names = [_name(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in needed if "extra ==" not in line]  # type: ignore[index]
    return {name: _version(name) for name in names}


def usable_cores(root: Path = ROOT) -> float:
    """Cores that this process may use at the same time: its affinity, and the quota of its container."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def is_free(port: int) -> bool:
    """Can a server of ours listen there, on the loopback?"""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _watched() -> tuple[float | None, float | None, float | None]:
    """(share stolen, share taken by others, p99 of the lateness of a sleeper in s) over LOOK_S."""
    before, own, began = _cpu_times(), time.process_time(), time.monotonic()
    lates = []
    while (now := time.monotonic()) < began + LOOK_S:
        time.sleep(NAP_S)
        lates.append(time.monotonic() - now - NAP_S)
    late = sorted(lates)[round(0.99 * (len(lates) - 1))]
    after, used = _cpu_times(), time.process_time() - own
    if before is None or after is None or after[0] <= before[0]:
        return None, None, late
    total, idle, stolen = (b - a for a, b in zip(before, after, strict=True))
    return stolen / total, max(0.0, 1 - (idle + stolen + used) / total), late


def _cpu_times(root: Path = ROOT) -> tuple[float, float, float] | None:
    """(all, idle, stolen) CPU time of all cores since the boot, in s."""
    try:
        words = (root / "proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, idle, waiting, irq, soft, stolen = (int(word) / os.sysconf("SC_CLK_TCK") for word in words)
    except (OSError, ValueError):
        return None
    return user + nice + system + idle + waiting + irq + soft + stolen, idle + waiting, stolen


def _clock_read_s(readings: int = 20_000) -> float:
    began = time.perf_counter()
    for _ in range(readings):
        time.monotonic_ns()
    return (time.perf_counter() - began) / readings


def _governors() -> list[str]:
    paths = (ROOT / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({text for path in paths if (text := _text(path))})


def _free_disk(path: Path) -> int | None:
    """Of the nearest folder above that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _has_native_reader() -> bool:
    try:
        importlib.import_module("twoclocks._native")
    except ImportError:
        return False
    return True


def _gpus() -> tuple[list[str], str | None]:
    sampler, missing = open_gpu("auto")
    if sampler is None:
        return [], missing
    rows = sampler.sample(0.0)
    sampler.close()
    return [str(row.get("name")) for row in rows], missing


def _engine(kind: str) -> str | None:
    try:
        return str(find_python(kind, "auto", cache_folder()))
    except TargetError:
        return None


def _models() -> list[str]:
    folder = models_folder(cache_folder())
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
