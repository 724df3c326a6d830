"""A real Prometheus for a test: that of the PATH, else Debian's package unpacked into the cache, so that no service
starts."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from locust_runs import free_port, wait_for

from twoclocks.servers import cache_folder


def prometheus_binary() -> Path:
    """Skips the test, and says so, where there is none and none can be had (20 MB, once a machine)."""
    if found := shutil.which("prometheus"):
        return Path(found)
    folder = cache_folder() / "prometheus"
    if not (folder / "usr" / "bin" / "prometheus").exists():
        trouble = _unpack(folder)
        if trouble:
            pytest.skip(f"no prometheus binary: {trouble}; on Debian: apt-get install prometheus")
    return folder / "usr" / "bin" / "prometheus"


def _unpack(folder: Path) -> str | None:
    """Why there is none."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        return "it is not on the PATH, and this machine has no apt-get to fetch it with"
    sys.stderr.write("fetching Debian's prometheus (20 MB, once)\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for words in (["download", "prometheus"], ["update"], ["download", "prometheus"]):  # lists may be missing yet
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([apt, *words], cwd=scratch, capture_output=True, timeout=120, check=False)
            if packages := list(Path(scratch).glob("prometheus_*.deb")):
                break
        else:
            return "apt-get could not download the package"
        unpacked = Path(scratch) / "unpacked"
        done = subprocess.run([dpkg, "-x", packages[0], unpacked], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"its package could not be unpacked: {done.stderr.strip()}"
        with contextlib.suppress(OSError):  # another test run was faster
            unpacked.rename(folder)
    return None


@contextlib.contextmanager
def running_prometheus(config: Path, data: Path) -> Iterator[str]:
    """Its address, once it answers."""
    url = f"http://127.0.0.1:{free_port()}"
    binary = prometheus_binary()
    words = [f"--config.file={config}", f"--storage.tsdb.path={data}", f"--web.listen-address={url[7:]}"]
    with (data.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *words], stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or _is_ready(url))
        assert process.poll() is None, (data.parent / "prometheus.log").read_text()
        yield url
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
