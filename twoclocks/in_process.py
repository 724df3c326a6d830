"""`python -m twoclocks.in_process`: batches through an engine without a server, into a run folder like any other.

The engine runs in a child, in the Python of its own environment (engines/in_process_engine.py), and stamps its tokens;
here are the order of the prompts, the batches, the records and the end. Imports neither Locust nor what draws.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import msgspec

from twoclocks import keeper
from twoclocks.collect import Collectors, Job
from twoclocks.errors import TargetError, TwoclocksError, plain
from twoclocks.experiment import Experiment, Start, load_experiment
from twoclocks.masks import masked, masked_word
from twoclocks.record import Kind, Phase, Record, Status, encode_record, run_lengths
from twoclocks.run_folder import RunFolder, first_meta, refuse_existing
from twoclocks.servers import last_telling_line, server_environment
from twoclocks.start import check
from twoclocks.warmup import in_words, warm_up
from twoclocks.workload import Plan, load_workload, plans

CHILD = Path(__file__).parent / "engines" / "in_process_engine.py"
INTERRUPTED = 130  # exit code
POLL_S = 0.2
MEMORY_S = 30.0
LOG = "engine.log"
STOPPED = "stopped"  # error_kind of what the end of a run cuts off
HOW = (
    "In process, without HTTP: a request is sent when its batch is handed to the engine, before chat template and "
    "tokenizing, at the same moment as all others of the batch; "
)
ENDS = {
    "pytorch": "all of them end when the longest has ended and `generate` has returned.",
    "vllm": "each ends with the step of its last token.",
}
GREEDY = " Tokens are the most likely ones unless a request says otherwise."

log = logging.getLogger("twoclocks")


class Answer(msgspec.Struct, frozen=True):
    """What the engine says of a request; asks.Answer on its side. Times are time.monotonic_ns()."""

    id: str
    prompt_tokens: int
    output_tokens: int
    steps: list[tuple[int, int]]  # when, and how many tokens came then
    finish_reason: str | None
    text: str
    cached_tokens: int | None
    ended_ns: int
    error: str | None
    error_kind: str | None


class Done(msgspec.Struct, frozen=True):
    """When a batch was handed over, and when all of it had come back."""

    sent_ns: int
    ended_ns: int


class Told(msgspec.Struct, frozen=True):
    """A line of the engine's process."""

    ready: dict[str, Any] | None = None
    failed: str | None = None
    answer: Answer | None = None
    done: Done | None = None
    memory: list[dict[str, Any]] | None = None


class EngineLost(Exception):
    """The engine's process ended, or took too long. ``status`` and ``kind`` are those of the records that it leaves."""

    def __init__(self, message: str, status: Status, kind: str) -> None:
        super().__init__(message)
        self.status: Status = status
        self.kind = kind


