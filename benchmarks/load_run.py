"""What it takes to load a long run: 50 million chunks written as records, then `load_run` in a process of its own.

    python benchmarks/load_run.py [--chunks 50000000]

Prints bytes a chunk on disk, seconds and peak memory of load_run, and of the chunks as a DataFrame.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from twoclocks.record import Record, encode_record

CHUNKS_A_REQUEST = 211
"""The mean answer, in tokens, of the conversation trace in Azure's AzureLLMInferenceTrace of 2023."""


def write(folder: Path, chunks: int) -> int:
    """Records of CHUNKS_A_REQUEST chunks with gaps around 20 ms; their size in bytes."""
    rng = np.random.default_rng(1)
    with (folder / "requests.jsonl").open("wb") as file:
        for number in range(chunks // (CHUNKS_A_REQUEST + 2)):
            at = round(number * 0.001234567, 6)
            gaps = rng.normal(20_000, 3_000, CHUNKS_A_REQUEST + 2).astype(int)
            record = Record(
                request_id=f"{number:032x}",
                target="vllm",
                prompt_id=f"demo-{number % 100:03d}",
                user=number % 500,
                worker=0,
                phase="measure",
                intended_at=at,
                sent_at=round(at + 0.000012, 6),
                written_at=round(at + 0.00002, 6),
                first_byte_at=round(at + 0.1, 6),
                ended_at=round(at + 4.32, 6),
                chunk_us=gaps.tolist(),
                chunk_kinds=[("role", 1), ("content", CHUNKS_A_REQUEST), ("usage", 1)],
                max_tokens=CHUNKS_A_REQUEST,
                timestamp_source="kernel",
                prompt_tokens=100,
                output_tokens=CHUNKS_A_REQUEST,
                token_source="usage",
                finish_reason="length",
                http_status=200,
                status="ok",
            )
            file.write(encode_record(record))
    window = {"started_at": 0.0, "ended_at": chunks / CHUNKS_A_REQUEST * 0.0013 + 5}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "window": window}))
    return (folder / "requests.jsonl").stat().st_size


def load(folder: str) -> None:
    """In the child: load, and say what it took."""
    import twoclocks

    began = time.monotonic()
    run = twoclocks.load_run(folder)
    loaded = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    rows = len(run.chunks)
    both = time.monotonic() - began
    peak_both = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"load_run: {loaded:.1f} s, peak {peak:.2f} GiB")
    print(f"with {rows:,} chunks as columns: {both:.1f} s, peak {peak_both:.2f} GiB")


def main() -> None:
    """Write the records, then load them in a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=50_000_000)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.chunks)
        print(f"{options.chunks:,} chunks: {size / 1e9:.2f} GB, {size / options.chunks:.2f} bytes a chunk", flush=True)
        subprocess.run([sys.executable, __file__, "--load", folder], check=True)


if __name__ == "__main__":
    main()
