"""Turns a ShareGPT file into a request file: a seeded random sample, one JSON object a line.

Stands alone, before any run: reads a path or an address, writes what an experiment's `workload.requests` names.
It needs the standard library only; httpx when the source is an address, tokenizers when --tokenizer is given.
"""

import argparse
import heapq
import importlib
import io
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

Request = dict[str, Any]
CountTokens = Callable[[str], int]

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
LONGEST_ITEM = 1 << 25
"""Characters. Whatever is longer is no conversation but a malformed file, better given up than read to its end."""
SEPARATORS = re.compile(r"[ \t\r\n,]*")


class UsageError(Exception):
    """Anything the user can mend; its message is the one line that is shown."""


class Unusable(Exception):
    """Why a conversation ends before its end; the message is counted in the summary."""


class Limits(NamedTuple):
    """Lengths in tokens, bounds included. The defaults are those of vLLM's ShareGPT benchmark."""

    min_prompt: float = 4
    min_output: float = 4
    max_prompt: float = 1024
    max_total: float = 2048

    def check(self, prompt: int, output: int) -> None:
        """Raises Unusable, naming the limit, when a prompt and its recorded answer do not pass."""
        if prompt < self.min_prompt:
            raise Unusable(f"prompt under {self.min_prompt} tokens")
        if output < self.min_output:
            raise Unusable(f"output under {self.min_output} tokens")
        if prompt > self.max_prompt:
            raise Unusable(f"prompt over {self.max_prompt} tokens")
        if prompt + output > self.max_total:
            raise Unusable(f"prompt + output over {self.max_total} tokens")


NO_LIMITS = Limits(0, 0, inf, inf)


