"""A Dockerfile's steps carried out without Docker: in a root of their own, with its own absolute paths.

The root has this machine's /usr and Python in place of the base image's, read-only. It needs the superuser and
namespaces of its own for mounts (and, when something runs in it, for the network), whose end takes all mounts along.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from locust_runs import ROOT

BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of Debian's images


@dataclass
class Stage:
    """One FROM and what follows it."""

    image: str
    name: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, the rest), in their order


def parse(path: Path) -> list[Stage]:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for step in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = step.strip().partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image.strip(), name.strip() or None))
        else:
            stages[-1].steps.append((word, rest.strip()))
    return stages


def context() -> list[str]:
    """What of the repository's own files .dockerignore lets through; the last pattern that fits a path decides."""
    listed = subprocess.run(
        [shutil.which("git") or "git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    rules = [(re.compile(_pattern(line.removeprefix("!"))), line.startswith("!")) for line in patterns]
    return [path for path in listed.stdout.splitlines() if _let_through(path, rules) and (ROOT / path).is_file()]


def _pattern(line: str) -> str:
    """A * of .dockerignore stays within a folder, **/ does not."""
    parts = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part) or re.escape(part) for part in re.findall(r"\*\*/|\*|\?|[^*?]+", line)) + r"\Z"


def _let_through(path: str, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    ways = [path, *(str(parent) for parent in Path(path).parents)][:-1]
    kept = True
    for pattern, lets_through in rules:
        if any(pattern.match(way) for way in ways):
            kept = lets_through
    return kept


def needs_roots() -> None:
    """Skips the test where no root can be made."""
    tools = ("unshare", "setpriv", "chroot", "ip")
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip("needs the superuser of a Linux, for a root of its own")
    namespaces = [shutil.which("unshare"), "--mount", "--pid", "--fork", "--net", "true"]
    if subprocess.run(namespaces, capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces for mounts")


class Image:
    """A root in which the steps of a stage have been carried out, and what they set for who runs in it."""

    def __init__(self, stage: Stage, folder: Path, built: dict[str, "Image"]) -> None:
        self.root, self.stage = folder, stage
        self.env, self.workdir, self.user, self.entrypoint, self.command = {"PATH": BASE_PATH}, "/", "0:0", [], []
        self.skipped: list[str] = []  # RUN steps that fetch: Debian's packages, and those of a lock file
        for name in ("usr", "etc", "proc", "dev", "tmp", "deps", "server", sys.base_prefix[1:]):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        for word, rest in stage.steps:
            getattr(self, f"_{word.lower()}")(rest, built)

    def _workdir(self, rest, built):
        self.workdir = rest
        self._place(rest).mkdir(parents=True, exist_ok=True)

    def _env(self, rest, built):
        self.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))

    def _user(self, rest, built):
        self.user = rest

    def _expose(self, rest, built):
        pass

    def _entrypoint(self, rest, built):
        self.entrypoint = json.loads(rest)

    def _cmd(self, rest, built):
        self.command = json.loads(rest)

    def _copy(self, rest, built):
        words = shlex.split(rest)
        *sources, to = [word for word in words if not word.startswith("--")]
        into = self._place(to)
        if words[0].startswith("--from="):
            shutil.copytree(built[words[0][7:]]._place(sources[0]), into, symlinks=True)
            return
        there = context()
        for source in sources:
            files = [path for path in there if path == source or path.startswith(f"{source}/")]
            assert files, f"COPY {source}: nothing of that name is in the build's context"
            for path in files:
                place = into / (path.removeprefix(source).lstrip("/") or (Path(path).name if to.endswith("/") else ""))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / path, place)

    def _run(self, rest, built):
        if "apt-get" in rest or "--require-hashes" in rest:
            self.skipped.append(rest)
            return
        # This environment's packages stand in for the lock's; the package itself is built and installed as it says.
        environ = self.env | {"PYTHONPATH": "/deps", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": "/"}
        environ |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        done = self.run(["sh", "-c", rest], environ=environ)
        assert done.returncode == 0, done.stdout

    def _place(self, path: str) -> Path:
        return self.root / os.path.normpath(os.path.join(self.workdir, path)).lstrip("/")  # noqa: PTH118

    def run(self, command, *, environ=None, user="0:0", binds=(), beside="", timeout=120):
        """Run a command in the root and tell its exit code and output.

        binds: (place here, place there, "ro" or "rw"); with them the root is read-only but for a tmpfs at /tmp, as a
        container's can be. beside: shell that runs outside of the root before it, in the same network of its own.
        """
        uid, _, gid = user.partition(":")
        drop = f"--reuid={uid} --regid={gid} --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs"
        environ = self.env if environ is None else environ
        inside = ["env", "-i", *(f"{name}={value}" for name, value in environ.items()), *command]
        lines = ["set -e", f"R={shlex.quote(str(self.root))}", "mount --make-rprivate /", "mount --bind $R $R"]
        here = [("/usr", "/usr", "ro"), (sys.base_prefix, "/usr/local", "ro"), (sys.base_prefix, sys.base_prefix, "ro")]
        here += [("/etc", "/etc", "ro"), (site_packages(), "/deps", "ro"), *binds]
        for source, to, how in here:
            lines += [f"mount --bind {shlex.quote(str(source))} $R{to}", f"mount -o remount,bind,{how} $R{to}"]
        lines += ["mount --rbind /dev $R/dev", "mount -t proc proc $R/proc"]
        if binds:
            lines += ["mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs $R/tmp", "mount -o remount,bind,ro $R"]
        if beside:
            lines += ["mount -t proc proc /proc", "ip link set lo up", beside]
        lines += [
            f"exec chroot $R setpriv {drop} sh -c {shlex.quote(f'cd {self.workdir} && exec {shlex.join(inside)}')}"
        ]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *(["--net"] if beside else [])]
        return subprocess.run(
            [*namespaces, "bash", "-c", "\n".join(lines)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )


def site_packages() -> str:
    """Where this environment's packages are, which stand in for those that pip would fetch."""
    return str(Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages")
