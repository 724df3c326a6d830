import json

from make_run import make_run

from twoclocks.checks import checks
from twoclocks.load import load_run


def test_histograms_of_children_are_not_held_against_requests(tmp_path):
    """With n = 2 vLLM counts each request twice, and tells of it in two spans."""
    folder = tmp_path / "run"
    make_run(folder, requests=10, spans=True)
    spans = [json.loads(line) for line in (folder / "server_requests.jsonl").read_text().splitlines()]
    children = [span | {"choice": choice} for span in spans for choice in (0, 1)]
    (folder / "server_requests.jsonl").write_text("".join(json.dumps(child) + "\n" for child in children))
    page = [json.loads(line) for line in (folder / "server_samples.jsonl").read_text().splitlines()]
    for scrape in page:
        for sample in scrape["samples"]:
            sample[2] *= 2 if sample[0].endswith(("_count", "_sum", "_bucket")) else 1
    (folder / "server_samples.jsonl").write_text("".join(json.dumps(scrape) + "\n" for scrape in page))
    run = load_run(folder)

    assert (run.ok["server_children"] == 2).all()
    assert not [check for check in checks(run) if "histogram" in check["name"]]
