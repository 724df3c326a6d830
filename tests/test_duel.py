import json

import pytest
from fake_server import FakeServer

from twoclocks import cli
from twoclocks.load import load_run
from twoclocks.study import read_study

ALONE = ["collect.gpu=none", "collect.otlp_port=none", "collect.otlp_grpc_port=none", "collect.metrics_url=none"]


@pytest.fixture
def quiet(tmp_path):
    settings = [*ALONE, "warmup.requests=0", f"output={tmp_path}", "target.model=m"]
    return ["--no-report", *(word for setting in settings for word in ("--set", setting))]


def test_both_get_the_prompt_in_turns_and_answers_are_kept(tmp_path, quiet, capsys):
    place = tmp_path / "duel"
    with FakeServer() as one, FakeServer() as other:
        ends = ["--a", f"vllm={one.url}", "--b", other.url]
        code = cli.main(
            ["duel", *ends, "--prompt", "Why?\n\u2028", "--repeats", "2", "--run-folder", str(place), *quiet]
        )
        asked = [[body["messages"][0]["content"] for _, body in server.requests] for server in (one, other)]
    stored = read_study(place)

    assert (code, stored.status) == (0, "finished")
    assert asked == [["Why?\n\u2028"] * 2] * 2
    assert [(cell.target, cell.repeat) for cell in stored.cells] == [
        ("A (vllm)", 1), ("B", 1), ("B", 2), ("A (vllm)", 2),
    ]  # fmt: skip
    texts = [list(load_run(place / cell.folder).requests["output_text"]) for cell in stored.cells]
    assert texts == [["w0 w1 w2 end"]] * 4
    assert json.loads(next(tmp_path.glob("prompt-*.jsonl")).read_text())["id"] == "prompt"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--a", "http://127.0.0.1:1"], "--a and --b: a duel needs both"),
        (["--set", "targets=[{name: A}]", "--set", "claims=[]"], "targets: a duel is between two, found 1"),
        (["--a", "http://127.0.0.1:1", "--b", "http://127.0.0.1:1"], "target A: http://127.0.0.1:1: not reachable"),
    ],
)
def test_what_is_no_duel_is_one_line(words, told, quiet, capsys):
    assert cli.main(["duel", *words, *quiet]) in (2, 3)
    assert told in capsys.readouterr().err.splitlines()[-1]
