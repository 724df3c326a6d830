"""requests/sharegpt.py: what becomes of each kind of conversation, and what the command line leaves behind."""

import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "requests" / "sharegpt.py"
PUBLIC_SLICE = ROOT.parent / "shared" / "data" / "sharegpt" / "sharegpt_v3.jsonl"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sharegpt_script", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


sharegpt = load_script()

Q, A = "How deep is the lake?", "Eleven metres near the old pier."


def talk(*turns: tuple[str, str], id: Any = "c1") -> dict[str, Any]:
    return {"id": id, "conversations": [{"from": role, "value": text} for role, text in turns]}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("item", "exchanges", "ended"),
    [
        (talk(("human", Q), ("gpt", A)), 1, None),
        (talk(("user", Q), ("assistant", A)), 1, None),
        (talk(("human", Q), ("chatgpt", A), ("human", Q), ("bing", A)), 2, None),
        ({"id": 7, "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, 1, None),
        (talk(("gpt", A), ("human", Q), ("gpt", A)), 1, None),
        (talk(("system", "Be brief."), ("human", Q), ("gpt", A)), 1, None),
        (talk(("human", Q), ("gpt", A), ("human", Q)), 1, "a question without an answer"),
        (talk(("human", Q), ("gpt", A), ("human", " \n")), 1, "an empty text"),
        (talk(("human", Q), ("gpt", A), ("gpt", A)), 1, "turns out of order"),
        (talk(("human", Q), ("gpt", A), ("system", "Now be long."), ("human", Q)), 1, "turns out of order"),
        (talk(("human", Q), ("human", Q), ("gpt", A)), 0, "turns out of order"),
        (talk(("human", Q)), 0, "a question without an answer"),
        (talk(("gpt", A)), 0, "no question with an answer"),
        (talk(), 0, "no question with an answer"),
        (talk(("narrator", Q), ("gpt", A)), 0, "an unknown role"),
        (talk(("human", ""), ("gpt", A)), 0, "an empty text"),
        (talk(("human", "half a pair \ud83d"), ("gpt", A)), 0, "a text with half a surrogate pair"),
        ({"conversations": [{"from": "human"}]}, 0, "an empty text"),
        ({"conversations": [{"value": Q}]}, 0, "an unknown role"),
        ({"conversations": [{"from": ["human"], "value": Q}]}, 0, "an unknown role"),
        ({"conversations": [{"from": "human", "value": 5}]}, 0, "an empty text"),
        ({"conversations": ["human"]}, 0, "a turn that is not an object"),
        ({"conversations": {"from": "human"}}, 0, "no list of turns"),
        ({"id": "x"}, 0, "no list of turns"),
        (["human", Q], 0, "not a JSON object"),
        (None, 0, "not a JSON object"),
    ],
)
def test_a_conversation_ends_before_the_first_turn_that_does_not_fit(
    item: object, exchanges: int, ended: str | None
) -> None:
    parsed = sharegpt.parse_conversation(item)

    assert (parsed.exchanges, parsed.ended) == ([(Q, A)] * exchanges, ended)


@pytest.mark.parametrize(
    ("prompt", "output", "reason"),
    [
        (4, 4, None),
        (3, 4, "prompt under 4 tokens"),
        (4, 3, "output under 4 tokens"),
        (1024, 1024, None),
        (1025, 4, "prompt over 1024 tokens"),
        (1024, 1025, "prompt + output over 2048 tokens"),
    ],
)
def test_the_default_limits_are_inclusive(prompt: int, output: int, reason: str | None) -> None:
    conversation = sharegpt.Conversation("c", None, [("q" * 4 * prompt, "a" * 4 * output)], None)

    requests, ended = sharegpt.make_requests(
        conversation, "c", sharegpt.Limits(), sharegpt.estimate_tokens, exact=False, multi_turn=False
    )

    assert (len(requests), ended) == (0 if reason else 1, reason)


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("éééé", 1)])
def test_estimate_is_a_quarter_of_the_characters_rounded_up(text: str, tokens: int) -> None:
    assert sharegpt.estimate_tokens(text) == tokens


