"""Tables: a run folder -> one file of it for other programs: CSV, Parquet, markdown, or vLLM's layout.

CSV and Parquet have a row a request, or a row a chunk, with the columns of `load_run`: seconds on the run's clock.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from twoclocks import rosetta_text, units, wording
from twoclocks.errors import RunFolderError, TwoclocksError, plain
from twoclocks.load import Run, load_run
from twoclocks.report import heading
from twoclocks.summary import summarise
from twoclocks.vllm_bench import write_vllm_bench

Format = Literal["csv", "parquet", "markdown", "vllm-bench"]
Table = Literal["requests", "chunks"]
TABLES: tuple[Table, ...] = get_args(Table)
NESTED = ("chunk_us", "chunk_tokens", "chunk_kinds", "chunk_choice", "server")
"""Columns of lists and objects: the chunks have a table of their own, the server's timings columns of their own."""
FORMULA = ("=", "+", "-", "@")
"""With these a spreadsheet takes a text for a formula, and the text may be a server's."""


def export(folder: Path, kind: Format, table: Table = "requests", out: Path | None = None) -> Path:
    """Write a run as one file, by default into its folder; where it lies. Raises TwoclocksError, RunFolderError."""
    run = load_run(folder)
    names = {"csv": f"{table}.csv", "parquet": f"{table}.parquet"}
    names |= {"markdown": "summary.md", "vllm-bench": "vllm_bench.json"}
    write: dict[Format, Callable[[Path], Any]] = {
        "csv": lambda path: _frame(run, table).to_csv(path, index=False),
        "parquet": lambda path: _parquet(_frame(run, table), path),
        "markdown": lambda path: path.write_text(markdown(run), encoding="utf-8"),
        "vllm-bench": lambda path: write_vllm_bench(run, path),
    }
    path = out or run.path / names[kind]
    try:
        write[kind](path)
    except OSError as error:
        raise RunFolderError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None
    return path


def markdown(run: Run) -> str:
    """The run's latencies, rates and Rosetta table, in GitHub's markdown."""
    summary = summarise(run)
    figures = summary["figures"]
    lines = [f"## {_cell(heading(run))}", "", f"{summary['verdict']['level']}.", ""]
    lines += ["| metric | unit | n | mean | p50 | p95 | p99 |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in (name for name in wording.LABELS if name in figures):
        one = figures[name]
        values = [units.number(one[key], one["unit"]) for key in ("mean", "p50", "p95", "p99")]
        cells = [wording.LABELS[name], units.shown_unit(one["unit"]), f"{one['n']:,}", *values]
        lines.append(f"| {' | '.join(cells)} |")
    rates = ("requests", "ok", "failed", "request_throughput", "output_throughput", "goodput", "goodput_share")
    lines += ["", "| | |", "| --- | ---: |"]
    for name in (name for name in rates if name in figures):
        one = figures[name]
        shown = f"{units.number(one['value'], one['unit'])} {one['unit'] if '/s' in one['unit'] else ''}"
        lines.append(f"| {name.replace('_', ' ')} | {shown.strip()} |")
    return "\n".join([*lines, "", rosetta_text.markdown(summary["rosetta"])])


def _frame(run: Run, table: Table) -> pd.DataFrame:
    frame = run.chunks if table == "chunks" else run.requests.drop(columns=list(NESTED))
    texts = [name for name in frame.columns if frame[name].dtype == object]
    return frame.assign(**{name: frame[name].map(_text, na_action="ignore") for name in texts})


def _text(value: Any) -> Any:
    """A text without control characters, and never a formula."""
    if not isinstance(value, str):
        return value
    clean = plain(value)
    return f"'{clean}" if clean.startswith(FORMULA) else clean


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    try:
        frame.to_parquet(path, engine="pyarrow", index=False)
    except ImportError:
        raise TwoclocksError("Parquet needs pyarrow, which is not installed here: pip install pyarrow") from None


def _cell(text: str) -> str:
    """Text in markdown: one line, no table, no HTML."""
    return " ".join(plain(text).split()).replace("|", "\\|").replace("<", "&lt;")
