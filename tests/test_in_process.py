"""Runs without a server, with an engine of our own behind the real protocol: what comes out are its own stamps."""

import json
import signal
import sys
from pathlib import Path

import pytest

from twoclocks import in_process, load_run
from twoclocks.errors import TargetError
from twoclocks.experiment import load_experiment
from twoclocks.interpreters import Probe
from twoclocks.models import Model
from twoclocks.record import expand
from twoclocks.start import Plan

ENGINES = Path(in_process.__file__).parent / "engines"

# Row n of a batch makes 2 + n tokens, a step each; what it stamped goes into the file named by the second flag.
FAKE = """
import json, os, signal, sys, time
sys.path.insert(0, {engines!r})
import in_process_engine
from asks import Answer, Refused

class Fake:
    def __init__(self, how, log):
        self.how, self.log, self.batches = how, log, 0
    def told(self):
        return {{"server_version": "7", "versions": {{"fake": "7"}}, "device": "cpu", "dtype": "float32", "threads": 1}}
    def encode(self, ask):
        if self.how == "refuses" or "long" in str(ask.messages or ask.prompt):
            raise Refused("the prompt has 9 tokens")
        return [1, 2, 3]
    def generate(self, asks, prompts):
        self.batches += 1
        if self.how == "dies" and self.batches == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "ends" and self.batches == 3:
            sys.stderr.write("RuntimeError: worker lost\\n")
            os._exit(5)
        if self.how == "short" and self.batches == 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        if self.how == "slow" and self.batches == 3:
            time.sleep(600)
        answers = [Answer(ask.id, prompt_tokens=3) for ask in asks]
        for step in range(1 + len(asks)):
            time.sleep(0.002)
            now = time.monotonic_ns()
            for row, answer in enumerate(answers):
                if step < 2 + row:
                    answer.token_ids.append(step)
                    answer.steps.append((now, 1))
        for row, answer in enumerate(answers):
            answer.finish_reason = "stop" if row == 0 else "length"
            answer.text, answer.cached_tokens, answer.ended_ns = "ab", 2, time.monotonic_ns()
        with open(self.log, "a") as file:
            for answer in answers:
                file.write(json.dumps([answer.id, answer.steps, answer.ended_ns]) + "\\n")
        return answers
    def forget_peaks(self):
        self.batches = 1
    def memory(self):
        return [{{"name": "weights", "bytes": 12, "source": "fake", "definition": "twelve"}}]

def load(kind, model, flags):
    how = flags[0]
    if how == "none":
        raise ImportError("No module named 'torch'", name="torch")
    if how == "large":
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
    if how == "flags":
        raise SystemExit(2)
    return Fake(*flags)

in_process_engine.load = load
sys.exit(in_process_engine.main(sys.argv[1:]))
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """experiment(how, *settings): one whose engine is the fake."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE.format(engines=str(ENGINES)))
    monkeypatch.setattr(in_process, "CHILD", program)
    model = Model("/models/tiny", Path("/models/tiny"), 12)
    monkeypatch.setattr(in_process, "check", lambda start: Plan(start, Path(sys.executable), model, Probe(versions={})))
    (tmp_path / "requests.jsonl").write_text(
        "".join(json.dumps({"id": f"p{n}", "prompt": f"say {n}"}) + "\n" for n in range(20))
    )
    (tmp_path / "x.yaml").write_text(
        f"target: {{server: pytorch, api: in-process, start: {{kind: pytorch, model: tiny}}}}\n"
        f"workload: {{requests: {tmp_path / 'requests.jsonl'}, order: in-order}}\n"
        "load: {shape: batch, batch: 3, batches: 2}\nwarmup: {requests: 2}\ncollect: {gpu: none}\n"
    )

    def experiment(how, *settings):
        flags = f"target.start.flags=[{how}, {tmp_path / 'stamps.jsonl'}]"
        return load_experiment(tmp_path / "x.yaml", [flags, *settings])

    return experiment


def test_records_are_the_engines_own_stamps(engine, tmp_path):
    folder, status = in_process.run(engine("fine", "output_text=true"), ["a=b"], tmp_path / "run")
    run = load_run(folder)
    stamped = {
        one: (steps, ended)
        for one, steps, ended in map(json.loads, (tmp_path / "stamps.jsonl").read_text().splitlines())
    }
    zero_ns = (run.requests["ended_at"] * 1e9 - [stamped[one][1] for one in run.requests["request_id"]]).round()

    assert (status, run.meta["status"], run.partial) == ("finished", "finished", False)
    assert list(run.requests["phase"]) == ["warmup"] * 2 + ["measure"] * 6
    assert list(run.requests["prompt_id"]) == [f"p{n}" for n in range(8)]
    assert zero_ns.max() - zero_ns.min() <= 2000  # one clock; records hold microseconds
    for row in run.requests.itertuples():
        steps, _ = stamped[row.request_id]
        at = row.sent_at + row.chunk_us.cumsum() / 1e6
        assert at == pytest.approx([(ns + zero_ns.median()) / 1e9 for ns, _ in steps], abs=3e-6)
        assert row.output_tokens == len(steps)
        assert expand(row.chunk_kinds) == ["content"] * (len(steps) - 1) + [
            "finish" if row.finish_reason == "stop" else "content"
        ]
    batches = run.measured.groupby("intended_at")
    assert [len(batch) for _, batch in batches] == [3, 3]
    assert all(batch["sent_at"].nunique() == 1 for _, batch in batches)
    assert (run.requests["sent_at"] >= run.requests["intended_at"]).all()
    assert set(run.requests["output_text"]) == {"ab"}
    assert run.meta["target"]["device"] == "cpu"
    assert [row["name"] for row in run.meta["memory"]] == ["weights", "process_rss_peak"]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (["load.requests=5", "load.batches=none"], [3, 2]),
        (["load.batch=1", "load.batches=4"], [1, 1, 1, 1]),
        (["load.batches=9", "load.requests=3"], [3]),
    ],
)
def test_limits(engine, tmp_path, settings, sizes):
    folder, _ = in_process.run(engine("fine", *settings), [], tmp_path / "run")
    counts = load_run(folder).measured.groupby("intended_at").size()

    assert list(counts) == sizes


