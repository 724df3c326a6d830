"""Docker's own compose for a test, which needs no engine to read a file: that of the PATH, else Debian's package."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from twoclocks.servers import cache_folder

PLUGIN = Path("usr") / "libexec" / "docker" / "cli-plugins" / "docker-compose"


def compose_command() -> list[str]:
    """Skips the test, and says so, where there is none and none can be had (13 MB, once a machine)."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and _is_new(words):
            return words
    folder = cache_folder() / "docker-compose"
    if not (folder / PLUGIN).exists():
        trouble = _unpack(folder)
        if trouble:
            pytest.skip(f"no docker compose of version 2: {trouble}")
    return [str(folder / PLUGIN)]


def _is_new(words: list[str]) -> bool:
    done = subprocess.run([*words, "version", "--short"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.lstrip("v")[:2] not in ("", "1.")


def _unpack(folder: Path) -> str | None:
    """Why there is none. It is of Debian 13, whose list is kept apart from this machine's own."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        return "it is not on the PATH, and this machine has no apt-get to fetch it with"
    archive = _archive(apt)
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if archive is None or not keyring.exists():
        return "it is not on the PATH, and this machine's packages are not Debian's"
    sys.stderr.write("fetching Debian's docker-compose (13 MB, once)\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        for made in ("state/lists/partial", "cache/archives/partial"):
            (scratch / made).mkdir(parents=True)
        (scratch / "sources.list").write_text(f"deb [signed-by={keyring}] {archive} trixie main\n")
        places = {"Etc::sourcelist": "sources.list", "State": "state", "Cache": "cache"}
        options = [word for key, place in places.items() for word in ("-o", f"Dir::{key}={scratch / place}")]
        options += ["-o", "Dir::Etc::sourceparts=-", "-o", "Dir::State::status=/var/lib/dpkg/status"]
        for words in (["update"], ["download", "docker-compose"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([apt, *options, *words], cwd=scratch, capture_output=True, timeout=120, check=False)
        packages = list(scratch.glob("docker-compose_*.deb"))
        if not packages:
            return "apt-get could not download the package"
        unpacked = scratch / "unpacked"
        done = subprocess.run([dpkg, "-x", packages[0], unpacked], capture_output=True, text=True, check=False)
        if done.returncode or not (unpacked / PLUGIN).exists():
            return f"its package could not be unpacked: {done.stderr.strip()}"
        with contextlib.suppress(OSError):  # another test run was faster
            unpacked.rename(folder)
    return None


def _archive(apt: str) -> str | None:
    """The address that this machine has Debian's packages from."""
    words = [apt, "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    return next((uri for uri in told if uri.rstrip("/").endswith("/debian")), None)
