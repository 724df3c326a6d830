import itertools
import json
from pathlib import Path

import pytest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, MixPart, Target, Workload, load_experiment
from twoclocks.prompts import load_prompts
from twoclocks.workload import (
    load_workload,
    new_salt,
    order_prompts,
    plans,
    request_body,
)

DEMO = Path(__file__).parent.parent / "requests" / "demo.jsonl"


def prompts_of(tmp_path, *lines, api="chat"):
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    return load_prompts(path, api)


def body_of(prompt, **target):
    return request_body(prompt, Experiment(target=Target(**target)), "m")


def test_a_prompt_of_text_becomes_one_user_message_for_chat(tmp_path):
    (prompt,) = prompts_of(tmp_path, {"id": "a", "prompt": "x\u2028y"})

    assert body_of(prompt)["messages"] == [{"role": "user", "content": "x\u2028y"}]


def test_our_fields_stay_here_and_the_others_are_sent(tmp_path):
    line = {
        "id": 7,
        "messages": [{"role": "user", "content": "x"}],
        "session": "s",
        "turn": 0,
        "top_k": 3,
        "max_tokens": 5,
    }
    (prompt,) = prompts_of(tmp_path, line | {"expected_output_tokens": 9})
    body = body_of(prompt, server="other", extra_body={"seed": 1})

    assert (prompt.id, prompt.session, prompt.turn, prompt.expected_output_tokens) == ("7", "s", 0, 9)
    assert body == {
        "model": "m",
        "messages": line["messages"],
        "top_k": 3,
        "max_tokens": 5,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_running_usage_is_asked_for_only_where_it_is_known_to_be_accepted(tmp_path):
    (prompt,) = prompts_of(tmp_path, {"prompt": "x"})

    assert body_of(prompt, server="vllm")["stream_options"]["continuous_usage_stats"] is True
    assert "continuous_usage_stats" not in body_of(prompt, server="openai")["stream_options"]


@pytest.mark.parametrize(
    ("lines", "api", "expected"),
    [
        (("{oops\n",), "chat", "line 1: is not JSON"),
        (({"prompt": "a"}, "[1]\n"), "chat", "line 2: expected an object, found list"),
        (({"id": "a"},), "chat", "line 1: has no 'messages'"),
        (({"messages": []},), "chat", "line 1: has no 'messages'"),
        (({"messages": [{"role": "user", "content": "x"}]},), "completions", "line 1: has no 'prompt'"),
        (("\n",), "chat", "holds no request"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, api, expected):
    with pytest.raises(ExperimentError, match=expected):
        prompts_of(tmp_path, *lines, api=api)


def test_orders():
    first = [prompt.id for prompt in itertools.islice(order_prompts(load_prompts(DEMO, "chat"), "shuffled", 1), 200)]
    again = [prompt.id for prompt in itertools.islice(order_prompts(load_prompts(DEMO, "chat"), "shuffled", 1), 200)]
    in_order = [prompt.id for prompt in itertools.islice(order_prompts(load_prompts(DEMO, "chat"), "in-order", 1), 200)]

    assert first == again
    assert sorted(first[:100]) == sorted(first[100:]) == sorted(set(first))
    assert first[:100] != first[100:]
    assert in_order[:100] == in_order[100:] != first[:100]


def test_workers_share_one_order():
    prompts = load_prompts(DEMO, "chat")
    experiment = Experiment(workload=Workload(seed=3))
    one = [plan.prompt.id for plan in itertools.islice(plans(experiment, prompts, "m"), 120)]
    shares = [
        [plan.prompt.id for plan in itertools.islice(plans(experiment, prompts, "m", share=share, shares=3), 40)]
        for share in range(3)
    ]

    assert [prompt for round_ in zip(*shares, strict=True) for prompt in round_] == one


def test_every_plan_has_an_id_of_its_own():
    ids = [plan.request_id for plan in itertools.islice(plans(Experiment(), load_prompts(DEMO, "chat"), "m"), 300)]

    assert len(set(ids)) == 300
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)


def test_tgis_own_body(tmp_path):
    (prompt,) = prompts_of(tmp_path, {"prompt": "x", "max_tokens": 5, "top_k": 3}, api="tgi-generate")
    body = body_of(prompt, server="tgi", api="tgi-generate")

    assert body == {"inputs": "x", "parameters": {"max_new_tokens": 5, "details": True, "top_k": 3}}


def test_sglang_reads_its_id_from_the_body(tmp_path):
    prompts = prompts_of(tmp_path, {"id": "a", "prompt": "x"})
    experiment = Experiment(target=Target(server="sglang", stream=False))
    first, second = itertools.islice(plans(experiment, prompts, "m"), 2)
    bodies = [json.loads(plan.body) for plan in (first, second)]

    assert [body.pop("rid") for body in bodies] == [first.request_id, second.request_id]
    assert bodies[0] == bodies[1] == request_body(prompts[0], experiment, "m")
    assert (bodies[0]["stream"], bodies[0]["return_meta_info"], "stream_options" in bodies[0]) == (False, True, False)


# hostile lines


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "at": -1}', "line 2: 'at': expected seconds since the beginning of the trace, found -1"),
        ('{"prompt": "a", "at": "soon"}', "line 2: 'at': expected seconds"),
        ('{"prompt": "a", "at": true}', "line 2: 'at': expected seconds"),
        ("[" * 100_000, "line 2: is not JSON"),
        ('{"prompt": "\\ud800"}', "line 2: is not JSON"),
    ],
)
def test_a_hostile_line_is_named(tmp_path, line, expected):
    with pytest.raises(ExperimentError, match=expected):
        prompts_of(tmp_path, {"prompt": "fine"}, line + "\n")


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Grüße"}\n'.encode("latin-1"))

    with pytest.raises(ExperimentError, match=r"latin.jsonl line 1: is not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl", "chat")


