"""Conversations: what turns of a request file make one, what is sent of it and when, and what is counted."""

import itertools
import json
import random
from collections import Counter, defaultdict

import pytest
from fake_server import DONE, HANG, HEAD, FakeServer, answer, chunked, delta, response, usage
from locust_runs import read, run

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, MixPart, Target, Workload, load_experiment
from twoclocks.prompts import load_prompts
from twoclocks.sessions import conversations
from twoclocks.workload import load_workload, plans


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def whole(session, turns, **extra):
    """Lines that hold the history each, as sharegpt.py --multi-turn and mtbench.py write them."""
    messages, lines = [], []
    for turn in range(turns):
        messages.append(user(f"{session} question {turn}"))
        lines.append({"id": f"{session}-{turn}", "session": session, "turn": turn, "messages": list(messages)} | extra)
        messages.append(assistant(f"{session} recorded {turn}"))
    return lines


def new_alone(session, turns, **extra):
    """The same conversation by its new messages, with the recorded answers."""
    return [
        {"id": f"{session}-{turn}", "session": session, "turn": turn, "prompt": f"{session} question {turn}"}
        | {"answer": f"{session} recorded {turn}"}
        | extra
        for turn in range(turns)
    ]


def write(tmp_path, *lines):
    path = tmp_path / "sessions.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def experiment_of(path, sessions="recorded", *, target=None, **workload):
    return Experiment(
        target=target or Target(),
        workload=Workload(requests=str(path), sessions=sessions, **{"order": "in-order"} | workload),
    )


def played(experiment, count, *, answers=lambda plan: "own", **share):
    """(plan, parsed body) of every turn of the first conversations, in the order of sending."""
    found = []
    for first in itertools.islice(plans(experiment, load_workload(experiment), "m", **share), count):
        plan = first
        while plan is not None:
            found.append((plan, json.loads(plan.body)))
            plan = plan.then(answers(plan)) if plan.then else None
    return found


@pytest.mark.parametrize("lines", [whole, new_alone])
def test_a_recorded_conversation_is_sent_as_it_was_recorded(tmp_path, lines):
    path = write(tmp_path, *lines("a", 3), *lines("b", 1))
    sent = played(experiment_of(path), 3)

    assert [body["messages"] for _, body in sent[:4]] == [line["messages"] for line in [*whole("a", 3), *whole("b", 1)]]
    assert [(plan.prompt.id, plan.prompt.turn, plan.later) for plan, _ in sent] == [
        ("a-0", 0, 2), ("a-1", 1, 1), ("a-2", 2, 0), ("b-0", 0, 0), ("a-0", 0, 2), ("a-1", 1, 1), ("a-2", 2, 0),
    ]  # fmt: skip
    assert len({plan.request_id for plan, _ in sent}) == 7


@pytest.mark.parametrize("lines", [whole, new_alone])
def test_own_answers_take_the_place_of_the_recorded_ones(tmp_path, lines):
    path = write(tmp_path, *lines("a", 3))
    sent = played(experiment_of(path, "own"), 1, answers=lambda plan: f'said "{plan.prompt.turn}" \u2028é')

    assert sent[2][1]["messages"] == [
        user("a question 0"),
        assistant('said "0" \u2028é'),
        user("a question 1"),
        assistant('said "1" \u2028é'),
        user("a question 2"),
    ]


def test_a_conversation_without_recorded_answers_is_for_own_ones(tmp_path):
    lines = [{key: value for key, value in line.items() if key != "answer"} for line in new_alone("a", 2)]
    path = write(tmp_path, *lines)

    assert [message["content"] for message in played(experiment_of(path, "own"), 1)[1][1]["messages"]] == [
        "a question 0", "own", "a question 1",
    ]  # fmt: skip
    with pytest.raises(ExperimentError, match=r"session 'a', line 1: has no 'answer' for the history of turn 1; .*own"):
        played(experiment_of(path), 1)


def test_a_system_message_and_what_each_line_brings_stay(tmp_path):
    first, second = whole("a", 2)
    for line in (first, second):
        line["messages"] = [{"role": "system", "content": "be brief"}, *line["messages"]]
    path = write(tmp_path, first | {"max_tokens": 7}, second | {"temperature": 0.5})
    (one, body), (_, other) = played(experiment_of(path, target=Target(extra_body={"seed": 3})), 1)

    assert (body["max_tokens"], one.max_tokens, other["max_tokens"], other["temperature"]) == (7, 7, 128, 0.5)
    assert (
        other["messages"]
        == second["messages"]
        == [{"role": "system", "content": "be brief"}, *whole("a", 2)[1]["messages"]]
    )
    assert (other["seed"], other["stream"], other["model"]) == (3, True, "m")