def test_what_the_engine_refuses_is_a_record_and_the_others_go_on(engine, tmp_path):
    (tmp_path / "requests.jsonl").write_text(
        '{"prompt": "a long one"}\n{"prompt": "x"}\n{"prompt": "y", "stop": "."}\n'
    )
    folder, status = in_process.run(engine("fine", "load.batches=1", "warmup.requests=0"), [], tmp_path / "run")
    rows = load_run(folder).measured.set_index("prompt_id")

    assert status == "finished"
    assert list(rows.loc[["1", "2", "3"], "status"]) == ["error", "ok", "error"]
    assert rows.loc["1", "error_message"] == "the prompt has 9 tokens"
    assert "'stop' is not known" in rows.loc["3", "error_message"]


def test_an_engine_that_answers_nothing_of_the_warm_up_ends_the_run_in_one_line(engine, tmp_path):
    with pytest.raises(TargetError, match="none of the warm-up's requests: the prompt has 9 tokens"):
        in_process.run(engine("refuses"), [], tmp_path / "run")

    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", "was killed, as a system does that runs out of memory"),
        ("ends", "exit code 5.*RuntimeError: worker lost"),
    ],
)
def test_an_engine_that_is_lost_leaves_what_was_measured(engine, tmp_path, how, said):
    folder, status = in_process.run(engine(how, "load.batches=9"), [], tmp_path / "run")
    run = load_run(folder)

    assert (status, run.meta["status"]) == ("failed", "failed")
    assert list(run.measured["status"]) == ["ok"] * 3 + ["error"] * 3
    assert set(run.measured["error_kind"][3:]) == {"engine_ended"}
    assert run.measured["error_message"].iloc[-1] in " ".join(run.meta["notes"])
    assert run.measured["error_message"].str.contains(said, regex=True)[3:].all()
    assert "memory" not in run.meta


def test_memory_that_runs_out_in_a_batch_is_told_of_its_requests_alone(engine, tmp_path):
    folder, status = in_process.run(engine("short"), [], tmp_path / "run")
    rows = load_run(folder).measured

    assert status == "finished"
    assert list(rows["error_kind"][:3]) == ["out_of_memory"] * 3
    assert list(rows["status"][3:]) == ["ok"] * 3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("none", "has no torch .*; name another in target.start.python"),
        ("large", "not enough memory to load /models/tiny: CUDA out of memory"),
        ("flags", "target.start.flags: the engine does not know them"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(engine, tmp_path, how, said):
    with pytest.raises(TargetError, match=said) as raised:
        in_process.run(engine(how), [], tmp_path / "run")

    assert "\n" not in str(raised.value)
    assert str(tmp_path / "run" / "engine.log") in str(raised.value)


def test_the_end_of_the_time_cuts_a_batch_off_after_the_drain(engine, tmp_path):
    settings = ("load.batches=9", "load.duration_s=1", "load.drain_s=0.3", "load.batch_pause_s=0.05")
    folder, status = in_process.run(engine("slow", *settings), [], tmp_path / "run")
    run = load_run(folder)

    assert status == "finished"
    assert list(run.measured["status"]) == ["ok"] * 3 + ["cancelled"] * 3
    assert run.window[1] - run.window[0] == pytest.approx(1, abs=1e-3)
    assert (run.measured["ended_at"][3:] >= run.window[1] + 0.3).all()


def test_ctrl_c_keeps_what_was_measured_and_ends_the_engine(engine, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    batches = []
    before, say = signal.signal(signal.SIGALRM, interrupt), in_process.say

    def saying(text):
        batches.append(text)
        if text.startswith("batch 1"):
            signal.setitimer(signal.ITIMER_REAL, 0.5)  # in the second, which lasts

    in_process.say = saying
    try:
        folder, status = in_process.run(engine("slow", "load.batches=9"), [], tmp_path / "run")
    finally:
        in_process.say = say
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    run = load_run(folder)

    assert (status, run.meta["status"]) == ("interrupted", "interrupted")
    assert list(run.measured["status"]) == ["ok"] * 3 + ["cancelled"] * 3
    assert run.window[1] == pytest.approx(float(run.measured["ended_at"].max()), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["load.shape=ramp"], "set load.shape: batch, found ramp"),
        (["target.start=null"], "target.start with kind pytorch or vllm"),
        (["target.server=vllm"], "write target.server: pytorch"),
        (["workload.patience_s=1"], "nobody waits between turns or hangs up"),
    ],
)
def test_experiments_that_cannot_run_so(engine, settings, said):
    with pytest.raises(Exception, match=said):
        engine("fine", *settings)
