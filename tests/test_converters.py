"""The converters in requests/: what becomes of small traces written here, and what their command lines say."""

import json
import runpy
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from twoclocks.prefix_plan import Sent, intended
from twoclocks.prompts import load_prompts
from twoclocks.synthetic import WORDS

tokenizers = pytest.importorskip("tokenizers")

REQUESTS = Path(__file__).parents[1] / "requests"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


Outcome = tuple[int, list[dict[str, Any]], str]


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs a converter on the text of a source; gives its exit code, the requests that it wrote, and its stderr."""
    monkeypatch.syspath_prepend(REQUESTS)

    def run(name: str, source: str | bytes | None, *options: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", command_line(tmp_path, name, source, options))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return outcome(tmp_path, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def convert_apart(tmp_path):
    """The same in a process of its own."""

    def run(name: str, source: str | bytes | None, *options: object) -> Outcome:
        command = [sys.executable, *command_line(tmp_path, name, source, options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return outcome(tmp_path, done.returncode, done.stdout, done.stderr)

    return run


def command_line(folder: Path, name: str, source: str | bytes | None, options: tuple[object, ...]) -> list[str]:
    words: list[object] = [REQUESTS / f"{name}.py"]
    if source is not None:
        (folder / "source").write_bytes(source.encode() if isinstance(source, str) else source)
        words.append(folder / "source")
    (folder / "out.jsonl").unlink(missing_ok=True)
    return list(map(str, (*words, "--out", folder / "out.jsonl", *options)))


def intended_share(path: Path) -> float | None:
    """Of the prompts of a file that is sent once."""
    prompts, sent = load_prompts(path, "chat"), Sent()
    for prompt in prompts:
        sent.add(prompt)
    return intended(prompts, [sent], Sent(), "none").share


def outcome(folder: Path, code: int, stdout: str, stderr: str) -> Outcome:
    out = folder / "out.jsonl"
    lines = out.read_bytes().splitlines() if out.exists() else []
    assert stdout == ""
    assert "Traceback" not in stderr
    if code == 0:
        assert len(load_prompts(out, "chat")) == len(lines)
    return code, list(map(json.loads, lines)), stderr


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    """A tokenizer of 120 of the words, in the way of GPT-2: the space belongs to the word after it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS[:120]] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def counter(path: Path):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda words: len(tokenizer.encode(words, add_special_tokens=False).ids)


# azure


AZURE_ROWS = [
    ("2023-11-16 18:15:46.6805900", 374, 44),
    ("2023-11-16 18:15:50.9951690", 396, 109),
    ("2023-11-16 18:15:51.2224670", 879, 55),
    ("2023-11-16 18:16:46.6805900", 5, 1),
]
AZURE_TRACE = AZURE + "".join(f"{at},{context},{generated}\n" for at, context, generated in AZURE_ROWS)


def test_azure_keeps_times_and_lengths(convert, tokenizer_file):
    code, made, said = convert("azure", AZURE_TRACE, "--tokenizer", tokenizer_file)
    count = counter(tokenizer_file)

    assert code == 0, said
    assert [one["at"] for one in made] == [0, 4.314579, 4.541877, 60]
    assert [one["max_tokens"] for one in made] == [one["expected_output_tokens"] for one in made] == [44, 109, 55, 1]
    assert [count(one["prompt"]) for one in made] == [374, 396, 879, 5]
    assert [one["expected_prompt_tokens"] for one in made] == [374, 396, 879, 5]
    assert made[0]["made"] == {"by": "azure.py", "tokens": "tokenizer", "scale_input": 1, "scale_output": 1}
    assert "exact by the tokenizer" in said


def test_azure_without_a_tokenizer_makes_a_word_a_token_and_claims_nothing(convert):
    _, made, said = convert("azure", AZURE_TRACE)

    assert [len(one["prompt"].split()) for one in made] == [374, 396, 879, 5]
    assert all("expected_prompt_tokens" not in one and one["made"]["tokens"] == "estimate" for one in made)
    assert "estimated as one token a word" in said


def test_the_same_seed_gives_the_same_file_and_another_one_another(convert):
    first, again, other = (convert("azure", AZURE_TRACE, "--seed", seed)[1] for seed in (1, 1, 2))

    assert first == again
    assert [one["prompt"] for one in first] != [one["prompt"] for one in other]
    assert [one["at"] for one in first] == [one["at"] for one in other]


