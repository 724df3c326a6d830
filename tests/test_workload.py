import itertools
import json
from pathlib import Path

import pytest

from twoclocks.errors import ExperimentError
from twoclocks.experiment import Experiment, Target, Workload
from twoclocks.workload import load_prompts, order_prompts, plans, request_body

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
