"""Makes a request file of random words with given lengths, and with shared prefixes at a given hit rate.

Lengths: 512 (all the same), 100-1000 (uniform), normal:512:128 (mean and standard deviation, cut at 1), or a list
such as 128,512,2048 (one of them at random).

The hit rate is the share of all prompt tokens in the file that a perfect prefix cache, empty at first, could answer
when the file is sent once: each prefix is new the first time. It is met by how many requests begin with one of the
shared prefixes; the others begin with words of their own.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable
from statistics import NormalDist

from converting import (
    LARGEST_FILE,
    LONGEST_TEXT,
    main,
    make_parser,
    positive,
    say,
    tell_counted,
    text_source,
)
from sharegpt import Request, UsageError, write_lines

MOST_REQUESTS = 1_000_000
"""All are held until they are written."""
Draw = Callable[[], float]
Length = Callable[[Draw], int]
"""Draws one length, from numbers that are uniform in [0, 1)."""


def length(value: str) -> Length:
    """What draws lengths as the words of the command line say."""
    problem = argparse.ArgumentTypeError(f"{value!r} is none of 512, 100-1000, normal:512:128 and 128,512,2048")
    if found := re.fullmatch(r"normal:(\d{1,8}(?:\.\d+)?):(\d{1,8}(?:\.\d+)?)", value, re.ASCII):
        mean, deviation = map(float, found.groups())
        if mean < 1 or deviation <= 0:
            raise problem
        normal = NormalDist(mean, deviation)
        return lambda draw: min(LONGEST_TEXT, max(1, round(normal.inv_cdf(draw() or 0.5))))
    if found := re.fullmatch(r"(\d{1,8})-(\d{1,8})", value, re.ASCII):
        low, high = map(int, found.groups())
        if not 1 <= low <= high <= LONGEST_TEXT:
            raise problem
        return lambda draw: low + int(draw() * (high - low + 1))
    if not re.fullmatch(r"\d{1,8}(,\d{1,8})*", value, re.ASCII):
        raise problem
    choices = list(map(int, value.split(",")))
    if not all(1 <= choice <= LONGEST_TEXT for choice in choices):
        raise problem
    return lambda draw: choices[int(draw() * len(choices))]


def share(value: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0 to 1")
    return number


def who_shares(lengths: list[int], prefixes: int, tokens: int, rate: float | None, draw: Draw) -> dict[int, int]:
    """Which requests begin with which shared prefix, so that the hit rate is met; all that can if none is asked for.

    Hits are (requests that share - prefixes, each of which is new once) x tokens of a prefix. Raises UsageError for a
    rate that cannot be reached.
    """
    able = [number for number, size in enumerate(lengths) if size > tokens]
    count = len(able) if rate is None else round(rate * sum(lengths) / tokens) + prefixes
    if rate == 0:
        return {}
    if count > len(able) or count <= prefixes:
        most = max(0, len(able) - prefixes) * tokens / sum(lengths)
        raise UsageError(
            f"--hit-rate cannot be met: {prefixes} prefixes of {tokens} tokens give {tokens / sum(lengths):.3g} to "
            f"{most:.3g} with these {len(lengths)} requests, of which {len(able)} are longer than a prefix"
        )
    chosen = sorted(sorted(able, key=lambda _: draw())[:count])
    return {number: turn % prefixes for turn, number in enumerate(chosen)}


def run(options: argparse.Namespace) -> None:
    """Makes what the command line asks for; raises UsageError or OSError."""
    if (options.prefixes is None) != (options.prefix_tokens is None):
        raise UsageError("--prefixes and --prefix-tokens belong together")
    if options.hit_rate is not None and options.prefixes is None:
        raise UsageError("--hit-rate needs --prefixes and --prefix-tokens")
    if options.requests > MOST_REQUESTS:
        raise UsageError(f"--requests: expected {MOST_REQUESTS} or fewer, found {options.requests}")
    draw = random.Random(options.seed).random  # the one method whose sequence Python promises to keep
    inputs = [options.input(draw) for _ in range(options.requests)]
    outputs = [options.output(draw) for _ in range(options.requests)]
    if sum(inputs) * 6 > LARGEST_FILE:
        raise UsageError(
            f"{sum(inputs) / 1e6:.0f} million prompt tokens are some {sum(inputs) * 6 / 1e9:.1f} GB: too many"
        )
    sharing: dict[int, int] = {}
    if options.prefixes:
        sharing = who_shares(inputs, options.prefixes, options.prefix_tokens, options.hit_rate, draw)
    source, seen, made = text_source(options), set[int](), list[Request]()
    hits = max(0, len(sharing) - (options.prefixes or 0)) * (options.prefix_tokens or 0)
    intended = round(hits / sum(inputs), 6)
    facts = {"by": "synthetic.py", "tokens": source.counted, "hit_rate": intended}
    for number, (input_tokens, output_tokens) in enumerate(zip(inputs, outputs, strict=True)):
        id, prefix, cached = f"synthetic-{number + 1:06d}", sharing.get(number), 0
        if prefix is None:
            prompt = source.text(input_tokens, id)
        else:
            own = source.text(input_tokens - options.prefix_tokens, id)
            prompt = source.text(options.prefix_tokens, f"prefix {prefix}") + source.vocabulary.joint + own
            cached = options.prefix_tokens if prefix in seen else 0
            seen.add(prefix)
        request: Request = {"id": id, "prompt": prompt, "max_tokens": output_tokens}
        request["expected_output_tokens"] = output_tokens
        if source.exact:
            request |= {"expected_prompt_tokens": input_tokens, "expected_cached_tokens": cached}
        made.append(request | {"made": facts})
    write_lines(options.out, made)
    say(
        f"wrote {len(made)} requests of {sum(inputs)} prompt tokens to {options.out} (seed {options.seed}); "
        f"intended prefix hit rate {intended:.3f}"
    )
    tell_counted(source)


if __name__ == "__main__":
    parser = make_parser(
        "synthetic",
        __doc__,
        "python requests/synthetic.py --requests 500 --input 512 --output 64-256 \\\n"
        "      --prefixes 10 --prefix-tokens 448 --hit-rate 0.8 --out requests/synthetic.jsonl",
        source=None,
    )
    parser.add_argument("--requests", type=positive, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--input", type=length, default="512", metavar="LENGTH", help="default: %(default)s")
    parser.add_argument("--output", type=length, default="128", metavar="LENGTH", help="default: %(default)s")
    parser.add_argument("--prefixes", type=positive, metavar="N", help="so many shared prefixes ...")
    parser.add_argument("--prefix-tokens", type=positive, metavar="N", help="... of so many tokens")
    parser.add_argument(
        "--hit-rate", type=share, metavar="SHARE", help="of the prompt tokens (default: all that the prefixes give)"
    )
    sys.exit(main(parser, run, None))
