"""Turns a Mooncake trace into a request file: its times and lengths, and prompts that share what its prompts shared.

The trace is JSON Lines, {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}. A hash id stands
for 512 tokens together with all that was before them, so that equal ids are an equal prefix: here each id has a text
of its own, as long as --block-tokens says, and a prompt is the texts of its ids, cut at its length. What the ids do
not cover is random words that no other prompt has.
"""

import argparse
import json
import sys
from functools import lru_cache

from converting import (
    Row,
    Source,
    add_trace_options,
    convert_trace,
    main,
    make_parser,
    positive,
    read_trace,
    seconds_of,
    shorten,
    tokens_of,
    usable,
)

TRACE_BLOCK = 512
"""Tokens that a hash id stands for in the published traces."""


def parse_row(line: bytes) -> Row:
    """One line; raises ValueError, Unusable."""
    try:
        item = json.loads(line)
    except RecursionError:
        raise ValueError("is not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    missing = [name for name in names if not isinstance(item, dict) or name not in item]
    if missing:
        raise ValueError(f"has no {', '.join(map(repr, missing))}")
    ids = item["hash_ids"]
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise ValueError(f"hash_ids: expected a list of whole numbers, found {shorten(ids)}")
    at = seconds_of(item["timestamp"], "timestamp") / 1000
    tokens = tokens_of(item["input_length"], "input_length"), tokens_of(item["output_length"], "output_length")
    return usable(Row(at, *tokens, tuple(ids)))


def run(options: argparse.Namespace) -> None:
    """Converts as the command line asks; raises UsageError or OSError."""
    size = options.block_tokens
    if options.scale_input is None:  # so that a prompt's blocks fill it as they did in the trace
        options.scale_input = size / TRACE_BLOCK

    @lru_cache(maxsize=4096)
    def block(source: Source, hash_id: int, length: int) -> str:
        return source.text(length, f"block {hash_id}")

    def prompt(source: Source, row: Row, length: int, id: str) -> str:
        whole, rest = divmod(length, size)
        pieces = [block(source, hash_id, size) for hash_id in row.hash_ids[:whole]]
        if rest and whole < len(row.hash_ids):  # the beginning of the last block is the same for all that share it
            pieces.append(block(source, row.hash_ids[whole], rest))
        left = length - len(row.hash_ids) * size
        if left > 0:
            pieces.append(source.text(left, id))
        return source.vocabulary.joint.join(pieces)

    trace = read_trace(options.source, parse_row, has_header=False)
    convert_trace("mooncake", options, parse_row, trace, prompt, block_tokens=size)


if __name__ == "__main__":
    parser = make_parser(
        "mooncake",
        __doc__,
        "python requests/mooncake.py conversation_trace.jsonl --block-tokens 16 --window 0 600 --scale-output 0.1",
        source="conversation_trace.jsonl, toolagent_trace.jsonl, synthetic_trace.jsonl",
    )
    add_trace_options(parser)
    parser.add_argument(
        "--block-tokens",
        type=positive,
        default=TRACE_BLOCK,
        metavar="N",
        help="tokens of each hash id (default: %(default)s); --scale-input is N / 512 unless given",
    )
    sys.exit(main(parser, run, None))
