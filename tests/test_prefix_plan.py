"""The share of the prompts that a perfect prefix cache could answer, against its meaning taken literally."""

import json
import random

import msgspec
import pytest
from fake_server import FakeServer
from locust_runs import read, run
from test_sessions import assistant, experiment_of, keys, new_alone, reply, script, whole, write

from twoclocks import prefix_plan
from twoclocks.prefix_plan import Sent, intended
from twoclocks.prompts import load_prompts
from twoclocks.workload import load_workload, plans


def text_of(messages):
    return "".join(f"{message['content']}\0{message['role']}\0" for message in messages)


def by_meaning(texts, *, before=(), generated=()):
    """What of each text, in the order of sending, began a text that had come (or had been answered) before."""
    seen = {text[: end + 1] for text in before for end in range(len(text))}
    hits = 0
    for text, answered in zip(texts, generated or [""] * len(texts), strict=True):
        begun = [text[: end + 1] for end in range(len(text))]
        hits += sum(one in seen for one in begun)
        seen.update(begun)
        known = text + answered
        seen.update(known[: end + 1] for end in range(len(text), len(known)))
    return hits / sum(map(len, texts))


def prompts_of(tmp_path, *lines, api="chat"):
    return load_prompts(write(tmp_path, *lines), api)


def share(prompts, *orders, warmup=(), salt="none"):
    """Each order is what one process sends."""
    processes, warmed = [Sent() for _ in orders], Sent()
    for sent, order in [*zip(processes, orders, strict=True), (warmed, warmup)]:
        for prompt in order:
            sent.add(prompt)
    return intended(prompts, processes, warmed, salt)


def test_it_is_what_its_meaning_says(tmp_path):
    rng = random.Random(5)
    texts = ["".join(rng.choices("ab", k=rng.randrange(1, 12))) for _ in range(200)]
    prompts = prompts_of(tmp_path, *[{"prompt": text} for text in texts], api="completions")
    order = [rng.randrange(200) for _ in range(300)]
    sent = [texts[number] + "\0None\0" for number in order]
    told = share(prompts, [prompts[number] for number in order])

    assert told.share == pytest.approx(by_meaning(sent), abs=1e-12)
    assert (told.characters, told.requests, told.left_out) == (sum(map(len, sent)), 300, 0)
    # who sends what, and in which order, does not matter; what the warm-up has sent is known, and does not count itself
    assert share(prompts, *[[prompts[number] for number in order[part::3]] for part in range(3)]) == told
    warmup = [prompts[number] for number in order[:20]]
    assert share(prompts, [prompts[number] for number in order[20:]], warmup=warmup).share == pytest.approx(
        by_meaning(sent[20:], before=sent[:20]), abs=1e-12
    )


def test_repeats_strangers_salts_and_nothing(tmp_path):
    prompts = prompts_of(tmp_path, {"prompt": "x" * 100}, {"prompt": "y" * 100})

    assert share(prompts, prompts).share == 0
    assert share(prompts, prompts * 4).share == pytest.approx(3 / 4)
    assert share(prompts, prompts * 4, salt="run").share == pytest.approx(1 - (15 + 2 * 106) / (8 * 121))
    assert share(prompts, prompts * 4, salt="request").share == 0
    assert share(prompts, prompts * 4, warmup=prompts).share == 1
    assert share(prompts, []).share is None


def test_pictures_are_known_by_their_address(tmp_path):
    def picture(name):
        content = [{"type": "image_url", "image_url": {"url": f"https://example.org/{name}.png"}}]
        return {"messages": [{"role": "user", "content": content}]}

    prompts = prompts_of(tmp_path, picture("a"), picture("a"), picture("b"))

    assert share(prompts, prompts[:2]).share == pytest.approx(1 / 2)
    assert 0 < share(prompts, prompts[1:]).share < 1 / 2


def play(experiment, answers, count, turns=99):
    """(prompts, what was sent, the texts of its requests, the answers that followed each) of some conversations."""
    prompts, sent, texts, generated = load_workload(experiment), Sent(), [], []
    own = experiment.workload.sessions == "own"
    made = plans(experiment, prompts, "m")
    for number in range(count):
        plan, turn = next(made), 0
        while plan is not None and turn < turns:
            said = answers(number, turn)
            texts.append(text_of(json.loads(plan.body)["messages"]))
            generated.append(text_of([assistant(said)]) if own else "")
            sent.add(plan.prompt, said if own and plan.then else None, session=True)
            plan, turn = plan.then(said) if plan.then else None, turn + 1
    return prompts, sent, texts, generated