def test_a_window_and_a_limit_count_from_the_first_request_kept(convert):
    _, made, said = convert("azure", AZURE_TRACE, "--window", 4, 60)
    _, one, _ = convert("azure", AZURE_TRACE, "--window", 4, 100, "--limit", 1)

    assert [(line["at"], line["max_tokens"]) for line in made] == [(0, 109), (0.227298, 55)]
    assert [line["id"] for line in one] == ["azure-000002"]
    assert "wrote 2 of 4 requests" in said


def test_lengths_are_scaled_and_stay_above_nothing(convert):
    _, made, _ = convert("azure", AZURE_TRACE, "--scale-input", 0.1, "--scale-output", 0.5)

    assert [len(one["prompt"].split()) for one in made] == [37, 40, 88, 1]
    assert [one["max_tokens"] for one in made] == [22, 54, 28, 1]
    assert (made[0]["made"]["scale_input"], made[0]["made"]["scale_output"]) == (0.1, 0.5)


def test_a_trace_out_of_order_is_sorted_with_a_note(convert):
    rows = [AZURE_ROWS[place] for place in (2, 0, 3, 1)]
    code, made, said = convert("azure", AZURE + "".join(f"{at},{one},{two}\n" for at, one, two in rows))

    assert code == 0
    assert [(one["at"], one["max_tokens"]) for one in made] == [(0, 44), (4.314579, 109), (4.541877, 55), (60, 1)]
    assert "2 of 4 requests came before the one above them: sorted by time" in said


def test_columns_may_stand_anywhere_and_times_may_have_a_zone(convert):
    text = "\ufeffGeneratedTokens,x,ContextTokens,TIMESTAMP\r\n7,?,3,2024-05-10 00:00:01+00:00\r\n\r\n"
    text += "8,?,4,2024-05-10 02:00:02+02:00\r\n"
    code, made, said = convert("azure", text)

    assert code == 0, said
    assert [(one["at"], one["max_tokens"], len(one["prompt"].split())) for one in made] == [(0, 7, 3), (1, 8, 4)]


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (AZURE + "2023-11-16 18:15:46,1,1\nsoon,1,1\n", (), "source line 3: TIMESTAMP: expected a time such as"),
        (AZURE + "-5,1,1\n", (), "line 2: TIMESTAMP: expected a time such as 2023-11-16 18:15:46.68, found '-5'"),
        (AZURE + "2023-11-16,-3,1\n", (), "line 2: ContextTokens: expected a number of tokens, found '-3'"),
        (AZURE + "2023-11-16,3,1.5\n", (), "line 2: GeneratedTokens: expected a number of tokens, found '1.5'"),
        (AZURE + "2023-11-16,3," + "9" * 5000, (), "line 2: GeneratedTokens: expected a number of tokens, found '9999"),
        (AZURE + "2023-11-16,3\n", (), "line 2: expected 3 cells or more, found 2"),
        (
            "TIMESTAMP,Tokens\n1,2\n",
            (),
            "line 1: no column 'ContextTokens', 'GeneratedTokens'; found 'TIMESTAMP,Tokens'",
        ),
        ("", (), "line 1: no column 'TIMESTAMP', 'ContextTokens', 'GeneratedTokens'"),
        (AZURE, (), "holds no request"),
        (AZURE + "2023-11-16,0,5\n", (), "holds no request; dropped 1 (no prompt tokens: 1)"),
        (AZURE.encode() + b"\xff\xfe,1,1\n", (), "line 2: 'utf-8' codec can't decode"),
        (b"\x00" * (17 << 20), (), "line 1: is longer than 16 MiB"),
        (AZURE_TRACE, ("--window", 100, 200), "--window 100 200: no request in it;"),
        (AZURE_TRACE, ("--window", 9, 3), "--window 9 3: expected two times in seconds, the later one last"),
        (AZURE_TRACE, ("--window", -9, 3), "--window -9 3: expected two times"),
        (AZURE_TRACE, ("--limit", 0), "'0' is not a whole number above 0"),
        (AZURE_TRACE, ("--scale-input", "nan"), "'nan' is not a number above 0"),
        (AZURE_TRACE, ("--scale-input", 1e6), "GB that whoever sends them holds in memory; choose a part"),
        (AZURE_TRACE, ("--tokenizer", "gone.json"), "--tokenizer gone.json is not a readable tokenizer.json"),
        (AZURE_TRACE, ("--tokenize-url", "ftp://x"), "--tokenize-url: expected http://HOST:PORT, found 'ftp://x'"),
        (
            AZURE_TRACE,
            ("--tokenize-url", "http://8.8.8.8"),
            "8.8.8.8 is a public address; say --yes if its owner agrees",
        ),
        (AZURE_TRACE, ("--out", "gone/out.jsonl"), "--out gone/out.jsonl: the folder gone does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(convert, source, options, expected):
    code, made, said = convert("azure", source, *options)

    assert code == 2
    assert made == []
    assert expected in said.splitlines()[-1]


def test_a_missing_source_and_one_that_would_be_overwritten(convert, tmp_path):
    assert "No such file" in convert("azure", None, tmp_path / "gone.csv")[2]
    code, _, said = convert("azure", AZURE_TRACE, "--out", tmp_path / "source")

    assert code == 2
    assert "would overwrite the source" in said
    assert (tmp_path / "source").read_text() == AZURE_TRACE


# burstgpt


def test_burstgpt_leaves_out_failures_and_other_models(convert):
    rows = "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,20,30,50,API log\n50,ChatGPT,12,0,12,API log\n"
    rows += "118,ChatGPT,7,6,13,API log\n"
    _, everything, said = convert("burstgpt", BURST + rows)
    _, one, _ = convert("burstgpt", BURST + rows, "--model", "ChatGPT", "--log-type", "API log")

    assert [(line["at"], len(line["prompt"].split()), line["max_tokens"]) for line in everything] == [
        (0, 472, 18),
        (40.5, 20, 30),
        (113, 7, 6),
    ]
    assert "dropped 1 (no answer tokens: 1)" in said
    assert [(line["at"], line["max_tokens"]) for line in one] == [(0, 6)]
    assert (one[0]["made"]["model"], one[0]["made"]["log_type"]) == ("ChatGPT", "API log")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("-1,ChatGPT,1,1,2,API log", "line 2: Timestamp: expected a time of 0 or later, found -1.0"),
        ("nan,ChatGPT,1,1,2,API log", "line 2: Timestamp: expected a time of 0 or later, found nan"),
        ("x,ChatGPT,1,1,2,API log", "line 2: Timestamp: expected a time of 0 or later, found 'x'"),
        ("1,ChatGPT,1,,2,API log", "line 2: Response tokens: expected a number of tokens, found ''"),
    ],
)
def test_burstgpt_names_the_line(convert, row, expected):
    code, _, said = convert("burstgpt", BURST + row + "\n")

    assert code == 2
    assert expected in said