def test_multi_turn_keeps_the_recorded_history_and_the_single_form_its_first_pair() -> None:
    turns = [("system", "Be brief."), ("human", "one?"), ("gpt", "1"), ("human", "two?"), ("gpt", "2 2")]
    conversation = sharegpt.parse_conversation(talk(*turns))

    def convert(multi_turn: bool) -> list[dict[str, Any]]:
        count = str.split
        made, ended = sharegpt.make_requests(
            conversation, "c1", sharegpt.NO_LIMITS, lambda t: len(count(t)), exact=True, multi_turn=multi_turn
        )
        assert ended is None
        return made

    system = {"role": "system", "content": "Be brief."}
    one, answer, two = (
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
    )
    assert convert(False) == [{"id": "c1", "messages": [system, one], "expected_output_tokens": 1}]
    assert convert(True) == [
        {"id": "c1-0", "messages": [system, one], "session": "c1", "turn": 0, "expected_output_tokens": 1},
        {
            "id": "c1-1",
            "messages": [system, one, answer, two],
            "session": "c1",
            "turn": 1,
            "expected_output_tokens": 2,
        },
    ]


def test_a_turn_over_the_limit_ends_the_session_and_its_history_counts() -> None:
    conversation = sharegpt.Conversation("c", None, [("q" * 40, "a" * 40)] * 3, None)  # prompts of 10, 30, 50 tokens

    requests, ended = sharegpt.make_requests(
        conversation, "c", sharegpt.Limits(max_prompt=30), sharegpt.estimate_tokens, exact=False, multi_turn=True
    )

    assert [request["turn"] for request in requests] == [0, 1]
    assert ended == "prompt over 30 tokens"


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_an_array_read_in_blocks_gives_what_json_gives(block: int) -> None:
    items = [talk(("human", 'a "quoted" ] } \\ é 🐸 \u2028'), ("gpt", "[1, 2]")), {}, [], None, talk(id="c2")]
    text = "\n " + json.dumps(items, indent=1, ensure_ascii=False) + "\n"

    assert list(sharegpt._array_items(io.StringIO(text), block)) == items


@pytest.mark.parametrize("text", ['[{"id": 1}', '[{"id": 1},', '[{"id": 1}, {"id"', "[{'id': 1}]", "[" * 100_000, "["])
def test_an_array_that_breaks_off_or_is_malformed_is_an_error(text: str) -> None:
    with pytest.raises(sharegpt.UsageError, match=r"array cannot be read beyond conversation \d+"):
        list(sharegpt._array_items(io.StringIO(text), 4))


def test_a_malformed_array_is_given_up_before_all_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharegpt, "LONGEST_ITEM", 100)
    text = io.StringIO("[{'id': 1}" + " " * 10_000)

    with pytest.raises(sharegpt.UsageError):
        list(sharegpt._array_items(text, 10))

    assert text.tell() < 500


def test_lines_end_at_line_feeds_alone_and_malformed_ones_are_none() -> None:
    raw = '\ufeff{"a": "x\u2028y\u0085z"}\r\n\n{"a": \n[1]\n"tail"'.encode() + b"\n\xff\xfe\n" + b"[" * 100_000

    assert list(sharegpt._line_items(io.BytesIO(raw))) == [{"a": "x\u2028y\u0085z"}, None, [1], "tail", None, None]