class Engine:
    """The handle on an engine's process."""

    def __init__(self, kept: keeper.Kept, connection: socket.socket, log_path: Path) -> None:
        self.kept, self.log_path = kept, log_path
        self._connection, self._rest = connection, b""
        self._decode = msgspec.json.Decoder(Told).decode

    def ask(self, message: Any, seconds: float) -> None:
        """Send a line. A process that is gone is told of by `hear`."""
        self._connection.settimeout(max(seconds, 0.001))
        with contextlib.suppress(OSError):
            self._connection.sendall(msgspec.json.encode(message) + b"\n")

    def hear(self, deadline: float) -> Told:
        """The next line. Raises EngineLost when there is none until ``deadline``, on time.monotonic()."""
        while (end := self._rest.find(b"\n")) < 0:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._connection.recv(1 << 20)
            except TimeoutError:
                raise EngineLost("the engine took too long", "timeout", "total_timeout") from None
            except OSError:
                data = b""
            if not data:
                raise EngineLost(self._why_gone(), "error", "engine_ended")
            self._rest += data
        line, self._rest = self._rest[:end], self._rest[end + 1 :]
        return self._decode(line)

    def _why_gone(self) -> str:
        """It has closed its end: in a moment its keeper knows how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.kept.keeper.wait(5)
        code = self.kept.keeper.returncode
        if code == 128 + signal.SIGKILL:
            return "the engine was killed, as a system does that runs out of memory; take a smaller model or batch"
        return f"the engine ended (exit code {code}): {last_telling_line(self.log_path)}; its log: {self.log_path}"

    def batch(self, plans_: Sequence[Plan], deadline: float) -> tuple[Done, dict[str, Answer]]:
        """Answers by request id. Raises EngineLost."""
        requests = [{"id": plan.request_id, "body": msgspec.Raw(plan.body)} for plan in plans_]
        self.ask({"batch": requests}, deadline - time.monotonic())
        answers: dict[str, Answer] = {}
        while (told := self.hear(deadline)).done is None:
            if told.answer is not None:
                answers[told.answer.id] = told.answer
        return told.done, answers

    def forget_peaks(self) -> None:
        """Peaks of memory are counted anew from here on. Raises EngineLost."""
        self.ask({"forget_peaks": True}, MEMORY_S)
        self.hear(time.monotonic() + MEMORY_S)

    def memory(self) -> list[dict[str, Any]]:
        """Rows of run.json's memory. Raises EngineLost."""
        self.ask({"memory": True}, MEMORY_S)
        return self.hear(time.monotonic() + MEMORY_S).memory or []