# mooncake


def mooncake_line(at, length, output, ids):
    return json.dumps({"timestamp": at, "input_length": length, "output_length": output, "hash_ids": ids}) + "\n"


MOONCAKE = (
    mooncake_line(0, 1300, 500, [0, 1, 2])
    + mooncake_line(2000, 1600, 490, [0, 1, 3, 4])
    + mooncake_line(3500, 1300, 10, [0, 5, 6])
    + mooncake_line(3500, 300, 10, [0])
)


def blocks_of(prompt: str, size: int) -> list[tuple[str, ...]]:
    words = prompt.split()
    return [tuple(words[begin : begin + size]) for begin in range(0, len(words), size)]


def test_mooncake_gives_equal_ids_equal_text(convert, tokenizer_file):
    code, made, said = convert("mooncake", MOONCAKE, "--tokenizer", tokenizer_file)
    count = counter(tokenizer_file)
    first, second, third, short = (blocks_of(one["prompt"], 512) for one in made)

    assert code == 0, said
    assert [one["at"] for one in made] == [0, 2, 3.5, 3.5]
    assert [one["max_tokens"] for one in made] == [500, 490, 10, 10]
    assert [count(one["prompt"]) for one in made] == [1300, 1600, 1300, 300]
    assert first[:2] == second[:2]
    assert first[0] == third[0]
    assert first[1] != third[1]
    assert first[2][:10] != second[2][:10]
    assert short[0] == first[0][:300]


