"""The engine's side of an in-process run: loads a model, takes batches over a socket, and tells what came when.

The files of this folder run in an engine's own environment, with its Python and by their path. There they see torch and
transformers, or vLLM, and nothing of the tester: they import the standard library, the engine, and each other.

    python in_process_engine.py SOCKET pytorch|vllm MODEL [FLAG ...]

SOCKET is the path of a Unix socket on which the tester listens. Lines of JSON go both ways. First one of

    {"ready": {versions, device, ...}}        {"failed": why}

then, for each line {"batch": [{"id", "body"}, ...]}, when the batch has ended, a line {"answer": {...}} a request
and {"done": {"sent_ns", "ended_ns"}}. {"forget_peaks": true} and {"memory": true} are answered with
{"memory": [...]}. Times are time.monotonic_ns(), which all processes of a machine share.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asks import Answer, Ask, Refused, ask_from, one_line  # beside this file, which is started by path

Send = Callable[[dict[str, Any]], None]


def run_batch(engine: Any, requests: Sequence[dict[str, Any]], send: Send) -> None:
    """One batch through the engine. Requests that it cannot take are told so, and the others go on without them."""
    sent_ns = time.monotonic_ns()
    asks: list[Ask] = []
    prompts: list[list[int]] = []
    for request in requests:
        try:
            ask = ask_from(request["id"], request["body"])
            prompts.append(engine.encode(ask))
            asks.append(ask)
        except Refused as refusal:
            now = time.monotonic_ns()
            send_answer(Answer(request["id"], error=str(refusal), error_kind="refused", ended_ns=now), send)
    if asks:
        try:
            answers = engine.generate(asks, prompts)
        except Exception as error:  # noqa: BLE001  whatever an engine raises is what became of these requests
            now, kind = time.monotonic_ns(), failure_kind(error)
            answers = [Answer(ask.id, error=one_line(error), error_kind=kind, ended_ns=now) for ask in asks]
        for answer in answers:
            send_answer(answer, send)
    send({"done": {"sent_ns": sent_ns, "ended_ns": time.monotonic_ns()}})


def send_answer(answer: Answer, send: Send) -> None:
    """Without the ids of its tokens, of which the text and their number are left."""
    told = asdict(answer)
    told["output_tokens"] = len(told.pop("token_ids"))
    send({"answer": told})


def failure_kind(error: BaseException) -> str:
    """``out_of_memory`` where torch or the system says so, ``refused`` for what we refuse, else ``engine``."""
    if isinstance(error, Refused):
        return "refused"
    words = f"{type(error).__name__} {error}".lower()
    short = isinstance(error, MemoryError) or "outofmemory" in words or "out of memory" in words
    return "out_of_memory" if short or "can't allocate memory" in words else "engine"


def load(kind: str, model: str, flags: Sequence[str]) -> Any:
    """The engine with its model. Raises whatever it raises where it cannot be loaded."""
    if kind == "vllm":
        from vllm_engine import Vllm

        return Vllm(model, flags)
    from pytorch import PyTorch, pytorch_flags

    return PyTorch(model, **vars(pytorch_flags().parse_args(flags)))


def why_not(error: BaseException, kind: str, model: str) -> str:
    """Why an engine could not be loaded, in one line with what to do."""
    if isinstance(error, SystemExit):
        return "target.start.flags: the engine does not know them; what it said stands in its log"
    if isinstance(error, ImportError):
        package = error.name or kind
        return f"{sys.executable} has no {package} ({one_line(error)}); name another in target.start.python"
    if failure_kind(error) == "out_of_memory":
        return f"there is not enough memory to load {model}: {one_line(error)}; take a smaller model or dtype"
    return f"{model} could not be loaded: {type(error).__name__}: {one_line(error)}"


def process_tree_peak(root: int) -> dict[str, Any] | None:
    """Peak resident memory of a process and all that it started, as a row of memory; None where there is no /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:  # "pid (name) state ppid ...": the name may hold anything, so count from its closing parenthesis
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    peaks = [peak for pid in tree if (peak := high_water_mark(pid)) is not None]
    if not peaks:
        return None
    return {
        "name": "process_rss_peak",
        "bytes": sum(peaks),
        "source": "/proc/PID/status, VmHWM",
        "definition": "largest resident memory that each process of the engine ever had, loading included, summed over "
        f"{len(peaks)}; the model's file counts while it is mapped",
    }


def high_water_mark(pid: int) -> int | None:
    """VmHWM of a process in bytes; None if it has ended, or the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def serve(engine: Any, lines: Any, send: Send) -> None:
    """Do what the tester says until it closes the socket."""
    for line in lines:
        message = json.loads(line)
        if "batch" in message:
            run_batch(engine, message["batch"], send)
        elif "forget_peaks" in message:
            engine.forget_peaks()
            send({"memory": []})
        else:
            peak = process_tree_peak(os.getpid())
            send({"memory": engine.memory() + ([peak] if peak else [])})


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: the tester has closed the socket. 3: no engine."""
    address, kind, model, *flags = arguments
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)

    def send(message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    try:
        engine = load(kind, model, flags)
        told = engine.told()
    except (Exception, SystemExit) as error:  # an engine raises what it likes
        send({"failed": why_not(error, kind, model)})
        raise
    send({"ready": told})
    serve(engine, connection.makefile("rb"), send)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
