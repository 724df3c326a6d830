"""Fixtures: a real vLLM and a real `transformers serve` on a random 5 M-parameter Llama, started once a test file.

They install what is missing (scripts/prepare.py): the first use on a machine takes minutes, later ones the start alone.
"""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from twoclocks.interpreters import ENVIRONMENTS
from twoclocks.otlp_receiver import Receiver, SpanStore
from twoclocks.servers import Server, ServerKind, free_port, started_server

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "tiny-random-llama"


def prepared(*names: str) -> dict[str, Path]:
    """Makes what is missing; the Python of an environment and the folder of a model, by name."""
    command = [sys.executable, str(ROOT / "scripts" / "prepare.py"), *names]
    # Progress is left to standard error, for `pytest -s` and for CI's log of a slow first run.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(
            f"scripts/prepare.py could not make {', '.join(names)}; its reason is on standard error", pytrace=False
        )
    return {name: Path(path) for name, _, path in (line.partition("=") for line in done.stdout.splitlines())}


def started(kind: ServerKind, log_folder: Path, *flags: str) -> Iterator[Server]:
    paths = prepared(ENVIRONMENTS[kind], "tiny")
    with started_server(
        kind=kind,
        python=paths[ENVIRONMENTS[kind]],
        model=paths["tiny"],
        served_model_name=MODEL_NAME,
        log_path=log_folder / "server.log",
        flags=flags,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def otlp_port() -> int:
    """Where the real vLLM sends its spans; whoever runs a test against it listens there."""
    return free_port()


@pytest.fixture(scope="module")
def real_vllm(tmp_path_factory: pytest.TempPathFactory, otlp_port: int) -> Iterator[Server]:
    """vLLM with per-request metrics and spans, and a KV cache so small that a few long answers fill it."""
    flags = ["--max-model-len", "1024", "--max-num-seqs", "16", "--num-gpu-blocks-override", "9"]
    flags += ["--otlp-traces-endpoint", f"http://127.0.0.1:{otlp_port}/v1/traces"]
    yield from started("vllm", tmp_path_factory.mktemp("vllm"), *flags)


@pytest.fixture(scope="module")
def exporting_vllm(real_vllm: Server, otlp_port: int, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The same, once its exporter has got rid of what it saved up while nobody listened, and is in no pause."""
    folder, own = tmp_path_factory.mktemp("drained"), uuid.uuid4().hex
    receiver = Receiver(SpanStore(folder, {}, time.monotonic), "127.0.0.1", otlp_port, None)
    try:
        asked = {"model": real_vllm.model, "prompt": "Hello", "max_tokens": 1}
        headers = {"traceparent": f"00-{own}-{own[:16]}-01", "x-request-id": own}
        httpx.post(f"{real_vllm.url}/v1/completions", json=asked, headers=headers, timeout=60).raise_for_status()
        until = time.monotonic() + 120
        while own not in receiver.store.told_of.get("vllm", ()):
            assert time.monotonic() < until, "vLLM exported no span of a request for two minutes"
            time.sleep(0.2)
    finally:
        receiver.close()
    return real_vllm


@pytest.fixture(scope="module")
def real_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve` with continuous batching."""
    yield from started("transformers", tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve` as it starts by itself, without continuous batching."""
    yield from started("transformers", tmp_path_factory.mktemp("plain"), "--no-continuous-batching")