def test_mooncake_blocks_are_scaled_with_the_prompts(convert):
    _, made, _ = convert("mooncake", MOONCAKE, "--block-tokens", 16, "--scale-output", 0.1)
    first, second, third, _ = (blocks_of(one["prompt"], 16) for one in made)

    assert [len(one["prompt"].split()) for one in made] == [round(length / 32) for length in (1300, 1600, 1300, 300)]
    assert first[:2] == second[:2]
    assert (first[0], first[1]) == (third[0], second[1])
    assert made[0]["max_tokens"] == 50
    facts = {"block_tokens": 16, "scale_input": 1 / 32, "scale_output": 0.1}
    assert made[0]["made"] == {"by": "mooncake.py", "tokens": "estimate"} | facts


def test_mooncake_fills_up_what_its_blocks_do_not_cover(convert):
    _, made, _ = convert("mooncake", MOONCAKE, "--block-tokens", 16, "--scale-input", 1)
    words = [one["prompt"].split() for one in made]

    assert [len(one) for one in words] == [1300, 1600, 1300, 300]
    assert words[0][:32] == words[1][:32]
    assert words[0][48:] != words[1][64:][: len(words[0]) - 48]


def test_the_share_of_a_mooncake_trace_that_a_cache_could_answer_is_kept(convert, tmp_path):
    ids, text = iter(range(10_000)), ""
    for group in range(30):
        shared = [next(ids) for _ in range(group % 4 + 1)]
        for turn in range(5):
            own = [next(ids) for _ in range(2)]
            text += mooncake_line(group * 1000 + turn, 512 * (len(shared) + 2), 5, shared + own)
    seen, hits, total = set(), 0, 0
    for line in text.splitlines():
        blocks = json.loads(line)["hash_ids"]
        hits, total = hits + sum(one in seen for one in blocks), total + len(blocks)
        seen.update(blocks)
    convert("mooncake", text, "--block-tokens", 32)

    assert intended_share(tmp_path / "out.jsonl") == pytest.approx(hits / total, abs=0.01)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{oops", "line 2: is not JSON"),
        ("[" * 50_000, "line 2: is not JSON: nested too deep"),
        ("[1]", "line 2: has no 'timestamp', 'input_length', 'output_length', 'hash_ids'"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5}', "line 2: has no 'hash_ids'"),
        (mooncake_line(-1, 5, 5, [0]), "line 2: timestamp: expected a time of 0 or later, found -1"),
        (mooncake_line(True, 5, 5, [0]), "line 2: timestamp: expected a time of 0 or later, found True"),
        (mooncake_line(1, 5.5, 5, [0]), "line 2: input_length: expected a number of tokens, found 5.5"),
        (mooncake_line(1, 5, 5, ["a"]), "line 2: hash_ids: expected a list of whole numbers"),
        (mooncake_line(1, 5, 5, 3), "line 2: hash_ids: expected a list of whole numbers"),
    ],
)
def test_mooncake_names_the_line(convert, line, expected):
    code, _, said = convert("mooncake", mooncake_line(0, 5, 5, [0]) + line)

    assert code == 2
    assert expected in said


# mtbench


