import pytest
from asks import Ask, Refused, Sampling, ask_from, encode, one_line


class Words:
    """A tokenizer whose tokens are words, numbered as they come; begins every text of its own accord with token 0."""

    def __init__(self):
        self.known = ["<s>"]

    def __len__(self):
        return 1000

    def __call__(self, text, add_special_tokens=True):
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        ids = [self.known.index(word) for word in text.split()]
        return type("Encoded", (), {"input_ids": [0, *ids] if add_special_tokens else ids})

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if messages[0].get("role") == "odd":
            raise ValueError("Conversation roles\nmust alternate")
        said = " ".join(f"<{message['role']}> {message['content']}" for message in messages)
        return said + (" <assistant>" if add_generation_prompt else "")


def test_what_a_body_asks_for():
    body = {"prompt": "hi", "max_tokens": 7, "ignore_eos": True, "model": "m", "stream": True, "n": 1, "stop": None}

    assert ask_from("a", body) == Ask("a", None, "hi", 7, True, Sampling())
    assert ask_from("a", {"prompt": [1, 2], "max_completion_tokens": 9, "max_tokens": 7}).max_tokens == 9
    assert ask_from("a", {"messages": [{"role": "user", "content": "hi"}]}).max_tokens == 128
    assert ask_from(
        "a", {"prompt": "x", "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 3}
    ).sampling == Sampling(0.5, 0.9, 0, 3)
    # greedy is greedy, so that such requests may share a batch
    assert ask_from("a", {"prompt": "x", "temperature": 0, "top_p": 0.9, "seed": 3}).sampling == Sampling()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "no JSON object"),
        ({}, "either messages or a prompt"),
        ({"prompt": "a", "messages": [{}]}, "either messages or a prompt"),
        ({"messages": []}, "messages:"),
        ({"messages": ["a"]}, "messages:"),
        ({"prompt": ["a", "b"]}, "prompt:"),
        ({"prompt": [True]}, "prompt:"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected a whole number from 1 on"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "n": 2}, "n:"),
        ({"prompt": "a", "stop": ["x"]}, "'stop' is not known here; known: ignore_eos"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "temperature": 1, "top_k": -2}, "top_k"),
        ({"prompt": "a", "seed": "x"}, "seed"),
        ({"prompt": "a", "ignore_eos": "yes"}, "ignore_eos"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body, said):
    with pytest.raises(Refused) as refused:
        ask_from("a", body)

    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_messages_go_through_the_template_and_a_prompt_as_it_is():
    words = Words()
    chat = encode(words, Ask("a", [{"role": "user", "content": "one two"}], None, 4), None)

    assert [words.known[one] for one in chat] == ["<user>", "one", "two", "<assistant>"]  # no second beginning
    assert [words.known[one] for one in encode(words, Ask("a", None, "one two", 4), None)] == ["<s>", "one", "two"]
    assert encode(words, Ask("a", None, [5, 6], 4), None) == [5, 6]


def test_prompts_that_do_not_fit_are_refused_with_their_size():
    assert len(encode(Words(), Ask("a", None, "one two", 7), 10)) == 3
    with pytest.raises(
        Refused, match="the prompt has 3 tokens and the answer may have 8; the model's context holds 10"
    ):
        encode(Words(), Ask("a", None, "one two", 8), 10)
    with pytest.raises(Refused, match="from 0 to 999"):
        encode(Words(), Ask("a", None, [1000], 8), None)
    with pytest.raises(Refused, match="chat template does not take these messages: Conversation roles must alternate"):
        encode(Words(), Ask("a", [{"role": "odd"}], None, 8), None)


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == 300