def test_lines_may_stand_in_any_order_and_a_line_alone_is_a_conversation(tmp_path):
    a, b = whole("a", 3), whole("b", 2)
    path = write(tmp_path, a[2], {"id": "x", "prompt": "alone"}, b[0], a[0], b[1], a[1])
    sent = played(experiment_of(path, "own"), 3)

    assert [plan.prompt.id for plan, _ in sent] == ["a-0", "a-1", "a-2", "x", "b-0", "b-1"]
    assert (sent[3][0].prompt.session.split("#")[0], sent[3][0].prompt.turn) == ("x", 0)


def test_without_sessions_each_line_is_a_request_as_ever(tmp_path):
    path = write(tmp_path, *whole("a", 2))
    sent = played(experiment_of(path, "none"), 4)

    assert [(plan.prompt.id, plan.prompt.session) for plan, _ in sent] == [("a-0", "a"), ("a-1", "a")] * 2
    assert sent[1][1]["messages"] == whole("a", 2)[1]["messages"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0], a[2]], "session 'a', line 2: is turn 2, and there is no turn 1"),
        (lambda a: a[1:], "session 'a', line 1: is turn 1, and there is no turn 0"),
        (lambda a: [a[0], a[1], a[1]], "session 'a', line 3: is turn 1 once more, after line 2"),
        (lambda a: [a[0], a[1] | {"turn": None}], "session 'a', line 2: has no 'turn'"),
        (lambda a: [a[0], a[1] | {"turn": "1"}], "session 'a', line 2: has no 'turn'"),
        (
            lambda a: [a[0], a[1] | {"messages": a[1]["messages"][1:]}],
            "line 2: its messages hold an answer, and do not",
        ),
        (lambda a: [a[0], a[1] | {"messages": a[1]["messages"][:2]}], "line 2: brings no new message"),
        (lambda a: [a[0], a[1] | {"messages": "hello"}], "line 2: 'messages': expected a list of messages"),
        (lambda a: [a[0], a[1] | {"answer": 3}], "line 2: 'answer': expected the text of the recorded answer"),
        (lambda a: [a[0], a[1] | {"n": 2}], "line 2: 'n': of several answers"),
    ],
)
def test_turns_that_make_no_conversation_are_told_in_one_line(tmp_path, change, message):
    path = write(tmp_path, *change(whole("a", 3)))
    with pytest.raises(ExperimentError) as raised:
        load_workload(experiment_of(path, "own"))

    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workload: {sessions: yes please}", "workload.sessions: expected none | recorded | own"),
        ("workload: {think_s: 2}", "workload.think_s: needs workload.sessions"),
        ("workload: {sessions: own, think_s: -1}", "workload.think_s: expected"),
        (
            "workload: {sessions: own}\ntarget: {api: completions}",
            "expected target.api: chat, found completions",
        ),
        ("workload: {sessions: own}\ntarget: {extra_body: {n: 2}}", "target.extra_body.n"),
        ("workload: {sessions: recorded}\ntarget: {extra_body: {messages: []}}", "replaces the history"),
    ],
)
def test_sessions_that_cannot_be_are_told_before_the_run(tmp_path, text, expected):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=expected):
        load_experiment(path)


def test_a_conversation_is_played_by_one_worker_and_has_a_name_of_its_own(tmp_path):
    path = write(tmp_path, *whole("a", 3), *whole("b", 2), *whole("c", 1))
    experiment = experiment_of(path, order="shuffled")
    one = [plan.prompt.id for plan, _ in played(experiment, 6)]
    shares = [played(experiment, 3, share=share, shares=2) for share in range(2)]
    sessions = [plan.prompt.session for share in shares for plan, _ in share]

    assert sorted(one) == sorted(plan.prompt.id for share in shares for plan, _ in share)
    assert len(set(sessions)) == 6
    for share in shares:
        for _, turns in itertools.groupby(share, key=lambda pair: pair[0].prompt.session):
            assert [plan.prompt.turn for plan, _ in turns] in ([0, 1, 2], [0, 1], [0])


@pytest.mark.parametrize("how", ["recorded", "own"])
def test_one_salt_for_all_turns_of_a_conversation(tmp_path, how):
    path = write(tmp_path, *whole("a", 3))
    salts = [
        body["messages"][0]["content"].split("\n")[0] for _, body in played(experiment_of(path, how, salt="request"), 2)
    ]

    assert len(set(salts[:3])) == len(set(salts[3:])) == 1
    assert salts[0] != salts[3]
    for plan, body in played(experiment_of(path, how, salt="request"), 1):
        assert body["messages"][0]["content"] == f"[{plan.prompt.session.split('#')[1]}]\na question 0"