def test_mtbench_makes_sessions_of_its_turns(convert):
    text = json.dumps({"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}) + "\n"
    text += json.dumps({"question_id": 82, "turns": ["2+2?", "And 1?"], "reference": ["4", "5"]}) + "\n"
    text += json.dumps({"question_id": 83, "turns": ["A?", "B?"], "reference": ["", "b"]}) + "\n"
    _, made, said = convert("mtbench", text, "--answer-tokens", 30, "--max-tokens", 9)

    assert [(one["id"], one["session"], one["turn"]) for one in made[:2]] == [
        ("mtbench-81-0", "mtbench-81", 0),
        ("mtbench-81-1", "mtbench-81", 1),
    ]
    assert [[message["role"] for message in one["messages"]] for one in made[:2]] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert made[1]["messages"][0] == made[0]["messages"][0] == {"role": "user", "content": "Write."}
    assert len(made[1]["messages"][1]["content"].split()) == 30
    assert made[3]["messages"][1]["content"] == "4"
    answers = ["nobody", "random words", "nobody", "reference", "nobody", "random words"]
    assert [one["made"]["answers"] for one in made] == answers
    assert {one["max_tokens"] for one in made} == {9}
    assert "wrote 6 requests of 3 sessions" in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{oops", "line 1: is not JSON"),
        ("[]", "line 1: turns: expected a list of texts"),
        ('{"turns": "hello"}', "line 1: turns: expected a list of texts, found 'hello'"),
        ('{"turns": []}', "line 1: turns: has an empty one, or none"),
        ('{"turns": ["a", ""]}', "line 1: turns: has an empty one, or none"),
        ('{"turns": ["a"], "reference": [1]}', "line 1: reference: expected a list of texts"),
        ("\n", "holds no question"),
    ],
)
def test_mtbench_names_the_line(convert, line, expected):
    code, _, said = convert("mtbench", line)

    assert code == 2
    assert expected in said


# sonnet


POEM = "".join(f"{' '.join(WORDS[number : number + 6])},\n\n" for number in range(0, 100, 2))
"""Fifty lines of seven tokens and a line feed, with blank lines between them."""


def test_sonnet_prompts_share_their_first_lines(convert):
    _, made, said = convert("sonnet", POEM, "--lines", 12, "--prefix-lines", 4, "--requests", 20)
    poem = [line for line in POEM.splitlines() if line]
    lines = [one["prompt"].splitlines() for one in made]

    assert {one[0] for one in lines} == {"Pick as many lines as you can from these poem lines:"}
    assert all(one[1:5] == poem[:4] and len(one) == 13 and set(one[5:]) <= set(poem) for one in lines)
    assert len({tuple(one[5:]) for one in lines}) == 20
    assert {one["max_tokens"] for one in made} == {150}
    assert "20 requests of 12 lines, the first 4 shared" in said


def test_sonnet_lengths_in_tokens_become_lines_as_vllm_counts_them(convert, tokenizer_file):
    options = ("--input-tokens", 300, "--prefix-tokens", 150, "--tokenizer", tokenizer_file)
    _, made, _ = convert("sonnet", POEM, *options)
    count = counter(tokenizer_file)
    poem = [line + "\n" for line in POEM.splitlines() if line]
    mean = sum(map(count, poem)) / len(poem)
    instruction = count("Pick as many lines as you can from these poem lines:\n")
    facts = made[0]["made"]

    assert facts["lines"] == round((300 - instruction) / mean)
    assert facts["prefix_lines"] == round((150 - instruction) / mean)
    assert all(one["prompt"].count("\n") == facts["lines"] + 1 for one in made)
    assert all(count(one["prompt"]) == one["expected_prompt_tokens"] <= 300 for one in made)
    assert [one["expected_cached_tokens"] > 100 for one in made] == [False] + [True] * 99


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("\n\n", (), "holds no line"),
        (b"\xff", (), "is not UTF-8 text"),
        (POEM, ("--input-tokens", 100, "--prefix-tokens", 200), "shared lines do not fit into prompts of"),
        (POEM, ("--lines", 80, "--prefix-lines", 60), "60 shared lines do not fit into prompts of 80 (the file has 50"),
        (POEM, ("--requests", 1_000_000), "GB: too many"),
        (POEM, ("--prefix-lines", -1), "'-1' is not a whole number above 0"),
    ],
)
def test_what_sonnet_cannot_make_is_one_line(convert, source, options, expected):
    code, made, said = convert("sonnet", source, *options)

    assert code == 2
    assert made == []
    assert expected in said.splitlines()[-1]


# synthetic