def test_a_sample_is_the_one_that_sorting_all_by_the_same_draws_gives() -> None:
    groups = [[{"id": str(number)}] for number in range(200)]
    draw = random.Random(5)
    by_draw = sorted(groups, key=lambda _: draw.random())

    assert sharegpt.sample(iter(groups), 30, 5) == by_draw[:30]
    assert sharegpt.sample(groups, 1000, 5) == by_draw
    assert sharegpt.sample(groups, 30, 6) != by_draw[:30]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 good conversations, then one of each kind of bad luck; the id c19 comes twice."""
    good = [talk(("human", f"{Q} Number {n}? 🐟 水"), ("gpt", A), id=f"c{n}") for n in range(20)]
    bad = [talk(("human", "Hm?"), ("gpt", A)), talk(("human", Q), ("gpt", A), id="c19"), {"id": "x"}, 5]
    return write_jsonl(tmp_path / "source.jsonl", good + bad)


def test_same_source_and_seed_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, ("1", "1", "2"), strict=True):
        assert sharegpt.main([str(source), "--out", str(out), "--samples", "10", "--seed", seed]) == 0

    first, again, other = (out.read_bytes() for out in outs)
    assert first == again != other
    assert "🐟 水".encode() in first
    assert len({request["id"] for request in lines(outs[0])}) == 10
    assert all(set(request) == {"id", "messages"} for request in lines(outs[0]))


def test_the_array_and_the_lines_of_the_same_conversations_give_the_same_file(source: Path, tmp_path: Path) -> None:
    array = tmp_path / "source.json"
    array.write_text(json.dumps(lines(source)), encoding="utf-8")

    for file in (source, array):
        assert sharegpt.main([str(file), "--out", str(file.with_suffix(".out")), "--samples", "10"]) == 0

    assert array.with_suffix(".out").read_bytes() == source.with_suffix(".out").read_bytes()


def test_summary_says_what_was_read_kept_written_and_why_the_rest_was_not(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sharegpt.main([str(source), "--out", str(tmp_path / "out.jsonl"), "--samples", "50"]) == 0

    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "read 24 conversations, kept 20, wrote 20 requests of 20 conversations" in stderr
    assert "fewer than the 50 asked for" in stderr
    assert "dropped 4 (" in stderr
    for reason in ("prompt under 4 tokens: 1", "an id seen before: 1", "no list of turns: 1", "not a JSON object: 1"):
        assert reason in stderr
    assert "estimated as characters / 4" in stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"mid"}),
        (["--no-filter"], {"short", "mid", "long"}),
        (["--no-filter", "--max-prompt", "1024"], {"short", "mid"}),
        (["--min-prompt", "1", "--min-output", "1"], {"short", "mid"}),
        (["--max-prompt", "5000", "--max-total", "5000"], {"mid", "long"}),
    ],
)
def test_the_filter_is_switched_and_each_limit_is_given(options: list[str], expected: set[str], tmp_path: Path) -> None:
    texts = {"short": "Hm?", "mid": Q, "long": "word " * 1000}
    source = write_jsonl(tmp_path / "in", [talk(("human", text), ("gpt", A), id=id) for id, text in texts.items()])

    assert sharegpt.main([str(source), "--out", str(tmp_path / "out"), *options]) == 0
    assert {request["id"] for request in lines(tmp_path / "out")} == expected


def test_conversations_without_an_id_are_named_by_their_place(tmp_path: Path) -> None:
    items = [talk(("human", Q), ("gpt", A), id=id) for id in (None, "", ["x"], 0)]

    assert sharegpt.main([str(write_jsonl(tmp_path / "in", items)), "--out", str(tmp_path / "out")]) == 0
    ids = {request["id"] for request in lines(tmp_path / "out")}
    assert ids == {"conversation-1", "conversation-2", "conversation-3", "0"}


def failure(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert sharegpt.main([str(argument) for argument in arguments]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert "error: " in stderr
    return stderr


def test_what_the_user_can_mend_is_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    empty, broken, packed = tmp_path / "empty", tmp_path / "broken.json", tmp_path / "packed.json"
    empty.write_bytes(b"")
    broken.write_text('[{"id": 1, "conversations": [')
    packed.write_bytes(b"[\x8b\xff\x00")

    assert "No such file" in failure([tmp_path / "none.jsonl", "--out", out], capsys)
    assert "none of the 0 conversations" in failure([empty, "--out", out], capsys)
    assert "beyond conversation 0" in failure([broken, "--out", out], capsys)
    assert "not UTF-8" in failure([packed, "--out", out], capsys)
    assert "prompt under 900 tokens: 2" in failure([source, "--out", out, "--min-prompt", "900"], capsys)
    assert "does not exist" in failure([source, "--out", tmp_path / "no" / "out.jsonl"], capsys)
    assert "is a folder" in failure([source, "--out", tmp_path], capsys)
    assert "overwrite the source" in failure([source, "--out", source], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "empty", "packed.json", "source.jsonl"]


@pytest.mark.parametrize("samples", ["0", "-3", "many"])
def test_a_sample_size_that_is_none_is_bad_usage(samples: str, source: Path) -> None:
    with pytest.raises(SystemExit) as exit:
        sharegpt.main([str(source), "--samples", samples])

    assert exit.value.code == 2


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")

    def requests() -> Iterator[dict[str, Any]]:
        yield {"id": "1"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharegpt.write_lines(out, requests())

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.jsonl", "old")]


def test_with_a_tokenizer_the_answers_length_is_recorded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    class Tokenizer:  # one token a word: enough to see whose count arrives
        @staticmethod
        def from_file(path: str) -> "Tokenizer":
            opened.append(path)
            return Tokenizer()

        def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
            return SimpleNamespace(ids=text.split() + ["<s>"] * add_special_tokens)

    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Tokenizer))
    out = tmp_path / "out.jsonl"

    assert sharegpt.main([str(source), "--out", str(out), "--tokenizer", str(tmp_path)]) == 0
    assert opened == [str(tmp_path / "tokenizer.json")]
    assert {request["expected_output_tokens"] for request in lines(out)} == {len(A.split())}
    assert "tokens counted with" in capsys.readouterr().err


def test_a_missing_tokenizer_package_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    stderr = failure([source, "--out", tmp_path / "out", "--tokenizer", "tokenizer.json"], capsys)

    assert "pip install tokenizers" in stderr


@pytest.fixture
def site(source: Path) -> Iterator[str]:
    body = source.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
            elif self.path == "/missing":
                self.send_response(404)
                self.end_headers()
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + (self.path == "/cut")))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_gives_the_same_as_the_file(source: Path, site: str, tmp_path: Path) -> None:
    for name, where in {"a": str(source), "b": f"{site}/moved"}.items():
        assert sharegpt.main([where, "--out", str(tmp_path / name)]) == 0

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("path", "said"), [("/missing", "answered 404"), ("/cut", "could not be downloaded")])
def test_a_download_that_fails_is_one_line(
    path: str, said: str, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failure([site + path, "--out", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "could not be downloaded" in failure(["http://127.0.0.1:1/x", "--out", tmp_path / "out"], capsys)


def test_the_script_runs_from_the_repository_root(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    done = subprocess.run(
        [sys.executable, "requests/sharegpt.py", str(source), "--out", str(out), "--samples", "3", "--multi-turn"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (0, "")
    assert [request["turn"] for request in lines(out)] == [0, 0, 0]


def test_the_folder_requests_does_not_shadow_the_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import requests; print(requests.__file__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert not (ROOT / "requests" / "__init__.py").exists()
    assert done.returncode == 0, done.stderr
    assert ROOT / "requests" not in Path(done.stdout.strip()).parents


@pytest.mark.skipif(not PUBLIC_SLICE.exists(), reason="needs the slice of the public file beside the repository")
@pytest.mark.parametrize("options", [[], ["--multi-turn"], ["--no-filter"], ["--multi-turn", "--no-filter"]])
def test_the_public_conversations_give_the_classic_500(options: list[str], tmp_path: Path) -> None:
    source = {
        item["id"]: [turn["value"] for turn in item["conversations"]]
        for item in map(json.loads, PUBLIC_SLICE.read_bytes().splitlines())
    }
    out = tmp_path / "out.jsonl"

    assert sharegpt.main([str(PUBLIC_SLICE), "--out", str(out), *options]) == 0

    requests = lines(out)
    assert len({request["id"] for request in requests}) == len(requests)
    assert len({request.get("session", request["id"]) for request in requests}) == 500
    for request in requests:
        texts = [message["content"] for message in request["messages"]]
        recorded = source[request.get("session", request["id"])]
        start = next(at for at in range(len(recorded)) if recorded[at] == texts[0])
        assert recorded[start : start + len(texts)] == texts
        assert len(texts) == 2 * request.get("turn", 0) + 1
        if "--no-filter" not in options:
            answer = recorded[start + len(texts)]
            assert 4 <= sum(-(-len(text) // 4) for text in texts) <= 1024
            assert sum(-(-len(text) // 4) for text in [*texts, answer]) <= 2048
