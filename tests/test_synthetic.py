import random

import pytest

from twoclocks.synthetic import WORDS, draw_words, text, vocabulary

tokenizers = pytest.importorskip("tokenizers")


def counter(tokenizer):
    return lambda words: len(tokenizer.encode(words, add_special_tokens=False).ids)


def byte_level(merges: int):
    """A byte-level BPE trained here on the words in random order: with few merges it holds only some of them whole."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = random.Random(1)
    corpus = [" ".join(rng.choices(WORDS[:200], k=20)) for _ in range(200)] + [*WORDS[:200]] * 5
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def sentence_piece():
    """As Llama 2 has it: spaces become part of words, also at the beginning of a text."""
    vocabulary = {"<unk>": 0} | {f"▁{word}": index for index, word in enumerate(WORDS[:150], 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return tokenizer


def by_character():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.model = tokenizers.models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(1500), byte_level(500), sentence_piece(), by_character()],
    ids=["all words", "some words", "sentence piece", "characters"],
)
def test_a_text_has_as_many_tokens_as_asked_for(tokenizer):
    count = counter(tokenizer)
    words = vocabulary(count)
    lengths = [*range(1, 60), 511, 512, 513, 4000]

    assert [count(text(words, length, f"key {length}")) for length in lengths] == lengths


def test_a_tokenizer_that_knows_fewer_words_gets_fewer():
    assert 32 <= len(vocabulary(counter(byte_level(500))).words) < len(vocabulary(counter(byte_level(1500))).words)


def test_one_key_gives_one_text_and_others_give_others():
    words = vocabulary()

    assert text(words, 100, "a") == text(words, 100, "a")
    assert text(words, 100, "a").startswith(text(words, 40, "a") + " ")
    assert len({text(words, 100, str(key)) for key in range(1000)}) == 1000
    assert len({draw_words(words, 3, str(key))[0] for key in range(1000)}) > 200


def test_the_text_of_a_key_is_the_same_on_every_python():
    assert text(vocabulary(), 5, "1/azure-000001") == "nature use clock page health"


def test_without_a_tokenizer_a_word_counts_as_a_token():
    assert vocabulary().words == WORDS
    assert len(WORDS) == len(set(WORDS)) == 256
    assert len(text(vocabulary(), 77, "a").split()) == 77
    assert text(vocabulary(), 0, "a") == ""


def test_a_tokenizer_that_joins_two_words_or_has_none_is_refused():
    plain = counter(byte_level(1500))

    def joins(words):
        return plain(words) - words.count("table market")

    for count in (joins, lambda words: 2 * len(words)):
        with pytest.raises(ValueError, match="no single tokens of common English words"):
            vocabulary(count)