def test_think_times_come_again_with_the_seed_whoever_plays(tmp_path):
    path = write(tmp_path, *whole("a", 40), *whole("b", 40))

    def waits(count, seed=1, **share):
        experiment = experiment_of(path, think_s=2, think="exponential", seed=seed)
        return [plan.wait_s for plan, _ in played(experiment, count, **share)]

    first = waits(40)
    later = [wait for number, wait in enumerate(first) if number % 40]
    assert waits(40) == first != waits(40, seed=2)
    assert waits(1, share=1, shares=3) == first[40:80]
    assert {first[number] for number in range(0, 1600, 40)} == {0.0}
    assert abs(sum(later) / len(later) - 2) < 4 * 2 / len(later) ** 0.5  # four standard errors of an exponential's mean
    assert {plan.wait_s for plan, _ in played(experiment_of(path, think_s=2), 1)} == {0.0, 2.0}


def test_conversations_of_a_mix_keep_to_their_file(tmp_path):
    path, other = write(tmp_path, *whole("a", 2)), tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in whole("a", 3)))
    mix = [MixPart(requests=str(path)), MixPart(requests=str(other), max_tokens=5)]
    sent = played(Experiment(workload=Workload(mix=mix, sessions="own")), 40)
    lengths = Counter((plan.prompt.session, plan.max_tokens) for plan, _ in sent)

    assert {(name.split("#")[0], limit, turns) for (name, limit), turns in lengths.items()} == {
        ("sessions/a", 128, 2), ("other/a", 5, 3),
    }  # fmt: skip


def test_histories_of_a_large_file_are_held_once(tmp_path):
    path = write(tmp_path, *whole("a", 50))
    (first,) = conversations(load_prompts(path, "chat"), "recorded")

    assert len(first.later) == 49
    assert {len(turn.body["messages"]) for turn in first.later} == {1}


# runs


def reply(messages):
    """What the server of these tests answers, which the next turn has to bring back."""
    return f"re: {messages[-1]['content']} {len(messages)}"


def script(body):
    first, rest = reply(body["messages"])[:4], reply(body["messages"])[4:]
    return answer(delta(content=first), delta(content=rest, finish_reason="stop"), usage(2), DONE)


