"""Arrivals: records -> the arrival of every chunk, as the parallel arrays that metrics computes with.

The same arrays for a finished run and for one that goes on. Pure; numpy only.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from twoclocks.errors import RunFolderError
from twoclocks.metrics import Floats
from twoclocks.record import KINDS, TOKEN_KINDS, Record


def chunk_columns(records: Sequence[Record], path: Path, first_row: int) -> list[Any]:
    """The columns of Chunks, then chunk_us and each record's number of chunks; ``first_row`` records came before."""
    counts = np.array([len(record.chunk_us) for record in records], dtype=np.int64)
    for row, (record, count) in enumerate(zip(records, counts, strict=True), first_row + 1):
        expected = {
            "chunk_kinds": sum(run for _, run in record.chunk_kinds),
            "chunk_choice": count if record.chunk_choice is None else sum(run for _, run in record.chunk_choice),
            "chunk_tokens": count if record.chunk_tokens is None else len(record.chunk_tokens),
        }
        for name, length in expected.items():
            if length != count:
                raise RunFolderError(f"{path} line {row}: {name} tells of {length} chunks, chunk_us of {count}")
    request = np.repeat(np.arange(len(records), dtype=np.int32), counts)
    micros = np.fromiter(chain.from_iterable(r.chunk_us for r in records), dtype=np.int64, count=int(counts.sum()))
    elapsed = np.cumsum(micros)
    starts = np.cumsum(counts) - counts
    before = np.concatenate([[0], elapsed])[starts]  # what had elapsed over all requests before this one's first chunk
    sent_at = floats([record.sent_at for record in records])
    kind = _expand([run for record in records for run in record.chunk_kinds], {k: i for i, k in enumerate(KINDS)})
    is_token = np.isin(kind, [KINDS.index(name) for name in TOKEN_KINDS])
    tokens = is_token.astype(np.float64)
    choice = np.zeros(len(kind), dtype=np.int16)
    for record, start, count in zip(records, starts, counts, strict=True):
        if record.chunk_tokens is not None:
            tokens[start : start + count] = floats(record.chunk_tokens)
        if record.chunk_choice is not None:
            choice[start : start + count] = _expand(record.chunk_choice)
    tokens[np.isnan(tokens) & ~is_token] = 0.0  # no text and no count: no token
    at = sent_at[request] + (elapsed - before[request]) / 1e6
    return [request + np.int32(first_row), at, tokens, kind, is_token, choice, micros, counts]


def _expand(runs: Sequence[tuple[Any, int]], codes: dict[Any, int] | None = None) -> Any:
    values = [codes[value] if codes else value for value, _ in runs]
    dtype = np.int8 if codes else np.int16
    return np.repeat(np.array(values, dtype=dtype), np.array([count for _, count in runs], dtype=np.int64))


def floats(values: Sequence[float | None]) -> Floats:
    """A column; NaN for None."""
    return np.array(values, dtype=np.float64)  # numpy reads None as NaN
