"""What the converters of this folder have in common: token counts, traces in the order of their times, the end.

A trace is read twice: once to check every line and to put the times in order, once to write the requests that were
asked for. Between the two, 20 bytes a request are held (48 while they are put in order): 480 MB for ten million.
"""

import argparse
import ipaddress
import math
import socket
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
from sharegpt import Request, Unusable, UsageError, load_tokenizer, reasons, write_lines

from twoclocks.synthetic import CountTokens, Vocabulary, text, vocabulary

LONGEST_LINE = 1 << 24
"""Bytes. A longer line is none of a trace: better given up than read to its end."""
LONGEST_TEXT = 10_000_000
"""Tokens of one prompt or answer, ten times the longest context of a model."""
LARGEST_FILE = 2_000_000_000
"""Bytes of prompts. Every process that sends them holds them all in memory."""


class Row(NamedTuple):
    """One request of a trace."""

    at: float  # seconds, from any origin
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()  # Mooncake: the blocks of its prompt


ParseRow = Callable[[bytes], Row]
"""Reads one line; raises ValueError saying what is wrong with it, Unusable saying why it is left out."""


class Trace(NamedTuple):
    """The usable requests of a trace file by their times, each still in the file."""

    path: Path
    times: Any  # float64 array, ascending
    offsets: Any  # int64 array: where each line begins
    input_tokens: Any  # int32 array
    out_of_order: int  # lines whose time was before that of the line above them
    dropped: Counter[str]


class Source(NamedTuple):
    """Texts of given lengths, and how their tokens were counted."""

    vocabulary: Vocabulary
    counted: str  # tokenizer | server | estimate
    seed: int

    @property
    def exact(self) -> bool:
        """Are lengths those of a tokenizer?"""
        return self.counted != "estimate"

    def text(self, tokens: int, name: str) -> str:
        """The text of this name; another name gives another one."""
        return text(self.vocabulary, tokens, f"{self.seed}/{name}")


# traces


def read_trace(path: Path, parse: ParseRow, *, has_header: bool) -> Trace:
    """Checks every line and puts them in order. Raises UsageError naming the line that cannot be read."""
    times, offsets, inputs, dropped = array("d"), array("q"), array("i"), Counter[str]()
    with path.open("rb") as file:
        lines = numbered_lines(file, path)
        if has_header:
            next(lines, None)
        for number, offset, line in lines:
            try:
                row = parse(line)
            except Unusable as reason:
                dropped[str(reason)] += 1
                continue
            except ValueError as error:
                raise UsageError(f"{path} line {number}: {error}") from None
            times.append(row.at)
            offsets.append(offset)
            inputs.append(row.input_tokens)
    if not times:
        raise UsageError(f"{path}: holds no request" + (f"; dropped {reasons(dropped)}" if dropped else ""))
    at = np.frombuffer(times)
    out_of_order = int((np.diff(at) < 0).sum())
    if not out_of_order:
        return Trace(path, at, np.frombuffer(offsets, np.int64), np.frombuffer(inputs, np.int32), 0, dropped)
    order = np.argsort(at, kind="stable")
    kept = np.frombuffer(offsets, np.int64)[order], np.frombuffer(inputs, np.int32)[order]
    return Trace(path, at[order], *kept, out_of_order, dropped)


def numbered_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, where it begins, line) of each line that is not blank."""
    number, offset = 0, 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise UsageError(f"{path} line {number}: is longer than {LONGEST_LINE >> 20} MiB; is this a trace?")
        if line.strip():
            yield number, offset, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        offset += len(line)
        if number % 1_000_000 == 0:
            say(f"read {number} lines ...")


def csv_columns(path: Path, names: tuple[str, ...]) -> tuple[int, ...]:
    """Where the columns stand, by the first line. Raises UsageError naming the ones that are missing."""
    with path.open("rb") as file:
        _, _, header = next(numbered_lines(file, path), (1, 0, b""))
    found = [cell.strip().strip('"') for cell in header.decode("utf-8", "replace").split(",")]
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{path} line 1: no column {', '.join(map(repr, missing))}; found {','.join(found)[:120]!r}")
    return tuple(map(found.index, names))


def csv_cells(line: bytes, columns: tuple[int, ...]) -> list[str]:
    """The cells of some columns. These traces quote nothing and have no comma in a cell."""
    cells = line.decode().rstrip("\r\n").split(",")
    if len(cells) <= max(columns):
        raise ValueError(f"expected {max(columns) + 1} cells or more, found {len(cells)}")
    return [cells[column].strip() for column in columns]


def tokens_of(value: object, name: str) -> int:
    """A number of tokens, from text or JSON. Raises ValueError."""
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdecimal():
        value = int(value)
    if type(value) is not int or not 0 <= value <= LONGEST_TEXT:
        raise ValueError(f"{name}: expected a number of tokens, found {shorten(value)}")
    return value


def seconds_of(value: object, name: str) -> float:
    """A time of 0 or later, from text or JSON, in whatever unit it is. Raises ValueError."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if type(value) not in (int, float) or not 0 <= value < 1e15:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a time of 0 or later, found {shorten(value)}")
    return float(value)  # type: ignore[arg-type]


