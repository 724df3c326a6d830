"""`twoclocks duel`: a study of two targets that are sent the same prompts in turns (A B, B A, ...), answers kept.

The study's report pairs the requests by prompt, so that neither the prompts nor a drift of the machine decide.
"""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import get_args

import msgspec

from twoclocks import run
from twoclocks.child import ROOT, Progress
from twoclocks.errors import ExperimentError, RunFolderError
from twoclocks.experiment import Server, load_experiment


def duel(options: Namespace, progress: Progress) -> int:
    """What the command line asks for; its exit code. Raises TwoclocksError."""
    path = options.experiment or ROOT / "configs" / "same-prompt.yaml"
    overrides = ["order=abba", "output_text=true"]
    if options.a is not None or options.b is not None:
        if not (options.a and options.b):
            raise ExperimentError("--a and --b: a duel needs both, such as --a vllm=http://127.0.0.1:8000")
        targets = [_target(word, letter) for word, letter in ((options.a, "A"), (options.b, "B"))]
        overrides += [f"targets={msgspec.json.encode(targets).decode()}", "claims=[]"]
    overrides += [] if options.repeats is None else [f"repeats={options.repeats}"]
    overrides += options.set
    if options.prompt is not None:
        output = Path(load_experiment(path, overrides).output)
        overrides += [f"workload.requests={_prompt_file(options.prompt, output)}", "load.requests=1"]
    experiment = load_experiment(path, overrides)
    if len(experiment.targets) != 2:
        raise ExperimentError(f"{path}: targets: a duel is between two, found {len(experiment.targets)}")
    settled = {"experiment": path, "set": overrides, "resume": None, "target": None, "variant": None}
    return run.run(Namespace(**vars(options) | settled | {"url": None, "users": None, "processes": 1}), progress)


def _target(word: str, letter: str) -> dict[str, str]:
    """URL, or SERVER=URL where the kind of server is known."""
    kind, equals, url = word.partition("=")
    if equals and kind in get_args(Server):
        return {"name": f"{letter} ({kind})", "url": url, "server": kind}
    return {"name": letter, "url": word, "server": "other"}


def _prompt_file(text: str, output: Path) -> Path:
    """A request file of this one prompt; the same prompt has the same file."""
    path = output / f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode({"id": "prompt", "messages": [{"role": "user", "content": text}]}) + b"\n")
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None
    return path
