"""Turns an Azure LLM inference trace (2023 or 2024) into a request file: its times and lengths, texts of random words.

The trace is a CSV file, TIMESTAMP,ContextTokens,GeneratedTokens: a wall time, the prompt's tokens, the answer's.
"""

import argparse
import sys
from datetime import UTC, datetime

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
    shorten,
    tokens_of,
    usable,
)

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def row_parser(columns: tuple[int, ...]) -> ParseRow:
    """What reads a line whose columns stand there."""

    def parse(line: bytes) -> Row:
        at, context, generated = csv_cells(line, columns)
        try:
            moment = datetime.fromisoformat(at)  # keeps microseconds of the seven digits
        except ValueError:
            raise ValueError(
                f"TIMESTAMP: expected a time such as 2023-11-16 18:15:46.68, found {shorten(at)}"
            ) from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        tokens = tokens_of(context, "ContextTokens"), tokens_of(generated, "GeneratedTokens")
        return usable(Row(moment.timestamp(), *tokens))

    return parse


def run(options: argparse.Namespace) -> None:
    """Converts as the command line asks; raises UsageError or OSError."""
    parse = row_parser(csv_columns(options.source, COLUMNS))
    convert_trace("azure", options, parse, read_trace(options.source, parse, has_header=True))


if __name__ == "__main__":
    parser = make_parser(
        "azure",
        __doc__,
        "python requests/azure.py AzureLLMInferenceTrace_conv.csv --window 0 300 --out requests/azure.jsonl",
        source="AzureLLMInferenceTrace_code.csv, ..._conv.csv",
    )
    add_trace_options(parser)
    sys.exit(main(parser, run, None))