@contextlib.contextmanager
def started_engine(
    start: Start, log_path: Path, progress: Callable[[str], None]
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """A loaded engine and what it says of itself (versions, device, dtype, threads); it ends with this context.

    Raises TargetError, in one line, where there is no such Python, package or model, or it cannot be loaded.
    """
    plan = check(start)
    model = plan.model
    assert model is not None
    from_hub = model.name != str(model.folder)
    environment = server_environment(start.kind, start.env, device=plan.device, from_hub=from_hub)
    if plan.device == "cpu":  # the same for both engines, of which vLLM would take all cores here
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    with tempfile.TemporaryDirectory(prefix="twoclocks-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = Path(folder) / "engine"
        listener.bind(str(address))
        listener.listen(1)
        argv = [plan.python, CHILD, address, start.kind, model.name, *start.flags]
        try:
            with log_path.open("wb") as file:
                kept = keeper.start(argv, cwd=folder, env=environment, stdout=file, stderr=file)
        except OSError as error:
            raise TargetError(f"target.start.python: {error}") from None
        try:
            progress(f"{start.kind}: loading {model.name}")
            deadline = time.monotonic() + start.ready_s
            with _accepted(listener, kept, deadline, log_path) as connection:
                engine = Engine(kept, connection, log_path)
                try:
                    told = engine.hear(deadline)
                except EngineLost as lost:
                    raise TargetError(f"{start.kind} while loading: {lost}") from None
                if told.failed is not None or told.ready is None:
                    raise TargetError(f"{start.kind}: {plain(told.failed)}; its log: {log_path}")
                yield engine, told.ready | {"model": start.served_model_name or Path(model.name).name}
        finally:
            kept.stop()


def _accepted(listener: socket.socket, kept: keeper.Kept, deadline: float, log_path: Path) -> socket.socket:
    """The engine's connection, which comes within a second unless its Python cannot even start."""
    listener.settimeout(POLL_S)
    while time.monotonic() < deadline and kept.running():
        with contextlib.suppress(TimeoutError):
            return listener.accept()[0]
    raise TargetError(
        f"target.start.python: the engine did not start: {last_telling_line(log_path)}; its log: {log_path}"
    )


class InProcessRun:
    """One run, from the warm-up to its last record."""

    def __init__(self, experiment: Experiment, folder: RunFolder, zero_ns: int, engine: Engine, model: str) -> None:
        self.experiment, self.folder, self.zero_ns, self.engine = experiment, folder, zero_ns, engine
        self.plans = plans(experiment, load_workload(experiment), model)
        self.target = experiment.target.name or experiment.target.server

    def warm_up(self) -> None:
        """Raises EngineLost, and TargetError where the engine refuses all that it is to be warmed with."""
        settings = self.experiment.warmup
        if not settings.requests:
            return
        say(f"warming up with {in_words(settings)} (not counted)")
        done = warm_up(settings, lambda count: self.batch(count, "warmup", time.monotonic_ns(), None))
        self.folder.write_meta(warmup=msgspec.to_builtins(done))
        if done.failed == done.requests:
            raise TargetError(f"the engine answers none of the warm-up's requests: {done.first_failure}")
        if done.failed:
            self.note(f"{done.failed} of {done.requests} warm-up requests failed; the first: {done.first_failure}")
        if done.stable is False:
            self.note("the warm-up ended although TTFT had not settled yet; the first batches may still be slower")

    def measure(self) -> None:
        """All batches, or those of load.duration_s. Raises EngineLost."""
        load = self.experiment.load
        began_ns = time.monotonic_ns()
        ends_ns = began_ns + round(load.duration_s * 1e9)
        self.folder.write_meta(window={"started_at": self._at(began_ns), "ended_at": None})
        left = None if load.requests == "none" else load.requests
        number = 0
        try:
            while load.batches == "none" or number < load.batches:
                if left == 0 or time.monotonic_ns() >= ends_ns:
                    break
                if number and load.batch_pause_s:
                    time.sleep(max(0.0, min(load.batch_pause_s, (ends_ns - time.monotonic_ns()) / 1e9)))
                    if time.monotonic_ns() >= ends_ns:
                        break
                count = load.batch if left is None else min(load.batch, left)
                due_ns, number = time.monotonic_ns(), number + 1
                records = self.batch(count, "measure", due_ns, ends_ns)
                left = None if left is None else left - count
                took = (time.monotonic_ns() - due_ns) / 1e9
                ok = [record for record in records if record.status == "ok"]
                tokens = sum(record.output_tokens or 0 for record in ok)
                say(f"batch {number}: {len(ok)} of {count} requests ok in {took:.2f} s, {tokens / took:.1f} tokens/s")
        finally:
            ended_at = self._at(min(time.monotonic_ns(), ends_ns))
            self.folder.write_meta(window=self.folder.meta["window"] | {"ended_at": ended_at})

    def batch(self, count: int, phase: Phase, due_ns: int, ends_ns: int | None) -> list[Record]:
        """Hand over so many requests, and write a record of each. Raises EngineLost, after the records."""
        taken = list(islice(self.plans, count))
        limit = time.monotonic() + self.experiment.timeouts.total_s
        drained = limit if ends_ns is None else ends_ns / 1e9 + self.experiment.load.drain_s
        handed_ns = time.monotonic_ns()
        try:
            done, answers = self.engine.batch(taken, min(limit, drained))
        except EngineLost as lost:
            if lost.status == "timeout" and drained < limit:
                lost = EngineLost("cut off when the run stopped", "cancelled", STOPPED)
            self._lose(taken, phase, due_ns, handed_ns, lost.status, lost.kind, str(lost))
            raise lost from None
        except KeyboardInterrupt:
            self._lose(taken, phase, due_ns, handed_ns, "cancelled", STOPPED, "cut off when the run stopped")
            raise
        records = [self._record(plan, phase, due_ns, done, answers[plan.request_id]) for plan in taken]
        self.folder.append(b"".join(map(encode_record, records)))
        return records

    def _lose(
        self, taken: Sequence[Plan], phase: Phase, due_ns: int, sent_ns: int, status: Status, kind: str, why: str
    ) -> None:
        ended_ns = time.monotonic_ns()
        common: dict[str, Any] = {"sent_at": self._at(sent_ns), "ended_at": self._at(ended_ns), "error_message": why}
        records = [Record(**self._who(plan, phase, due_ns), **common, status=status, error_kind=kind) for plan in taken]
        self.folder.append(b"".join(map(encode_record, records)))

    def _record(self, plan: Plan, phase: Phase, due_ns: int, done: Done, answer: Answer) -> Record:
        marks = [0, *((at - done.sent_ns + 500) // 1000 for at, _ in answer.steps)]  # so that rounding does not add up
        kinds, tokens = chunks_of(answer)
        return Record(
            **self._who(plan, phase, due_ns),
            sent_at=self._at(done.sent_ns),
            ended_at=self._at(answer.ended_ns),
            chunk_us=[later - earlier for earlier, later in pairwise(marks)],
            chunk_tokens=tokens,
            chunk_kinds=run_lengths(kinds),
            prompt_tokens=answer.prompt_tokens or None,
            output_tokens=answer.output_tokens if answer.error is None else None,
            cached_tokens=answer.cached_tokens,
            token_source="usage" if answer.error is None else None,
            finish_reason=answer.finish_reason,
            status="ok" if answer.error is None else "error",
            error_kind=answer.error_kind,
            error_message=answer.error,
            output_text=answer.text if self.experiment.output_text and answer.error is None else None,
        )

    def _who(self, plan: Plan, phase: Phase, due_ns: int) -> dict[str, Any]:
        """What is known of a request before it is sent."""
        return {
            "request_id": plan.request_id, "target": self.target, "prompt_id": plan.prompt.id,
            "session": plan.prompt.session, "turn": plan.prompt.turn, "user": 0, "worker": 0, "phase": phase,
            "intended_at": self._at(due_ns), "max_tokens": plan.max_tokens,
            "expected_output_tokens": plan.prompt.expected_output_tokens,
        }  # fmt: skip

    def _at(self, ns: int) -> float:
        return round((ns - self.zero_ns) / 1e9, 6)

    def note(self, text: str) -> None:
        """Something the user should know, now and in the report."""
        note(self.folder, text)


def chunks_of(answer: Answer) -> tuple[list[Kind], list[int | None] | None]:
    """Kind and tokens of each step, as a record has them: the end token is the finish, and no token that a reader sees.

    The tokens are None where each token chunk holds one.
    """
    kinds: list[Kind] = ["content"] * len(answer.steps)
    tokens: list[int | None] = [count for _, count in answer.steps]
    if answer.finish_reason == "stop" and tokens:
        last = (tokens[-1] or 1) - 1
        tokens[-1] = last
        kinds[-1] = "content" if last else "finish"
    is_plain = all(count == (kind == "content") for count, kind in zip(tokens, kinds, strict=True))
    return kinds, None if is_plain else tokens


def run(experiment: Experiment, overrides: Sequence[str], path: Path | None = None) -> tuple[Path, str]:
    """Run it; its folder, and its status as run.json has it: finished, interrupted or failed (the engine was lost).

    What was measured until then is kept. Raises TwoclocksError where nothing could be measured.
    """
    start = experiment.target.start
    assert start is not None
    load_workload(experiment)  # so that what cannot be read is told before anything is started
    folder = RunFolder.create(experiment, path)
    zero_ns = time.monotonic_ns()
    folder.write_meta(
        **first_meta(zero_ns),
        overrides=masked(dict(masked_word(word).partition("=")[::2] for word in overrides)),
        labels=experiment.labels,
        target={"name": experiment.target.name or experiment.target.server, "server": experiment.target.server,
                "api": experiment.target.api, "model": start.model},
        workers=1,
    )  # fmt: skip
    say(f"run folder: {folder.path}")
    status = "failed"
    try:
        with started_engine(start, folder.path / LOG, say) as (engine, told):
            model = str(told["model"])
            folder.write_meta(versions=told.pop("versions"))
            folder.write_meta(target=folder.meta["target"] | told)
            note(folder, HOW + ENDS[start.kind] + GREEDY)
            with _collecting(experiment, folder, zero_ns):
                measuring = InProcessRun(experiment, folder, zero_ns, engine, model)
                try:
                    measuring.warm_up()
                    engine.forget_peaks()
                except EngineLost as lost:
                    raise TargetError(f"{start.kind} while warming up: {lost}") from None
                try:
                    measuring.measure()
                    folder.write_meta(memory=engine.memory())
                    status = "finished"
                except EngineLost as lost:
                    status = "finished" if lost.kind == STOPPED else "failed"
                    note(folder, f"{lost}; the memory that the engine took is not known")
    except KeyboardInterrupt:
        status = "interrupted"
    except TwoclocksError as error:
        note(folder, str(error))
        raise
    finally:
        ended_at = (time.monotonic_ns() - zero_ns) / 1e9
        folder.write_meta(
            status=status, ended_at=ended_at, in_flight=0, not_sent=0,
            unwritten_records=folder.unwritten["requests.jsonl"],
        )  # fmt: skip
        folder.close()
    return folder.path, status


@contextlib.contextmanager
def _collecting(experiment: Experiment, folder: RunFolder, zero_ns: int) -> Iterator[None]:
    """The GPUs, if there are any: the same collectors as of any run, which have no page and no span to read here."""
    collect = experiment.collect
    job = Job(
        run_folder=str(folder.path), zero_ns=zero_ns, metrics_urls=[], interval_s=collect.metrics_interval_s,
        headers={}, tls_verify=True, gpu=collect.gpu,
    )  # fmt: skip
    collectors = Collectors(job)
    try:
        for text in collectors.notes:
            note(folder, text)
        yield
    finally:
        for text in collectors.stop():
            note(folder, text)


def note(folder: RunFolder, text: str) -> None:
    """Something the user should know, in run.json; and now, where it is news."""
    log.info(plain(text))
    folder.write_meta(notes=[*folder.meta["notes"], text])


def say(text: str) -> None:
    """Progress, a line of standard error."""
    sys.stderr.write(f"twoclocks: {plain(text)}\n")
    sys.stderr.flush()


def _report(folder: Path) -> int:
    """In a process of its own, since it imports what draws."""
    return subprocess.run([sys.executable, "-m", "twoclocks", "report", str(folder)], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as of every command; 130 when it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m twoclocks.in_process",
        description="Run batches through an engine without a server (target.api: in-process).",
        epilog="Example: python -m twoclocks.in_process --experiment configs/x.yaml --set load.batch=16",
    )
    parser.add_argument("--experiment", metavar="FILE", type=Path, required=True)
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one of its keys")
    parser.add_argument("--target", metavar="NAME", help="which of the experiment's targets to take")
    parser.add_argument("--variant", metavar="NAME", help="which of its variants")
    parser.add_argument("--run-folder", metavar="PATH", type=Path, help="of this run; it must not exist yet")
    parser.add_argument("--no-report", action="store_true", help="leave the report to a later `twoclocks report`")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        experiment = load_experiment(options.experiment, options.set, target=options.target, variant=options.variant)
        if experiment.target.api != "in-process":
            raise TwoclocksError(
                f"{options.experiment}: target.api: expected in-process, found {experiment.target.api}"
            )
        if options.run_folder is not None:
            refuse_existing(options.run_folder)
        folder, status = run(experiment, options.set, options.run_folder)
    except TwoclocksError as error:
        say(" ".join(str(error).split()))
        return error.exit_code
    except KeyboardInterrupt:  # before there was a folder
        return INTERRUPTED
    code = 0 if options.no_report else _report(folder)
    sys.stdout.write(f"run folder: {folder}\n")
    return {"finished": code, "interrupted": INTERRUPTED}.get(status, TargetError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
