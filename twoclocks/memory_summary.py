"""Memory of a run: what its files, its processes, its GPUs and its server's /metrics say -> rows of one table.

Each row is a quantity of its own, with where it comes from and what it means; what is not known has no row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from twoclocks.expositions import Scrapes
from twoclocks.load import Run

Row = dict[str, Any]
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
KV_CONFIG = "vllm:cache_config_info"


def memory_rows(run: Run) -> list[Row]:
    """Rows of {name, bytes, source, definition}: what run.json brings, then what is computed here.

    A peak of samples has their number, n.
    """
    brought = [row for row in run.meta.get("memory") or [] if _is_row(row)]
    own = [*_weights(run), *_kv_cache(run), *_process(run), *_gpus(run)]
    names = {row["name"] for row in brought}
    return [*brought, *(row for row in own if row["name"] not in names)]


def _row(name: str, size: float, source: str, definition: str) -> Row:
    return {"name": name, "bytes": round(size), "source": source, "definition": definition}


def _is_row(row: object) -> bool:
    """A run folder may come from anywhere."""
    texts = ("name", "source", "definition")
    return (
        isinstance(row, dict) and isinstance(row.get("bytes"), int) and all(isinstance(row.get(t), str) for t in texts)
    )


def _started(run: Run) -> dict[str, Any]:
    """What run.json tells of a server that was started for the run."""
    started = (run.meta.get("target") or {}).get("started")
    return started if isinstance(started, dict) else {}


def _weights(run: Run) -> list[Row]:
    started = _started(run)
    size = started.get("weights_on_disk_bytes")
    if not isinstance(size, int):
        return []
    text = "size of the model's weight files; in memory they are larger or smaller if they are loaded as another dtype"
    return [_row("weights_on_disk", size, str(started.get("model_folder") or started.get("model")), text)]


def _kv_cache(run: Run) -> list[Row]:
    """Of vLLM: the blocks that it reserved, and the most that were in use at once, over all engines and replicas."""
    per_token = _started(run).get("kv_bytes_per_token")
    per_token = per_token if isinstance(per_token, int) else None
    reserved, used = 0.0, 0.0
    told = [(scrapes, engine, config) for scrapes in run.scrapes for engine, config in _configs(scrapes).items()]
    sizes = [_reserved(config, per_token) for _, _, config in told]
    if not sizes or None in sizes:
        return []
    for (scrapes, engine, config), size in zip(told, sizes, strict=True):
        assert size is not None
        reserved += size
        # of several engines the peaks need not be at the same time, so that their sum is an upper bound
        blocks = float(config["num_gpu_blocks"])
        peak = _peak_usage(scrapes, engine, run.window)
        used += np.nan if peak is None else peak * size * (blocks - 1) / blocks
    how = (
        f"num_gpu_blocks x block_size x {per_token:,} bytes a token, from the model's config.json"
        if per_token is not None
        else "kv_cache_memory_bytes, as it was set"
    )
    rows = [_row("kv_reserved", reserved, KV_CONFIG, f"{how}: taken at the start, whatever is used of it")]
    if used > 0:  # else nobody told, or every request came and went between two scrapes
        several = "; of several engines the sum of their peaks, an upper bound" if len(told) > 1 else ""
        text = (
            "largest share of blocks in use in any scrape of the measuring window x kv_reserved, without vLLM's null "
            "block; a block that requests share counts once, one that is kept for its prefix alone does not count"
            f"; what came and went between two scrapes was not seen{several}"
        )
        rows.append(_row("kv_used_peak", used, KV_USAGE[0], text))
    return rows


def _configs(scrapes: Scrapes) -> dict[str, dict[str, str]]:
    """Engine -> the labels of its cache_config_info."""
    labels = [dict(scrapes.series[column][1]) for column in scrapes.columns.get(KV_CONFIG, [])]
    return {one.get("engine", ""): one for one in labels if one.get("num_gpu_blocks", "").isdigit()}


def _reserved(config: dict[str, str], per_token: int | None) -> float | None:
    if int(config["num_gpu_blocks"]) < 1:
        return None
    if per_token is not None and config.get("block_size", "").isdigit():
        return float(int(config["num_gpu_blocks"]) * int(config["block_size"]) * per_token)
    set_bytes = config.get("kv_cache_memory_bytes", "")
    return float(set_bytes) if set_bytes.isdigit() else None


def _peak_usage(scrapes: Scrapes, engine: str, window: tuple[float, float]) -> float | None:
    """Largest share of blocks in use; None if no scrape of the window told one."""
    name = next((name for name in KV_USAGE if name in scrapes.columns), None)
    if name is None:
        return None
    columns = [c for c in scrapes.columns[name] if dict(scrapes.series[c][1]).get("engine", "") == engine]
    inside = (scrapes.until >= window[0]) & (scrapes.at <= window[1])
    values = scrapes.values[inside][:, columns]
    return float(np.nanmax(values)) if (~np.isnan(values)).any() else None


def _process(run: Run) -> list[Row]:
    """Peaks of the process tree that was sampled."""
    samples = [row for row in run.process_samples if run.window[0] <= row["at"] <= run.window[1]]
    rows = []
    for kind, meaning in (
        ("pss", "of pages that several of the processes share, each counts its part (PSS)"),
        ("rss", "pages that several of the processes share count once for each (RSS)"),
    ):
        sizes = [row[f"{kind}_bytes"] for row in samples if row.get(f"{kind}_bytes") is not None]
        if sizes:
            text = (
                "largest resident memory of the server's process and all that it started, in any sample of the "
                f"measuring window; {meaning}. Weights, KV cache and the program are in it, memory on a GPU is not"
            )
            source = "smaps_rollup" if kind == "pss" else "statm"
            rows.append(_row(f"process_{kind}_peak", max(sizes), f"/proc/PID/{source}", text) | {"n": len(sizes)})
    return rows


def _gpus(run: Run) -> list[Row]:
    """Of all GPUs together, since a sample reads them at one instant."""
    totals: dict[float, list[float | None]] = {}
    for row in run.gpu_samples:
        if "error" not in row and run.window[0] <= row["at"] <= run.window[1]:
            totals.setdefault(row["at"], []).append(row.get("memory_used_bytes"))
    known = [sum(size for size in sizes if size is not None) for sizes in totals.values() if None not in sizes]
    if not known:
        return []
    count = max(map(len, totals.values()))
    text = f"largest memory in use of {count} GPU{'s' if count > 1 else ''} in any sample, of whatever process"
    return [_row("gpu_used_peak", max(known), _sources(run.gpu_samples), text)]


def _sources(rows: Sequence[Row]) -> str:
    return " and ".join(sorted({str(row["source"]) for row in rows if "source" in row}))
