"""What a prefix cache could know beside what it answered: from run.json, from requests and from counters."""

import json

import pytest
from make_run import record, write_folder

from twoclocks import report
from twoclocks.load import load_run
from twoclocks.prefix_cache import cache_hits, prefix_cache
from twoclocks.verdict import verdict

MEANT = {"share": 0.36, "characters": 1000, "new_characters": 640, "requests": 50, "left_out": 0}


def run_of(tmp_path, cached=None, samples=None, body="{}", **meta):
    """Fifty requests of a prompt of their own and of 100 tokens each."""
    records = [
        record(f"{n:032x}", prompt_id=f"p{n}", sent_at=0.1 * n, prompt_tokens=100, cached_tokens=cached,
               chunk_us=[1000, 1000], chunk_kinds=[("content", 2)], output_tokens=2, token_source="usage")
        for n in range(50)
    ]  # fmt: skip
    folder = write_folder(tmp_path / "run", records, **meta)
    (folder / "experiment.yaml").write_text(f"target: {{extra_body: {body}}}\n")
    if samples:
        lines = [
            {"at": at, "until": at + 0.01, "url": "u", "error": None, "types": {}, "samples": [
                [name, {}, value * (at > 5)] for name, value in samples.items()]}
            for at in (-0.5, 9.0)
        ]  # fmt: skip
        (folder / "server_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run(folder)


def prefix_reasons(run):
    return [reason for reason in verdict(run)["reasons"] if reason["name"] == "prefix_cache"]


@pytest.mark.parametrize(("cached", "suspect"), [(36, False), (55, False), (60, True), (0, False)])
def test_a_cache_that_answers_more_than_was_intended_is_suspect(tmp_path, cached, suspect):
    run = run_of(tmp_path, cached, prefix_intended=MEANT)
    found = prefix_reasons(run)

    assert bool(found) == suspect
    assert cache_hits(run).unexplained == pytest.approx(max(0, cached / 100 - 0.36))
    if suspect:
        assert "60% of the prompt tokens" in found[0]["reason"]
        assert "36% of the prompt characters" in found[0]["reason"]


def test_what_was_not_intended_is_suspect_in_a_run_that_was_killed_by_what_was_new(tmp_path):
    """All prompts are new, and nobody knows what they share."""
    assert prefix_reasons(run_of(tmp_path, 36))
    assert prefix_reasons(run_of(tmp_path, 36, prefix_intended=None))


def test_counters_say_it_where_requests_do_not(tmp_path):
    samples = {"vllm:prefix_cache_hits_total": 3200.0, "vllm:prefix_cache_queries_total": 5000.0}
    run = run_of(tmp_path, None, samples, prefix_intended=MEANT)
    told = prefix_cache(run)

    assert (told["intended"]["share"], told["observed"]["share"], told["counted"]["share"]) == (0.36, None, 0.64)
    assert (told["counted"]["hits"], told["counted"]["queries"]) == (3200, 5000)
    assert prefix_reasons(run)[0]["figure"] == pytest.approx(0.64 - 0.36)
    assert "vllm:prefix_cache_queries_total" in told["counted"]["definition"]


@pytest.mark.parametrize("meant", [None, {"share": 0.0}])
def test_choices_of_a_request_find_the_prompt_of_the_first(tmp_path, meant):
    """4 x 5,000 tokens are looked up, of which a cache that is shared by nobody else answers 3 x 5,000."""
    for number, hits in enumerate((15_000.0, 15_000.0 + 0.5 * 5000)):
        run = run_of(
            tmp_path / str(number), None, {"vllm:prefix_cache_hits_total": hits}, "{n: 4}", prefix_intended=meant
        )
        found = cache_hits(run)

        assert (found.share, found.unexplained) == (pytest.approx(hits / 20_000), pytest.approx(number * 0.125))
        assert found.intended in (None, 0.75)


def test_the_steps_of_a_beam_search_say_nothing(tmp_path):
    samples = {"vllm:prefix_cache_hits_total": 90_000.0}
    assert cache_hits(run_of(tmp_path, None, samples, "{n: 4, use_beam_search: true}", prefix_intended=MEANT)) is None


def test_the_report_shows_each_share_with_what_it_is_a_share_of(tmp_path):
    samples = {"vllm:prefix_cache_hits_total": 1700.0, "vllm:prefix_cache_queries_total": 5000.0}
    run = run_of(tmp_path, 35, samples, prefix_intended=MEANT | {"left_out": 25})
    report.build(run.path)
    text = " ".join((run.path / "summary.txt").read_text().split())
    page = (run.path / "report.html").read_text()

    for words in (
        "Intended: 36.0 % of the prompt characters were known",
        "(of 50 of 75 requests,",
        "Observed: 35.0 % of the prompt tokens came from the cache, by what the server says of each of 50 requests.",
        "Counted: 34.0 % of the tokens that the server looked up",
    ):
        assert words in text
        assert words in page
    assert json.loads((run.path / "summary.json").read_text())["prefix_cache"]["intended"]["left_out"] == 25


def test_a_run_of_which_nothing_is_known_has_no_such_lines(tmp_path):
    run = run_of(tmp_path)
    report.build(run.path)

    assert cache_hits(run) is None
    assert "Prefix cache" not in (run.path / "summary.txt").read_text()
    assert "Prefix cache" not in (run.path / "report.html").read_text()