@dataclass
class Tally:
    """What became of the conversations; the counters go by reason."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut_short: Counter[str] = field(default_factory=Counter)


def estimate_tokens(text: str) -> int:
    """Characters / 4, rounded up. Near the truth for English, far too low for Chinese, Japanese or Korean."""
    return -(-len(text) // 4)


def load_tokenizer(path: Path) -> CountTokens:
    """Counts tokens with a tokenizer.json (or the model folder that holds one), special tokens left out."""
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise UsageError("--tokenizer needs the package tokenizers: pip install tokenizers, or leave it out") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the package raises no narrower one, for a missing or a broken file
        raise UsageError(f"--tokenizer {file} is not a readable tokenizer.json: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def read_items(file: BinaryIO) -> Iterator[object]:
    """The items of a JSON array or of JSON Lines, told apart by the first byte; None for a line that is no JSON.

    Raises UsageError for an array that breaks off, UnicodeDecodeError for one that is not UTF-8.
    """
    start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    if start == b"[":
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            yield from _array_items(text)
    else:
        yield from _line_items(file)


def _line_items(file: BinaryIO) -> Iterator[object]:
    for line in file:  # a binary file splits at \n alone; U+2028 and U+0085 may stand raw inside a text
        if line.strip():
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield None


def _array_items(text: TextIO, block: int = 1 << 20) -> Iterator[object]:
    """Parsed as they arrive, since the public file is some 600 MB and takes gigabytes when it is loaded at once."""
    decoder = json.JSONDecoder()
    buffer, at, count = "", 0, 0
    while text.read(1) not in ("[", ""):
        pass
    while True:
        found = SEPARATORS.match(buffer, at)
        at = found.end() if found else at
        if buffer.startswith("]", at):
            return
        try:
            item, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            # Cut off at the end of the block, or malformed: only more text tells. Reading as much again as is still
            # unparsed keeps the number of attempts logarithmic.
            more = text.read(max(block, len(buffer) - at)) if len(buffer) - at < LONGEST_ITEM else ""
            if not more:
                reason = str(error).split(":")[0]
                message = f"the JSON array cannot be read beyond conversation {count} ({reason}); is the file complete?"
                raise UsageError(message) from None
            buffer, at = buffer[at:] + more, 0
            continue
        count += 1
        yield item


class Conversation(NamedTuple):
    """The usable beginning of a conversation."""

    id: str | None
    system: str | None
    exchanges: list[tuple[str, str]]  # (question, recorded answer)
    ended: str | None  # why it ends there; None when at its own end


def parse_conversation(item: object) -> Conversation:
    """Reads {"id", "conversations": [{"from", "value"}, ...]}, or the same with "messages", "role", "content".

    Answers that stand before the first question are skipped: the public file was split into parts, of which some begin
    with one. From there on questions and answers must alternate, as chat templates demand; the conversation ends before
    the first turn that does not fit.
    """
    if not isinstance(item, dict):
        return Conversation(None, None, [], "not a JSON object")
    turns = item.get("conversations", item.get("messages"))
    if not isinstance(turns, list):
        return Conversation(None, None, [], "no list of turns")
    system: str | None = None
    question: str | None = None
    exchanges: list[tuple[str, str]] = []
    ended: str | None = None
    try:
        for role, text in map(_read_turn, turns):
            if role == "user" and question is None:
                question = text
            elif role == "assistant" and question is not None:
                exchanges.append((question, text))
                question = None
            elif role == "system" and system is None and question is None and not exchanges:
                system = text
            elif role != "assistant" or exchanges:
                raise Unusable("turns out of order")
        if question is not None:
            raise Unusable("a question without an answer")
        if not exchanges:
            raise Unusable("no question with an answer")
    except Unusable as reason:
        ended = str(reason)
    return Conversation(_read_id(item.get("id")), system, exchanges, ended)


def _read_turn(turn: object) -> tuple[str, str]:
    """(role in OpenAI's words, text); raises Unusable."""
    if not isinstance(turn, dict):
        raise Unusable("a turn that is not an object")
    name, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Unusable("an unknown role")
    if not isinstance(text, str) or not text.strip():
        raise Unusable("an empty text")
    if not _is_unicode(text):
        raise Unusable("a text with half a surrogate pair")
    return role, text


def _is_unicode(text: str) -> bool:
    """JSON may escape half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_id(value: object) -> str | None:
    return str(value) if isinstance(value, int) or (isinstance(value, str) and value and _is_unicode(value)) else None


def make_requests(
    conversation: Conversation, name: str, limits: Limits, count: CountTokens, *, exact: bool, multi_turn: bool
) -> tuple[list[Request], str | None]:
    """The requests of one conversation, and why there are not more (None: all of it was used).

    The prompt's length is that of all its messages, without the few tokens a chat template adds. `exact` says that
    `count` is a tokenizer: only then is the answer's length recorded.
    """
    requests: list[Request] = []
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    prompt = sum(count(message["content"]) for message in messages)
    exchanges = conversation.exchanges if multi_turn else conversation.exchanges[:1]
    for turn, (question, answer) in enumerate(exchanges):
        messages.append({"role": "user", "content": question})
        prompt, output = prompt + count(question), count(answer)
        try:
            limits.check(prompt, output)
        except Unusable as reason:
            return requests, str(reason)
        request: Request = {"id": f"{name}-{turn}" if multi_turn else name, "messages": list(messages)}
        if multi_turn:
            request |= {"session": name, "turn": turn}
        if exact:
            request["expected_output_tokens"] = output
        requests.append(request)
        messages.append({"role": "assistant", "content": answer})
        prompt += output
    return requests, conversation.ended if multi_turn or not requests else None


def usable(
    items: Iterable[object], limits: Limits, count: CountTokens, tally: Tally, *, exact: bool, multi_turn: bool
) -> Iterator[list[Request]]:
    """The requests of each conversation that gives any, in the order of the source; fills the tally on the way."""
    seen: set[str] = set()
    for item in items:
        tally.read += 1
        if tally.read % 20_000 == 0:
            say(f"read {tally.read} conversations ...")
        conversation = parse_conversation(item)
        name = conversation.id or f"conversation-{tally.read}"
        requests, reason = make_requests(conversation, name, limits, count, exact=exact, multi_turn=multi_turn)
        if requests and name in seen:
            requests, reason = [], "an id seen before"
        if requests:
            seen.add(name)
            tally.kept += 1
            yield requests
        if reason:
            (tally.cut_short if requests else tally.dropped)[reason] += 1


def sample(groups: Iterable[list[Request]], size: int, seed: int) -> list[list[Request]]:
    """A random sample in random order, holding no more than `size` groups at a time.

    Each group draws one number and the smallest are kept, so that a smaller sample is the beginning of a larger one.
    Only Random.random() is used, the one method whose sequence Python promises to keep.
    """
    draw = random.Random(seed)
    keyed = ((draw.random(), position, group) for position, group in enumerate(groups))
    return [group for _, _, group in heapq.nsmallest(size, keyed)]


def download(address: str, file: BinaryIO) -> None:
    """Writes the body of an address to a file; raises UsageError when it cannot be had."""
    try:
        import httpx
    except ImportError:
        raise UsageError("an address needs the package httpx: pip install httpx, or download the file first") from None
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=30) as response:
            if response.status_code != 200:
                raise UsageError(f"{address} answered {response.status_code} {response.reason_phrase}")
            shown = 0
            for block in response.iter_bytes():
                file.write(block)
                if file.tell() >= shown + 50_000_000:
                    shown = file.tell()
                    say(f"downloaded {shown / 1e6:.0f} MB ...")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{address} could not be downloaded: {reason}") from None


def write_lines(path: Path, requests: Iterable[Request]) -> None:
    """Writes beside the path and renames, so that a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for request in requests:
                file.write(json.dumps(request, ensure_ascii=False) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def say(text: str) -> None:
    """One line of progress, summary or error, on stderr: stdout stays empty."""
    print(f"sharegpt: {text}", file=sys.stderr)


def reasons(counter: Counter[str]) -> str:
    """`3 (an empty text: 2, an unknown role: 1)`."""
    return f"{counter.total()} (" + ", ".join(f"{reason}: {count}" for reason, count in counter.most_common()) + ")"


def make_parser() -> argparse.ArgumentParser:
    """The command line; a limit that is not given is None, since its default depends on --no-filter."""
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="sharegpt.py",
        description="Turn a ShareGPT file into a request file: a random sample, one JSON object a line.",
        epilog="""\
filter: conversations outside the four limits are dropped; their defaults are those of vLLM's ShareGPT benchmark.
  Without --tokenizer tokens are estimated: characters / 4, rounded up.
  The estimate only filters; it is never written into the requests.

example:
  python requests/sharegpt.py ShareGPT_V3_unfiltered_cleaned_split.json --out requests/sharegpt.jsonl --samples 500
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="path or http(s) address of a JSON array or of JSON Lines")
    parser.add_argument("--out", type=Path, default=Path("requests/sharegpt.jsonl"), help="default: %(default)s")
    parser.add_argument(
        "--samples", type=_positive, default=500, metavar="N", help="conversations to draw (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="same source and seed, same file (default: %(default)s)")
    parser.add_argument(
        "--multi-turn",
        action="store_true",
        help="a request for each answered question, with the recorded history, session and turn; a conversation "
        "ends at the first turn that does not pass the filter, whose prompt includes the history",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="count tokens with this tokenizer.json")
    parser.add_argument("--no-filter", action="store_true", help="no limit but those given explicitly")
    for name, text in zip(
        Limits._fields, ("shortest prompt", "shortest answer", "longest prompt", "longest prompt + answer"), strict=True
    ):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="TOKENS", help=f"{text} (default: {getattr(default, name)})")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Converts as the command line asks; raises UsageError, OSError or UnicodeDecodeError."""
    given = {name: value for name in Limits._fields if (value := getattr(options, name)) is not None}
    limits = (NO_LIMITS if options.no_filter else Limits())._replace(**given)
    count = load_tokenizer(options.tokenizer) if options.tokenizer else estimate_tokens
    source, out, tally = options.source, options.out, Tally()
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist")
    with ExitStack() as stack:
        if re.match(r"https?://", source, re.IGNORECASE):
            file: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
            download(source, file)
            file.seek(0)
        else:
            if out.exists() and Path(source).exists() and out.samefile(source):
                raise UsageError(f"--out {out} would overwrite the source; name another file")
            file = stack.enter_context(Path(source).open("rb"))
        groups = usable(
            read_items(file), limits, count, tally, exact=bool(options.tokenizer), multi_turn=options.multi_turn
        )
        picked = sample(groups, options.samples, options.seed)
    if not picked:
        raise UsageError(
            f"nothing written: none of the {tally.read} conversations in {source} could be used"
            + (f"; dropped {reasons(tally.dropped)}" if tally.dropped else "")
        )
    write_lines(out, (request for group in picked for request in group))
    report(out, picked, limits, tally, options)


def report(out: Path, picked: list[list[Request]], limits: Limits, tally: Tally, options: argparse.Namespace) -> None:
    """Says what was written, what was not and why, and how tokens were counted."""
    written = sum(map(len, picked))
    say(
        f"read {tally.read} conversations, kept {tally.kept}, "
        f"wrote {written} requests of {len(picked)} conversations to {out} (seed {options.seed})"
    )
    if len(picked) < options.samples:
        say(f"fewer than the {options.samples} asked for: everything that could be used was written")
    if tally.dropped:
        say(f"dropped {reasons(tally.dropped)}")
    if tally.cut_short:
        say(f"cut short, earlier turns kept: {reasons(tally.cut_short)}")
    bounds = ", ".join(f"{name} {value}" for name, value in limits._asdict().items() if value not in (0, inf))
    say(f"filter, in tokens: {bounds or 'none'}")
    if options.tokenizer:
        say(f"tokens counted with {options.tokenizer}; expected_output_tokens is the recorded answer's length")
    else:
        say("tokens estimated as characters / 4, for the filter alone; expected_output_tokens is left out")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 written, 2 nothing written and one line on stderr saying why."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except UsageError as error:
        say(f"error: {error}")
    except UnicodeDecodeError:
        say(f"error: {options.source} is not UTF-8 text; is it compressed?")
    except OSError as error:
        say(f"error: {error.filename or options.source}: {error.strerror or error}")
    except KeyboardInterrupt:
        say("stopped, nothing written")
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
