"""Turns a BurstGPT trace into a request file: its times and lengths, texts of random words.

The trace is a CSV file, Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type: seconds, which model was
asked, lengths in tokens, and API or conversation log; release 2 has two more columns. Failed requests, which are
logged without answer tokens, are left out.
"""

import argparse
import sys

from converting import (
    ParseRow,
    Row,
    add_trace_options,
    convert_trace,
    csv_cells,
    csv_columns,
    main,
    make_parser,
    read_trace,
    seconds_of,
    tokens_of,
    usable,
)
from sharegpt import Unusable

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")


def row_parser(columns: tuple[int, ...], model: str | None, log_type: str | None) -> ParseRow:
    """What reads a line whose columns stand there; requests to other models or in another log are left out."""

    def parse(line: bytes) -> Row:
        at, asked, request, response, log = csv_cells(line, columns)
        tokens = tokens_of(request, "Request tokens"), tokens_of(response, "Response tokens")
        row = Row(seconds_of(at, "Timestamp"), *tokens)
        if model not in (None, asked):
            raise Unusable("another model")
        if log_type not in (None, log):
            raise Unusable("another log type")
        return usable(row)

    return parse


def run(options: argparse.Namespace) -> None:
    """Converts as the command line asks; raises UsageError or OSError."""
    parse = row_parser(csv_columns(options.source, COLUMNS), options.model, options.log_type)
    trace = read_trace(options.source, parse, has_header=True)
    convert_trace("burstgpt", options, parse, trace, model=options.model, log_type=options.log_type)


if __name__ == "__main__":
    parser = make_parser(
        "burstgpt",
        __doc__,
        "python requests/burstgpt.py BurstGPT_1.csv --model ChatGPT --window 0 3600 --out requests/burstgpt.jsonl",
        source="BurstGPT_1.csv and the like",
    )
    add_trace_options(parser)
    parser.add_argument("--model", metavar="NAME", help="only requests to this model, ChatGPT or GPT-4")
    parser.add_argument("--log-type", metavar="NAME", help="only this log, 'API log' or 'Conversation log'")
    sys.exit(main(parser, run, None))
