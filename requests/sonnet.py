"""Makes a request file of poem lines with a shared beginning, by the definition of vLLM's sonnet data set.

A prompt is an instruction, the first P lines of the poem, the same in all, and N - P lines drawn at random, with
replacement. N and P come from lengths in tokens: (tokens - those of the instruction) / mean tokens of a line, rounded.
A prompt that comes out longer than --input-tokens is drawn again. Unlike there, blank lines are left out, and what a
chat template adds is not in the lengths.
"""

import argparse
import random
import sys

from converting import LARGEST_FILE, main, make_parser, positive, say, token_counter
from sharegpt import Request, UsageError, estimate_tokens, write_lines

INSTRUCTION = "Pick as many lines as you can from these poem lines:\n"
MOST_DRAWS = 1000
"""Of one prompt. Half of them fit, or nearly, unless the shared lines alone are too long."""


def run(options: argparse.Namespace) -> None:
    """Makes what the command line asks for; raises UsageError or OSError."""
    try:
        lines = [line + "\n" for line in options.source.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(f"{options.source}: is not UTF-8 text") from None
    if not lines:
        raise UsageError(f"{options.source}: holds no line")
    known, counted = token_counter(options)
    count = known or estimate_tokens
    instruction, mean = count(INSTRUCTION), sum(map(count, lines)) / len(lines)
    longest = options.input_tokens if options.lines is None else None
    total = options.lines or round((options.input_tokens - instruction) / mean)
    shared = max(0, round((options.prefix_tokens - instruction) / mean))
    if options.prefix_lines is not None:
        shared = options.prefix_lines
    if not 0 <= shared < total or shared > len(lines):
        raise UsageError(
            f"{shared} shared lines do not fit into prompts of {total} (the file has {len(lines)} lines of {mean:.1f} "
            "tokens on average); ask for more --input-tokens or fewer --prefix-tokens"
        )
    size = options.requests * total * len("".join(lines)) // len(lines)
    if size > LARGEST_FILE:
        raise UsageError(f"--requests {options.requests} of {total} lines are some {size / 1e9:.1f} GB: too many")
    beginning = INSTRUCTION + "".join(lines[:shared])
    draw = random.Random(options.seed).random  # the one method whose sequence Python promises to keep
    made: list[Request] = []
    for number in range(1, options.requests + 1):
        for _ in range(MOST_DRAWS):
            prompt = beginning + "".join(lines[int(draw() * len(lines))] for _ in range(total - shared))
            tokens = count(prompt)
            if longest is None or tokens <= longest:
                break
        else:
            raise UsageError(f"no prompt of {total} lines in {MOST_DRAWS} has {longest} tokens or fewer; use --lines")
        request: Request = {"id": f"sonnet-{number:05d}", "prompt": prompt, "max_tokens": options.output_tokens}
        request["expected_output_tokens"] = options.output_tokens
        if known:
            request["expected_prompt_tokens"] = tokens
            request["expected_cached_tokens"] = count(beginning) if number > 1 else 0
        made.append(request | {"made": {"by": "sonnet.py", "tokens": counted, "lines": total, "prefix_lines": shared}})
    write_lines(options.out, made)
    say(
        f"wrote {len(made)} requests of {total} lines, the first {shared} shared, to {options.out} "
        f"(seed {options.seed}, tokens by {counted}{'' if known else ': characters / 4'})"
    )


def line_count(value: str) -> int:
    """A whole number of 0 or more."""
    return 0 if value == "0" else positive(value)


if __name__ == "__main__":
    parser = make_parser(
        "sonnet", __doc__, "python requests/sonnet.py sonnet.txt --requests 200", source="a text file of poem lines"
    )
    parser.add_argument("--requests", type=positive, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--input-tokens", type=positive, default=550, metavar="N", help="default: %(default)s")
    parser.add_argument("--output-tokens", type=positive, default=150, metavar="N", help="default: %(default)s")
    parser.add_argument("--prefix-tokens", type=line_count, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--lines", type=positive, metavar="N", help="lines a prompt, in place of --input-tokens")
    parser.add_argument("--prefix-lines", type=line_count, metavar="P", help="in place of --prefix-tokens")
    sys.exit(main(parser, run, None))
