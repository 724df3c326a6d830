"""`make demo`: the same small load on a real vLLM and on `transformers serve` on this machine's CPU, then a comparison.

    python scripts/demo.py [--only vllm|transformers] [--output DIR]

Run by the environment that twoclocks is installed in. Makes what is missing (scripts/prepare.py), and for each server:
starts it, runs Locust with configs/demo-NAME.yaml, stops it, builds the report. Nothing that it started outlives it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from twoclocks import keeper
from twoclocks.errors import TwoclocksError
from twoclocks.servers import Server, ServerKind, cache_folder, started_server

ROOT = Path(__file__).resolve().parent.parent
KINDS: tuple[ServerKind, ...] = ("vllm", "transformers")
MODEL_NAME = "SmolLM2-135M-Instruct"
FLAGS: dict[ServerKind, list[str]] = {"vllm": ["--max-model-len", "2048"], "transformers": []}
WHOLE_RUN_CODES = {
    0: "",
    1: "the run is whole, but a goal of its experiment was missed",
    4: "the run is whole, but its own checks call it INVALID",
}
"""Exit codes of a run after which its figures are still worth a look, so the demo goes on and passes the code on."""

began = time.monotonic()


class StepError(Exception):
    """A step that ended with an exit code other than 0; it has told the reason itself."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} failed with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Background:
    """A command that runs while something else goes on; what it says is shown when it is waited for."""

    what: str
    kept: keeper.Kept
    output: IO[bytes]

    def finish(self) -> list[str]:
        """Waits, shows what the command printed, and returns it as lines; StepError when it failed."""
        say(f"waiting for {self.what}")
        code = self.kept.keeper.wait()
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        print(text, flush=True)
        if code:
            raise StepError(self.what, code)
        return text.splitlines()


def say(line: str) -> None:
    """One line of progress, with the time since the start."""
    seconds = int(time.monotonic() - began)
    print(f"[demo {seconds // 60}:{seconds % 60:02d}] {line}", file=sys.stderr, flush=True)


def stream(what: str, argv: Sequence[str | Path], whole: Sequence[int] = (0,)) -> tuple[list[str], int]:
    """Runs a command to its end, passing its output on; returns its lines of standard output and its exit code.

    Raises StepError for an exit code that is not among `whole`.
    """
    # Locust's table each 15 s is progress enough; each 2 s, as it has it, hides the rest.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "LOCUST_CONSOLE_STATS_INTERVAL_SEC": "15"}
    kept = keeper.start(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, errors="replace")
    lines = []
    try:
        assert kept.keeper.stdout is not None
        for line in kept.keeper.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        code = kept.keeper.wait()
    finally:
        kept.stop()
    if code not in whole:
        raise StepError(what, code)
    return lines, code


def prepare(kinds: Sequence[ServerKind]) -> dict[str, Path]:
    """Makes what is missing; the Python of each environment and the model's folder, by name."""
    lines, _ = stream("preparing", [sys.executable, ROOT / "scripts" / "prepare.py", *kinds, "smollm2"])
    return {name: Path(path) for name, _, path in (line.partition("=") for line in lines)}


def measure(kind: ServerKind, server: Server, output: Path) -> tuple[Path, int]:
    """Runs Locust on the server; the run's folder and Locust's exit code."""
    settings = {"target.url": server.url, "target.model": server.model, "collect.log": f"file:{server.log_path}"}
    argv: list[str | Path] = [sys.executable, "-m", "locust", "-f", "load_test.py", "--headless", "--no-report"]
    argv += ["--experiment", f"configs/demo-{kind}.yaml", "--set", f"output={output}"]
    for key, value in settings.items():
        argv += ["--set", f"{key}={value}"]
    lines, code = stream(f"the load on {kind}", argv, whole=list(WHOLE_RUN_CODES))
    folders = [line.removeprefix("run folder: ") for line in lines if line.startswith("run folder: ")]
    if not folders:
        raise StepError(f"the load on {kind} named no run folder; it", code or 2)
    if code:
        say(f"{kind}: {WHOLE_RUN_CODES[code]} (exit code {code})")
    return ROOT / folders[-1], code


def start_twoclocks(stack: contextlib.ExitStack, what: str, *arguments: str | Path) -> Background:
    """Starts `twoclocks ARGUMENTS` in the background; it ends with the stack at the latest."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  (the stack closes it)
    stack.enter_context(output)
    kept = keeper.start([sys.executable, "-m", "twoclocks", *arguments], cwd=ROOT, stdout=output, stderr=output)
    stack.callback(kept.stop)
    return Background(what, kept, output)


def demo(kinds: Sequence[ServerKind], output: Path) -> int:
    """The whole of it; the first exit code of a run that is not 0, else 0."""
    say(f"{' and '.join(kinds)} with {MODEL_NAME}: about 4 minutes, on the first time 4 more to install")
    paths = prepare(kinds)
    runs: list[Path] = []
    codes: list[int] = []
    with contextlib.ExitStack() as stack:
        report: Background | None = None
        for kind in kinds:
            with started_server(
                kind=kind,
                python=paths[kind],
                model=paths["smollm2"],
                served_model_name=MODEL_NAME,
                log_path=output / f"demo-{kind}-server.log",
                flags=FLAGS[kind],
                progress=say,
            ) as server:
                # The report of the first run is built while the second server starts, and never beside a measurement.
                if report:
                    report.finish()
                say(f"{kind}: sending load, about 85 s")
                folder, code = measure(kind, server, output)
                say(f"{kind}: measured; stopping the server")
            runs.append(folder)
            codes.append(code)
            report = start_twoclocks(stack, f"the report of {folder.name}", "report", folder)
        comparison = start_twoclocks(stack, "the comparison", "compare", *runs) if len(runs) > 1 else None
        assert report is not None
        report.finish()
        compared = comparison.finish() if comparison else []
    look = [folder / name for folder in runs for name in ("plots/client_vs_server_violin.png", "report.html")]
    look += [Path(line.partition(": ")[2]) for line in compared if line.startswith(("comparison: ", "violin: "))]
    say("done. Where to look:")
    for path in look:
        print(f"  {shown(path)}")
    return next((code for code in codes if code), 0)


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main() -> int:
    """Exit code: that of the step that failed; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].partition(": ")[2])
    parser.add_argument("--only", choices=KINDS, help="run on this server alone")
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="parent of the run folders (default: output)"
    )
    options = parser.parse_args()
    output = options.output.absolute()
    try:
        return demo([options.only] if options.only else KINDS, output)
    except StepError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.code
    except TwoclocksError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"demo: interrupted, everything it started has ended; what was installed is kept in {cache_folder()}, "
            f"what was measured in {shown(output)}",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