def shorten(value: object) -> str:
    """At most some forty characters of it."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."


def usable(row: Row) -> Row:
    """The row; raises Unusable for a request without prompt or answer, as a refused or failed one is logged."""
    if not row.input_tokens or not row.output_tokens:
        raise Unusable("no prompt tokens" if not row.input_tokens else "no answer tokens")
    return row


def selected(trace: Trace, window: tuple[float, float] | None, limit: int | None) -> range:
    """Which requests were asked for: those of [begin, end) seconds after the first one, and of them the first ones."""
    first = float(trace.times[0])
    begin, end = 0, len(trace.times)
    if window is not None:
        begin, end = (int(np.searchsorted(trace.times - first, bound)) for bound in window)
        if begin == end:
            raise UsageError(
                f"--window {window[0]:g} {window[1]:g}: no request in it; {trace.path} lasts "
                f"{float(trace.times[-1]) - first:.0f} s"
            )
    return range(begin, end if limit is None else min(end, begin + limit))


def rows(trace: Trace, chosen: range, parse: ParseRow) -> Iterator[Row]:
    """Reads the chosen ones again, their times counted from the first of them."""
    with trace.path.open("rb") as file:
        for index in chosen:
            file.seek(int(trace.offsets[index]))
            row = parse(file.readline())
            yield row._replace(at=round(row.at - float(trace.times[chosen.start]), 6))


def convert_trace(
    name: str,
    options: argparse.Namespace,
    parse: ParseRow,
    trace: Trace,
    prompt_of: Callable[[Source, Row, int, str], str] | None = None,
    **made: object,
) -> None:
    """Writes the requests of a trace and tells what was done.

    `prompt_of` gives the prompt of a row, its length in tokens and its id; by default each has a text of its own.
    """
    scale_input, scale_output = options.scale_input or 1.0, options.scale_output
    chosen = selected(trace, options.window, options.limit)
    source = text_source(options)
    tokens = float(trace.input_tokens[chosen.start : chosen.stop].sum(dtype=np.int64)) * scale_input
    word = sum(map(len, source.vocabulary.words)) / len(source.vocabulary.words) + len(source.vocabulary.joint)
    if tokens * word > LARGEST_FILE:
        raise UsageError(
            f"{len(chosen)} requests of {tokens / 1e6:.0f} million prompt tokens are some {tokens * word / 1e9:.1f} GB "
            "that whoever sends them holds in memory; choose a part with --window or --limit, or less --scale-input"
        )
    made = {"by": f"{name}.py", "tokens": source.counted, **made}
    made |= {"scale_input": scale_input, "scale_output": scale_output}

    def requests() -> Iterator[Request]:
        for number, row in zip(chosen, rows(trace, chosen, parse), strict=True):
            length = max(1, round(row.input_tokens * scale_input))
            output = max(1, round(row.output_tokens * scale_output))
            id = f"{name}-{number + 1:06d}"
            prompt = source.text(length, id) if prompt_of is None else prompt_of(source, row, length, id)
            request: Request = {"id": id, "at": row.at, "prompt": prompt}
            request |= {"max_tokens": output, "expected_output_tokens": output}
            if source.exact:
                request["expected_prompt_tokens"] = length
            yield request | {"made": made}

    write_lines(options.out, requests())
    if trace.out_of_order:
        say(f"{trace.out_of_order} of {len(trace.times)} requests came before the one above them: sorted by time")
    if trace.dropped:
        say(f"dropped {reasons(trace.dropped)}")
    last = float(trace.times[chosen[-1]] - trace.times[chosen.start])
    say(
        f"wrote {len(chosen)} of {len(trace.times)} requests, {last:.1f} s, to {options.out} (seed {options.seed}, "
        f"lengths x {scale_input:g} in, x {scale_output:g} out)"
    )
    tell_counted(source)


# texts of given lengths


def text_source(options: argparse.Namespace) -> Source:
    """Texts whose tokens are counted as the command line asks. Raises UsageError."""
    count, counted = token_counter(options)
    try:
        words = vocabulary(count)
    except ValueError as error:
        raise UsageError(f"{error}; leave it out for an estimate of one token a word") from None
    return Source(words, counted, options.seed)


def token_counter(options: argparse.Namespace) -> tuple[CountTokens | None, str]:
    """What counts tokens, None for an estimate, and what it is called. Raises UsageError."""
    if options.tokenizer:
        return load_tokenizer(options.tokenizer), "tokenizer"
    if options.tokenize_url:
        return server_counter(options.tokenize_url, yes=options.yes), "server"
    return None, "estimate"


def tell_counted(source: Source) -> None:
    """Says how far the lengths can be trusted."""
    if source.exact:
        say(f"prompt lengths are exact by the {source.counted}, without what a chat template adds")
    else:
        say(
            "prompt lengths are estimated as one token a word: exact for SmolLM2's tokenizer (49,152 entries), "
            "up to twice as long for one of 4,096; give --tokenizer or --tokenize-url"
        )


def server_counter(url: str, *, yes: bool = False) -> CountTokens:
    """Counts with a server's /tokenize, as vLLM (and SGLang) or llama.cpp have it, special tokens left out."""
    base = url.rstrip("/").removesuffix("/tokenize").removesuffix("/v1")
    refuse_public(base, yes=yes)
    client = httpx.Client(timeout=30, trust_env=False)

    def ask(body: dict[str, object]) -> Any:
        try:
            response = client.post(f"{base}/tokenize", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UsageError(f"--tokenize-url {base}/tokenize: {error or type(error).__name__}") from None
        try:
            answer = response.json() if response.status_code == 200 else {}
        except ValueError:
            answer = {}
        return (answer if isinstance(answer, dict) else {}), response.status_code

    def vllm(words: str) -> int:
        count = ask({"prompt": words, "add_special_tokens": False})[0].get("count")
        return count if isinstance(count, int) else 0

    def llamacpp(words: str) -> int:
        tokens = ask({"content": words, "add_special": False})[0].get("tokens")
        return len(tokens) if isinstance(tokens, list) else 0

    for count in (vllm, llamacpp):
        if count("word"):
            return count
    status = ask({"content": "word"})[1]
    raise UsageError(f"--tokenize-url {base}/tokenize answers neither as vLLM does nor as llama.cpp (HTTP {status})")


def refuse_public(url: str, *, yes: bool) -> None:
    """Hundreds of requests go to this address: it must be this machine or a private network, or the user's will."""
    host = urlsplit(url).hostname
    if urlsplit(url).scheme not in ("http", "https") or host is None:
        raise UsageError(f"--tokenize-url: expected http://HOST:PORT, found {url!r}")
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UsageError(f"--tokenize-url: {host} has no address: {error.strerror or error}") from None
    if not yes and not all(ipaddress.ip_address(address).is_private for address in found):
        raise UsageError(f"--tokenize-url: {host} is a public address; say --yes if its owner agrees")


# the command line


def say(line: str) -> None:
    """One line of progress, summary or error, on stderr: stdout stays empty."""
    print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr)