def keys(**settings):
    return [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def measured(tmp_path):
    records, meta = read(tmp_path)
    return [record for record in records if record.phase == "measure"], meta


def by_session(records):
    sessions = defaultdict(list)
    for record in sorted(records, key=lambda record: record.sent_at):
        sessions[record.session].append(record)
    return sessions


CLOSED = {"load__users": 3, "load__duration_s": 60, "load__requests": 21}
OPEN = {"load__shape": "rate", "load__rate": 20, "load__duration_s": 60, "load__requests": 21}


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
@pytest.mark.parametrize("load", [CLOSED, OPEN])
def test_each_turn_brings_back_what_the_server_said_after_the_think_time(tmp_path, load, processes):
    path = write(tmp_path, *(line for name in "abcd" for line in whole(name, 4)))
    settings = {"workload__requests": path, "workload__sessions": "own", "workload__think_s": 0.2} | load
    with FakeServer(script) as server:
        code, output = run(tmp_path / "out", "-H", server.url, *keys(**settings), "--no-report", *processes)
        seen = {headers["x-request-id"]: body["messages"] for headers, body in server.requests}
    records, meta = measured(tmp_path / "out")

    assert code == 0, output
    assert len(records) == 21
    for turns in by_session(records).values():
        assert [record.turn for record in turns] == list(range(len(turns)))
        assert len({(record.user, record.worker) for record in turns}) == 1
        for before, after in itertools.pairwise(turns):
            assert after.intended_at == pytest.approx(before.ended_at + 0.2, abs=2e-6)
            assert after.sent_at >= after.intended_at - 1e-6
            said = seen[before.request_id]
            assert seen[after.request_id][: len(said) + 1] == [*said, assistant(reply(said))]
            assert len(seen[after.request_id]) == len(said) + 2
    left = sum(4 - len(turns) for turns in by_session(records).values())
    assert meta["turns_not_sent"] == ({"stopped": left} if left else {})
    assert {record.output_text for record in records} == {None}
    assert not meta["not_sent"]


def test_recorded_sessions_keep_the_text_when_it_is_asked_for_and_send_the_file(tmp_path):
    lines = whole("a", 3)
    path = write(tmp_path, *lines)
    settings = {"workload__requests": path, "workload__sessions": "recorded", "output_text": "true"}
    settings |= {"load__users": 1, "load__requests": 6}
    with FakeServer(script) as server:
        run(tmp_path / "out", "-H", server.url, *keys(**settings), "--set", "warmup.requests=0", "--no-report")
        seen = [body["messages"] for _, body in server.requests]
    records, _ = measured(tmp_path / "out")

    assert seen == [line["messages"] for line in lines] * 2
    assert [record.output_text for record in records] == [reply(messages) for messages in seen]


@pytest.mark.parametrize("load", [CLOSED | {"load__requests": 12}, OPEN | {"load__requests": 12}])
def test_a_failed_turn_ends_its_session_and_the_rest_is_counted(tmp_path, load):
    path = write(tmp_path, *whole("a", 5))
    settings = {"workload__requests": path, "workload__sessions": "own", "warmup__requests": 0} | load

    def fails(body):
        return response(500, b"{}") if len(body["messages"]) == 3 else script(body)

    with FakeServer(fails) as server:
        _, output = run(tmp_path / "out", "-H", server.url, *keys(**settings), "--no-report")
    records, meta = measured(tmp_path / "out")
    failed = [record for record in records if record.status == "error"]

    assert {record.turn for record in records} == {0, 1}, output
    assert {record.turn for record in failed} == {1}
    assert meta["turns_not_sent"].pop("failed") == 3 * len(failed) > 0
    begun = Counter(record.turn for record in records)
    assert meta["turns_not_sent"].get("stopped", 0) == 4 * (begun[0] - begun[1])


def test_a_user_who_leaves_an_answer_leaves_the_session(tmp_path):
    path = write(tmp_path, *whole("a", 4))
    settings = {"workload__requests": path, "workload__sessions": "own", "workload__cancel_share": 0.5}
    settings |= {"workload__cancel_after_s": 0.05, "load__users": 2, "load__requests": 20, "warmup__requests": 0}
    with FakeServer(lambda body: [HEAD, 0.3, *script(body)[1:]]) as server:
        _, output = run(tmp_path / "out", "-H", server.url, *keys(**settings), "--no-report")
    records, meta = measured(tmp_path / "out")
    left = [record for record in records if record.status == "cancelled"]

    assert 0 < len(left) < 20, output
    assert meta["turns_not_sent"].get("left", 0) == sum(3 - record.turn for record in left)
    assert all(
        turns[-1].request_id == one.request_id for turns in by_session(records).values() for one in left if one in turns
    )


@pytest.mark.parametrize(
    "load", [{"load__users": 3}, {"load__shape": "rate", "load__rate": 4, "load__arrivals": "constant"}]
)
def test_the_end_of_the_window_comes_between_two_turns(tmp_path, load):
    path = write(tmp_path, *whole("a", 3))
    settings = {"workload__requests": path, "workload__sessions": "own", "workload__think_s": 100}
    with FakeServer(script) as server:
        _, output = run(
            tmp_path / "out",
            "-H",
            server.url,
            *keys(**settings | load, load__ramp_s=0, load__duration_s=2),
            "--no-report",
        )
    records, meta = measured(tmp_path / "out")

    assert {record.turn for record in records} == {0}, output
    assert {record.status for record in records} == {"ok"}
    assert len(records) in (3, 8)
    assert meta["turns_not_sent"] == {"stopped": 2 * len(records)}
    assert meta["window"]["ended_at"] - meta["window"]["started_at"] < 60


def test_what_max_in_flight_holds_back_is_counted_in_requests(tmp_path):
    """Three requests hang; what is due beside them, first turns here, is not sent, nor what would come after them."""
    path = write(tmp_path, *whole("a", 3))
    settings = {"workload__requests": path, "workload__sessions": "own", "warmup__requests": 0, "load__drain_s": 0.2}
    load = {"load__shape": "rate", "load__rate": 20, "load__arrivals": "constant", "load__duration_s": 2}
    with FakeServer(lambda body: [HEAD, chunked(delta(role="assistant")), HANG]) as server:
        run(tmp_path / "out", "-H", server.url, *keys(**settings | load, load__max_in_flight=3), "--no-report")
    records, meta = measured(tmp_path / "out")

    assert (len(records), meta["not_sent"]) == (3, 37)
    assert meta["turns_not_sent"] == {"max_in_flight": 74, "stopped": 6}


def test_a_trace_says_when_conversations_begin(tmp_path):
    lines = [
        line | ({"at": 0.3 * number} if not line["turn"] else {})
        for number, name in enumerate("abc")
        for line in whole(name, 2)
    ]
    random.Random(1).shuffle(lines)
    path = write(tmp_path, *lines)
    settings = {"workload__requests": path, "workload__sessions": "recorded", "workload__think_s": 0.1}
    settings |= {"load__shape": "trace", "load__duration_s": 60}
    with FakeServer(script) as server:
        _, output = run(tmp_path / "out", "-H", server.url, *keys(**settings), "--no-report")
    records, meta = measured(tmp_path / "out")
    firsts = sorted(record.intended_at for record in records if record.turn == 0)

    assert len(records) == 6, output
    assert [at - meta["window"]["started_at"] for at in firsts] == pytest.approx([0, 0.3, 0.6], abs=2e-6)
    assert meta["window"]["ended_at"] - meta["window"]["started_at"] < 60
    assert meta["turns_not_sent"] == {}