@pytest.mark.parametrize("lines", [whole, new_alone])
@pytest.mark.parametrize("how", ["recorded", "own"])
@pytest.mark.parametrize("turns", [99, 2])
@pytest.mark.parametrize("salt", ["none", "request"])
def test_of_conversations_the_history_is_known_and_of_its_answers_the_own_ones(tmp_path, lines, how, turns, salt):
    path = write(tmp_path, *lines("a", 4), *lines("b", 3))
    experiment = experiment_of(path, how, salt=salt)
    # played twice: number 2 is the first conversation once more, and gets the same answers but for its last
    prompts, sent, texts, generated = play(
        experiment, lambda n, turn: f"said {n % 2} {turn if n < 2 else 9 * turn}", 4, turns
    )
    told = intended(prompts, [sent], Sent(), salt)
    if salt == "request":  # such lines are random: only the first few characters of two may be the same by chance
        assert told.share == pytest.approx(by_meaning(texts, generated=generated), abs=0.03)
    else:
        assert told.share == pytest.approx(by_meaning(texts, generated=generated), abs=1e-12)
    assert told.characters == sum(map(len, texts))
    assert told.requests == len(texts)
    assert told.share > 0.3


def test_what_is_kept_is_bounded_and_what_is_left_out_is_counted(tmp_path, monkeypatch):
    path = write(tmp_path, *(line for name in "abcdef" for line in whole(name, 2)))
    experiment = experiment_of(path, "own")
    monkeypatch.setattr(prefix_plan, "MOST_KEPT", 250)
    prompts, sent, texts, generated = play(experiment, lambda number, turn: "x" * 100, 6)
    told = intended(prompts, [sent], Sent(), "none")

    assert (told.requests, told.left_out) == (6, 6)  # three conversations are begun before 250 characters are kept
    assert told.share == pytest.approx(by_meaning(texts[:6], generated=generated[:6]))
    monkeypatch.setattr(prefix_plan, "MOST_CHARACTERS", len(texts[1]) + len(texts[3]))
    assert (intended(prompts, [sent], Sent(), "none").requests, intended(prompts, [sent], Sent(), "none").left_out) == (
        4,
        8,
    )


def test_what_a_worker_sent_survives_the_way_to_the_master(tmp_path):
    _, sent, _, _ = play(experiment_of(write(tmp_path, *whole("a", 3)), "own"), lambda number, turn: "é", 2)
    sent.counts[0, 3] = 5

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Sent) == sent


# runs


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
@pytest.mark.parametrize("how", ["none", "recorded", "own"])
def test_run_json_says_what_share_of_the_prompts_of_the_server_was_known(tmp_path, how, processes):
    """Against the prompts that the server got: their order is only that of arrival, which the share does not ask."""
    path = write(tmp_path, *(line for name in "abc" for line in whole(name, 3)))
    settings = {"workload__requests": path, "workload__sessions": how, "load__users": 2, "load__requests": 40}
    with FakeServer(script) as server:
        code, output = run(tmp_path / "out", "-H", server.url, *keys(**settings), "--no-report", *processes)
        seen = {headers["x-request-id"]: body["messages"] for headers, body in server.requests}
    records, meta = read(tmp_path / "out")
    warmup = [text_of(seen[record.request_id]) for record in records if record.phase == "warmup"]
    measured = [
        seen[record.request_id] for record in sorted(records, key=lambda one: one.sent_at) if record.phase == "measure"
    ]
    answers = [text_of([assistant(reply(messages))]) if how == "own" else "" for messages in measured]
    expected = by_meaning(list(map(text_of, measured)), before=warmup, generated=answers)
    told = meta["prefix_intended"]

    assert code == 0, output
    assert (told["requests"], told["left_out"]) == (40, 0)
    assert told["characters"] == sum(len(text_of(messages)) for messages in measured)
    assert told["share"] == pytest.approx(expected, abs=1e-9)


def test_a_prompt_that_extra_body_replaces_has_no_share(tmp_path):
    with FakeServer(script) as server:
        settings = {"target__extra_body": "{messages: [{role: user, content: x}]}", "load__requests": 4}
        run(tmp_path, "-H", server.url, *keys(**settings), "--no-report")

    assert read(tmp_path)[1]["prefix_intended"] is None