def positive(value: str) -> int:
    """A whole number above 0."""
    if not (value.isascii() and value.isdecimal() and 0 < int(value[:12]) <= 10**9):
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def factor(value: str) -> float:
    """A number above 0."""
    with suppress(ValueError):
        if 0 < (number := float(value)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0")


def make_parser(name: str, description: str, example: str, *, source: str | None) -> argparse.ArgumentParser:
    """A command line with what all converters have."""
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if source:
        parser.add_argument("source", metavar="SOURCE", type=Path, help=source)
    parser.add_argument("--out", type=Path, default=Path(f"requests/{name}.jsonl"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="same input and seed, same file (default: %(default)s)")
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument("--tokenizer", type=Path, metavar="PATH", help="lengths exact by this tokenizer.json")
    counted.add_argument("--tokenize-url", metavar="URL", help="lengths exact by the /tokenize of this server")
    parser.add_argument("--yes", action="store_true", help="the server of --tokenize-url may be a public one")
    return parser


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """What the converters of traces have beside."""
    parser.add_argument(
        "--window", nargs=2, type=float, metavar=("START", "END"), help="only these seconds of the trace"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N requests (of the window)")
    parser.add_argument("--scale-input", type=factor, metavar="X", help="prompt lengths times this (default: 1)")
    parser.add_argument("--scale-output", type=factor, metavar="X", default=1.0, help="answer lengths (default: 1)")


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Exit codes: 0 written, 2 nothing written and one line on stderr saying why."""
    options = parser.parse_args(argv)
    out: Path = options.out
    source: Path | None = getattr(options, "source", None)
    try:
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder; name a file in it")
        if not out.parent.is_dir():
            raise UsageError(f"--out {out}: the folder {out.parent} does not exist")
        if source is not None and source.exists() and out.exists() and out.samefile(source):
            raise UsageError(f"--out {out} would overwrite the source; name another file")
        window = getattr(options, "window", None)
        if window and not 0 <= window[0] < window[1]:
            raise UsageError(f"--window {window[0]:g} {window[1]:g}: expected two times in seconds, the later one last")
        run(options)
    except UsageError as error:
        say(f"error: {error}")
    except OSError as error:
        say(f"error: {error.filename or source}: {error.strerror or error}")
    except KeyboardInterrupt:
        say("stopped, nothing written")
    else:
        return 0
    return 2