# what passes through untouched


PICTURE = {
    "messages": [
        {
            "role": "user",
            "content": [
                {
                    "type": "image_url",
                    "image_url": {"url": "https://example.org/a%20b.png?x=1&y=\u00e9", "detail": "low"},
                },
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
}


def test_pictures_by_address_are_sent_as_they_stand(tmp_path):
    prompts = prompts_of(tmp_path, PICTURE)
    plan = next(plans(Experiment(), prompts, "m"))

    assert json.loads(plan.body)["messages"] == PICTURE["messages"]


def test_choices_and_logprobs_come_from_the_line_or_from_extra_body(tmp_path):
    (prompt,) = prompts_of(tmp_path, {"prompt": "x", "n": 2, "logprobs": 5, "best_of": 3}, api="completions")
    line = body_of(prompt, api="completions")
    forced = body_of(prompt, api="completions", extra_body={"n": 4, "best_of": 4})

    assert (line["n"], line["logprobs"], line["best_of"]) == (2, 5, 3)
    assert (forced["n"], forced["logprobs"], forced["best_of"]) == (4, 5, 4)


def test_what_converters_note_for_us_is_not_sent(tmp_path):
    notes = {"expected_prompt_tokens": 3, "expected_cached_tokens": 1, "made": {"by": "azure.py"}, "at": 0.5}
    (prompt,) = prompts_of(tmp_path, {"prompt": "x"} | notes)

    assert prompt.body.keys() == {"messages"}
    assert prompt.at == 0.5


# salt


def salted_plans(tmp_path, line, salt, *, api="chat", count=3, run_salt=None, **target):
    path = tmp_path / "salted.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False))
    experiment = Experiment(
        target=Target(api=api, **target), workload=Workload(requests=str(path), salt=salt, order="in-order")
    )
    made = plans(experiment, load_workload(experiment), "m", salt=run_salt)
    return [(plan, json.loads(plan.body)) for plan in itertools.islice(made, count)]


@pytest.mark.parametrize(
    ("api", "line", "prompt_of"),
    [
        ("chat", {"prompt": 'say "\u00e9\u2028"'}, lambda body: body["messages"][0]["content"]),
        (
            "chat",
            {"messages": [{"role": "system", "content": 'say "\u00e9\u2028"'}, {"role": "user", "content": "x"}]},
            lambda body: body["messages"][0]["content"],
        ),
        ("completions", {"prompt": 'say "\u00e9\u2028"'}, lambda body: body["prompt"]),
        ("tgi-generate", {"prompt": 'say "\u00e9\u2028"'}, lambda body: body["inputs"]),
    ],
)
def test_a_prompt_salted_by_request_begins_with_a_line_of_its_own(tmp_path, api, line, prompt_of):
    made = salted_plans(tmp_path, line, "request", api=api)

    for plan, body in made:
        assert prompt_of(body) == f'[{plan.request_id[:12]}]\nsay "\u00e9\u2028"'
    assert len({prompt_of(body) for _, body in made}) == 3


def test_only_the_first_text_is_salted_and_all_else_stays(tmp_path):
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user"}]}
    line |= {"max_tokens": 7, "top_k": 2}
    ((_, plain),) = salted_plans(tmp_path, line, "none", count=1)
    ((plan, salted),) = salted_plans(tmp_path, line, "run", count=1, run_salt="0123456789ab")
    salted["messages"][0]["content"] = salted["messages"][0]["content"].removeprefix("[0123456789ab]\n")

    assert salted == plain
    assert plan.max_tokens == 7


def test_a_picture_comes_after_the_salt(tmp_path):
    ((_, body),) = salted_plans(tmp_path, PICTURE, "run", count=1, run_salt="0123456789ab")
    content = body["messages"][0]["content"]

    assert content == [{"type": "text", "text": "[0123456789ab]\n"}, *PICTURE["messages"][0]["content"]]


def test_a_salt_of_the_run_is_one_for_all_its_requests_and_workers(tmp_path):
    runs = [
        {body["messages"][0]["content"] for _, body in salted_plans(tmp_path, {"prompt": "x"}, "run", run_salt=salt)}
        for salt in ("0123456789ab", "0123456789ab", None, None)
    ]

    assert all(len(contents) == 1 for contents in runs)
    assert runs[0] == runs[1] == {"[0123456789ab]\nx"}
    assert len({*runs[1], *runs[2], *runs[3]}) == 3
    assert len(new_salt()) == 12


def test_salt_and_the_request_id_of_sglang_go_together(tmp_path):
    for plan, body in salted_plans(tmp_path, {"prompt": "x"}, "request", server="sglang"):
        assert body["rid"] == plan.request_id
        assert body["messages"][0]["content"] == f"[{plan.request_id[:12]}]\nx"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": [1, 2, 3]}, "workload.salt: prompt '1' is no text"),
        ({"prompt": "x", "messages": [{"role": "assistant", "content": None}]}, "the first message of prompt '1'"),
        ({"prompt": "x", "messages": "hello"}, "the first message of prompt '1'"),
    ],
)
def test_a_prompt_that_cannot_be_salted_is_told_before_the_run(tmp_path, line, expected):
    with pytest.raises(ExperimentError, match=expected):
        salted_plans(tmp_path, line, "request", api="completions")


def test_bodies_beyond_the_memory_kept_for_them_are_the_same(tmp_path, monkeypatch):
    prompts = prompts_of(tmp_path, *[{"id": str(number), "prompt": "x" * 1000} for number in range(5)])
    experiment = Experiment(workload=Workload(order="in-order"))
    kept = [plan.body for plan in itertools.islice(plans(experiment, prompts, "m"), 15)]
    monkeypatch.setattr("twoclocks.workload.ENCODED_BYTES", 2500)

    assert [plan.body for plan in itertools.islice(plans(experiment, prompts, "m"), 15)] == kept


# mix


def mix_of(tmp_path, *parts, **workload):
    """A mix of files that are called a, b ... and hold ten prompts each."""
    written = []
    for letter, part in zip("abcdef", parts, strict=False):
        path = tmp_path / f"{letter}.jsonl"
        lines = [{"id": str(n), "prompt": f"{letter}{n}", "session": f"s{n}"} for n in range(10)]
        path.write_text("\n".join(map(json.dumps, lines)))
        written.append(MixPart(requests=str(path), **part))
    return Experiment(workload=Workload(mix=written, **workload))


def test_a_mix_keeps_to_its_weights_and_names_where_a_prompt_is_from(tmp_path):
    experiment = mix_of(tmp_path, {"weight": 3, "max_tokens": 5}, {"weight": 1, "name": "long"})
    made = list(itertools.islice(plans(experiment, load_workload(experiment), "m"), 4000))
    first = [plan for plan in made if plan.prompt.id.startswith("a/")]
    other = [plan for plan in made if plan.prompt.id.startswith("long/")]

    assert len(first) + len(other) == 4000
    assert abs(len(first) - 3000) < 4 * (4000 * 0.75 * 0.25) ** 0.5  # four standard deviations of a fair draw
    assert {plan.max_tokens for plan in first} == {5}
    assert {plan.max_tokens for plan in other} == {128}
    assert first[0].prompt.session.startswith("a/s")
    # each part keeps an order of its own: a shuffle goes through all of it before one comes again
    assert sorted(plan.prompt.id for plan in first[:10]) == sorted({plan.prompt.id for plan in first})


def test_a_mix_is_the_same_by_seed_and_shared_out_to_workers(tmp_path):
    def ids(seed, share=0, shares=1, count=120):
        experiment = mix_of(tmp_path, {"weight": 2}, {}, {"weight": 0.5}, seed=seed)
        made = plans(experiment, load_workload(experiment), "m", share=share, shares=shares)
        return [plan.prompt.id for plan in itertools.islice(made, count)]

    shares = [ids(1, share, 3, 40) for share in range(3)]

    assert ids(1) == ids(1) != ids(2)
    assert [one for round_ in zip(*shares, strict=True) for one in round_] == ids(1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workload: {mix: [{requests: a.jsonl}], requests: b.jsonl}", "workload.mix: stands in place of"),
        ("workload: {mix: [{requests: x/a.jsonl}, {requests: y/a.jsonl}]}", "workload.mix: two parts are called 'a'"),
        ("workload: {mix: [{requests: a.jsonl}]}\nload: {shape: trace}", "workload.mix: a trace has an order"),
        ("workload: {mix: [{requests: a.jsonl, weight: 0}]}", r"workload.mix\[0\].weight: expected `float` > 0.0"),
        ("workload: {mix: [{requests: a.jsonl, wieght: 2}]}", r"unknown key 'workload.mix\[0\].wieght'"),
        ("workload: {mix: [{weight: 2}]}", r"workload.mix\[0\]: .*missing required field `requests`"),
        ("workload: {salt: always}", "workload.salt: expected none | run | request, found 'always'"),
        ("workload: {salt: run}\ntarget: {extra_body: {prompt: x}}", "workload.salt: target.extra_body replaces"),
    ],
)
def test_what_is_wrong_with_mix_and_salt_is_told_in_one_line(tmp_path, text, expected):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=expected) as raised:
        load_experiment(path)

    assert "\n" not in str(raised.value)


def test_a_mix_names_the_file_that_cannot_be_read(tmp_path):
    experiment = mix_of(tmp_path, {}, {})
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ExperimentError, match=r"b\.jsonl line 1: has no 'messages'"):
        load_workload(experiment)