@pytest.mark.parametrize(
    ("length", "fits"),
    [
        ("64", lambda lengths: set(lengths) == {64}),
        ("10-20", lambda lengths: set(lengths) == set(range(10, 21))),
        ("10,200", lambda lengths: set(lengths) == {10, 200} and 60 < lengths.count(10) < 140),
        ("normal:60:10", lambda lengths: 57 < sum(lengths) / 200 < 63 and 30 < min(lengths) < 50 < 70 < max(lengths)),
    ],
)
def test_synthetic_lengths(convert, tokenizer_file, length, fits):
    options = ("--requests", 200, "--input", length, "--output", length, "--tokenizer", tokenizer_file)
    code, made, said = convert("synthetic", None, *options)
    count = counter(tokenizer_file)
    lengths = [count(one["prompt"]) for one in made]

    assert code == 0, said
    assert fits(lengths)
    assert fits([one["max_tokens"] for one in made])
    assert lengths == [one["expected_prompt_tokens"] for one in made]


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_synthetic_meets_the_hit_rate(convert, tokenizer_file, tmp_path, rate):
    options = ("--requests", 300, "--input", "450-510", "--prefixes", 7, "--prefix-tokens", 440, "--hit-rate", rate)
    code, made, said = convert("synthetic", None, *options, "--tokenizer", tokenizer_file)
    total, hits = sum(one["expected_prompt_tokens"] for one in made), sum(one["expected_cached_tokens"] for one in made)
    beginnings = Counter(" ".join(one["prompt"].split()[:440]) for one in made)
    shared = {beginning: times for beginning, times in beginnings.items() if times > 1}

    assert code == 0, said
    assert hits / total == pytest.approx(rate, abs=440 / total)
    assert made[0]["made"]["hit_rate"] == pytest.approx(hits / total, abs=1e-6)
    assert len(shared) == 7
    assert sum(times - 1 for times in shared.values()) * 440 == hits
    assert intended_share(tmp_path / "out.jsonl") == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--input", "0"), "'0' is none of 512, 100-1000, normal:512:128 and 128,512,2048"),
        (("--input", "20-10"), "'20-10' is none of"),
        (("--output", "normal:5:0"), "'normal:5:0' is none of"),
        (("--output", "many"), "'many' is none of"),
        (("--hit-rate", "1.5"), "'1.5' is not a number from 0 to 1"),
        (("--hit-rate", "0.5"), "--hit-rate needs --prefixes and --prefix-tokens"),
        (("--prefixes", 3), "--prefixes and --prefix-tokens belong together"),
        (
            ("--prefixes", 3, "--prefix-tokens", 64, "--hit-rate", 0.8),
            "--hit-rate cannot be met: 3 prefixes of 64 tokens",
        ),
        (("--prefixes", 3, "--prefix-tokens", 600), "--hit-rate cannot be met: 3 prefixes of 600 tokens"),
        (("--requests", 10_000_000), "--requests: expected 1000000 or fewer, found 10000000"),
        (("--requests", 1000, "--input", "10000000"), "million prompt tokens are some 60.0 GB"),
    ],
)
def test_what_synthetic_cannot_make_is_one_line(convert, options, expected):
    code, made, said = convert("synthetic", None, *options)

    assert code == 2
    assert made == []
    assert expected in said.splitlines()[-1]


# a server's own tokenizer


@contextmanager
def tokenize_server(form: str, count) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers POST /tokenize as a server of this form does: its address, and the bodies that it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            status, answer = 200, b"nothing of the kind"
            if form == "vllm" and "prompt" in body:
                size = count(body["prompt"]) + body.get("add_special_tokens", True)
                answer = json.dumps({"count": size, "max_model_len": 512, "tokens": [0] * size}).encode()
            elif form == "vllm":
                status = 400
            elif form == "llamacpp":
                text = body.get("content")
                size = 0 if text is None else count(text) + body.get("add_special", False)
                answer = json.dumps({"tokens": [0] * size}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("form", ["vllm", "llamacpp"])
def test_lengths_are_exact_by_the_tokenizer_of_a_server(convert_apart, tokenizer_file, form):
    count = counter(tokenizer_file)
    with tokenize_server(form, count) as (url, bodies):
        code, made, said = convert_apart("azure", AZURE_TRACE, "--tokenize-url", f"{url}/v1")

    assert code == 0, said
    assert [count(one["prompt"]) for one in made] == [374, 396, 879, 5]
    assert {one["made"]["tokens"] for one in made} == {"server"}
    assert len(bodies) < 1000
    longest = max(len(body.get("prompt", body.get("content", "")).split()) for body in bodies)
    assert longest <= 512  # so that no server says it is longer than its context


def test_a_server_without_tokenizer_is_named(convert_apart):
    with tokenize_server("neither", len) as (url, _):
        code, _, said = convert_apart("azure", AZURE_TRACE, "--tokenize-url", url)

    assert code == 2
    assert f"{url}/tokenize answers neither as vLLM does nor as llama.cpp (HTTP 200)" in said


def test_a_server_that_is_not_there_is_named(convert_apart):
    with tokenize_server("vllm", len) as (url, _):
        pass
    code, _, said = convert_apart("azure", AZURE_TRACE, "--tokenize-url", url)

    assert code == 2
    assert f"{url}/tokenize: " in said
    assert "refused" in said


# the command line


def test_every_script_has_help_with_an_example():
    for name in ("azure", "burstgpt", "mooncake", "mtbench", "sonnet", "synthetic"):
        done = subprocess.run(
            [sys.executable, REQUESTS / f"{name}.py", "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        assert f"python requests/{name}.py" in done.stdout
