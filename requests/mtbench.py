"""Turns the MT-bench questions into a request file: a session for each, with a request for each of its turns.

The questions are JSON Lines, {"question_id": 81, "category": "writing", "turns": ["...", "..."], "reference": [...]}.
The second turn's history holds an answer to the first: the reference where there is one, else random words, so many
as --answer-tokens says, since MT-bench records no answers.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from converting import (
    Source,
    main,
    make_parser,
    numbered_lines,
    positive,
    say,
    shorten,
    text_source,
)
from sharegpt import Request, UsageError, write_lines


def read_questions(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(id, turns, reference answers, of which there may be none). Raises UsageError naming the line."""
    with path.open("rb") as file:
        for number, _, line in numbered_lines(file, path):
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path} line {number}: is not JSON: {error}") from None
            turns, answers = (item.get("turns"), item.get("reference") or []) if isinstance(item, dict) else (None, [])
            for name, value in (("turns", turns), ("reference", answers)):
                if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                    raise UsageError(f"{path} line {number}: {name}: expected a list of texts, found {shorten(value)}")
            if not turns or not all(turns):
                raise UsageError(f"{path} line {number}: turns: has an empty one, or none")
            yield str(item.get("question_id", number)), turns, answers


def requests_of(
    question: tuple[str, list[str], list[str]], source: Source, answer_tokens: int, max_tokens: int | None
) -> Iterator[Request]:
    """The request of each turn, with the history before it."""
    name, turns, references = question
    session, messages, answered = f"mtbench-{name}", list[dict[str, str]](), "nobody"
    for turn, words in enumerate(turns):
        messages.append({"role": "user", "content": words})
        request: Request = {"id": f"{session}-{turn}", "session": session, "turn": turn, "messages": list(messages)}
        if max_tokens:
            request["max_tokens"] = max_tokens
        yield request | {"made": {"by": "mtbench.py", "answers": answered}}
        known = references[turn] if turn < len(references) else ""  # a few of them are empty
        answer = known or source.text(answer_tokens, f"{session}-{turn}")
        messages.append({"role": "assistant", "content": answer})
        answered = "reference" if known else "random words"


def run(options: argparse.Namespace) -> None:
    """Converts as the command line asks; raises UsageError or OSError."""
    questions = list(read_questions(options.source))[: options.limit]
    if not questions:
        raise UsageError(f"{options.source}: holds no question")
    source = text_source(options)
    made = [
        request
        for question in questions
        for request in requests_of(question, source, options.answer_tokens, options.max_tokens)
    ]
    write_lines(options.out, made)
    say(f"wrote {len(made)} requests of {len(questions)} sessions to {options.out} (seed {options.seed})")


if __name__ == "__main__":
    parser = make_parser("mtbench", __doc__, "python requests/mtbench.py question.jsonl", source="question.jsonl")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of each request (default: the experiment's)")
    parser.add_argument(
        "--answer-tokens", type=positive, default=128, metavar="N", help="of an answer made up (default: %(default)s)"
    )
    sys.exit(main(parser, run, None))
