import msgspec
import numpy as np
import pytest
from make_run import make_run, record, write_folder

import twoclocks
from twoclocks import metrics
from twoclocks.stutter import TOKENS_PER_WORD, stutter


def by_hand(at, words, words_per_s):
    """A reader, chunk by chunk: who has read all that is there waits for the next."""
    waited, free = 0.0, at[0]
    for moment, count in zip(at, words, strict=True):
        if moment > free:
            waited += moment - free
            free = moment
        free += count / words_per_s
    return waited


def chunks_of(streams):
    """Chunks of one answer each; ``streams``: lists of arrivals."""
    request = np.repeat(np.arange(len(streams), dtype=np.int32), [len(at) for at in streams])
    size = len(request)
    return metrics.Chunks(
        request, np.concatenate(streams), np.ones(size), np.zeros(size, np.int8), np.ones(size, bool),
        np.zeros(size, np.int16),
    )  # fmt: skip


def test_a_readers_waiting_is_what_a_simulated_reader_waits():
    rng = np.random.default_rng(1)
    streams = [5.0 + np.cumsum(rng.exponential(0.3, rng.integers(1, 40))) for _ in range(50)]
    chunks = chunks_of(streams)
    words = rng.uniform(0.2, 3.0, len(chunks.at))

    waits = metrics.reading_wait(chunks, words, 5.0, 51)

    parts = np.split(words, np.cumsum([len(at) for at in streams])[:-1])
    assert waits[:50] == pytest.approx([by_hand(at, of, 5.0) for at, of in zip(streams, parts, strict=True)])
    assert np.isnan(waits[50])
    assert max(waits[:50]) > 1.0


def test_a_reader_of_several_choices_waits_for_the_slowest():
    chunks = chunks_of([np.array([1.0, 1.1, 1.2, 4.0])])
    chunks.choice[:] = [0, 1, 0, 1]

    (wait,) = metrics.reading_wait(chunks, np.ones(4), 5.0, 1)

    assert wait == pytest.approx(4.0 - 1.1 - 0.2)


def answer(number, gaps_us, **more):
    return record(
        f"{number:032x}", sent_at=0.0, chunk_us=gaps_us, chunk_kinds=[("content", len(gaps_us))],
        output_tokens=len(gaps_us), **more,
    )  # fmt: skip


def test_answers_with_a_stall_are_counted(tmp_path):
    gaps = [[100_000, 20_000, 300_000], [100_000, 600_000], [100_000, 2_500_000, 100_000], [3_000_000]]
    run = twoclocks.load_run(write_folder(tmp_path / "r", [answer(i, one) for i, one in enumerate(gaps)]))

    told = stutter(run)

    assert told["answers"] == 4
    assert [(row["over"], row["answers"], row["share"]) for row in told["stalls"]] == [
        (0.25, 3, 0.75), (0.5, 2, 0.5), (1.0, 1, 0.25), (2.0, 1, 0.25),
    ]  # fmt: skip
    assert (told["longest"], told["longest_request_id"]) == (pytest.approx(2.5), f"{2:032x}")
    a_token = 1 / TOKENS_PER_WORD / 5.0
    waits = [0.32 - 2 * a_token, 0.6 - a_token, 2.5 - a_token, 0.0]
    assert told["reading_wait"]["mean"] == pytest.approx(np.mean(waits))
    assert told["reading_wait"]["max"] == pytest.approx(max(waits))
    assert told["reading_waits"] == {"answers": 3, "share": 0.75}
    assert "assumed" in told["tokens_per_word_from"]


@pytest.mark.parametrize(("text", "expected"), [("two words", 1.5), ("無字", TOKENS_PER_WORD), ("  ", TOKENS_PER_WORD)])
def test_words_are_counted_where_answers_were_kept(tmp_path, text, expected):
    kept = [answer(i, [100_000] * (3 if " " in text else 30), output_text=text) for i in range(3)]

    told = stutter(twoclocks.load_run(write_folder(tmp_path / "r", kept)))

    assert told["tokens_per_word"] == pytest.approx(expected)
    assert ("counted in the 3 answers" in told["tokens_per_word_from"]) == (expected == 1.5)


def test_the_tokens_of_reasoning_are_no_words_of_the_answer(tmp_path):
    thinking = [("reasoning", 30), ("content", 30)]
    kept = [answer(i, [100_000] * 60, output_text="word " * 22) for i in range(3)]
    kept = [msgspec.structs.replace(one, chunk_kinds=thinking) for one in kept]

    told = stutter(twoclocks.load_run(write_folder(tmp_path / "r", kept)))

    assert told["tokens_per_word"] == TOKENS_PER_WORD


def test_a_run_without_answers_says_nothing(tmp_path):
    make_run(tmp_path / "r", requests=0, failures=2)

    assert stutter(twoclocks.load_run(tmp_path / "r")) is None
