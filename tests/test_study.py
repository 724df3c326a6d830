import pytest

from twoclocks.errors import ExperimentError, RunFolderError
from twoclocks.experiment import load_experiment
from twoclocks.study import cells, read_study

STUDY = """
name: two
target: {server: vllm, extra_body: {temperature: 0}, model: m}
targets:
- {name: A, url: "http://127.0.0.1:1"}
- {name: B, url: "http://127.0.0.1:2", server: transformers, extra_body: {}}
variants:
- {name: one, set: {load.users: 1}}
- {name: many, set: {load.users: 16, target.extra_body.n: 4}}
repeats: 2
"""


@pytest.fixture
def load(tmp_path):
    def load(text=STUDY, *overrides, **chosen):
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, overrides, {"N": "3"}, **chosen)

    return load


def test_in_turn_asks_all_of_a_target_at_a_stretch(load):
    order = [(cell.target, cell.variant, cell.repeat) for cell in cells(load())]

    assert order == [
        ("A", "one", 1), ("A", "many", 1), ("A", "many", 2), ("A", "one", 2),
        ("B", "one", 1), ("B", "many", 1), ("B", "many", 2), ("B", "one", 2),
    ]  # fmt: skip


def test_abba_turns_round_in_every_second_repeat(load):
    order = [(cell.number, cell.target, cell.repeat) for cell in cells(load(STUDY, "order=abba", "variants=[]"))]

    assert order == [(1, "A", 1), (2, "B", 1), (3, "B", 2), (4, "A", 2)]


def test_in_abba_every_target_and_variant_stands_as_early_as_late(load):
    """A drift that grows evenly with time adds the same to all of them."""
    made = cells(load(STUDY, "order=abba", "repeats=4"))
    places = {}
    for cell in made:
        places[cell.target, cell.variant] = places.get((cell.target, cell.variant), 0) + cell.number

    assert len(set(places.values())) == 1
    assert len({cell.folder for cell in made}) == len(made) == 16


def test_folders_hold_no_path(load):
    made = cells(load("targets: [{name: '../../etc/a b'}]\nrepeats: 2"))

    assert [cell.folder for cell in made] == ["01-..-..-etc-a-b-r1", "02-..-..-etc-a-b-r2"]


def test_a_chosen_run_is_an_experiment_without_the_study(load):
    chosen = load(target="B", variant="many")

    assert (chosen.target.url, chosen.target.server, chosen.target.model) == ("http://127.0.0.1:2", "transformers", "m")
    assert chosen.target.extra_body == {"n": 4}
    assert (chosen.load.users, chosen.targets, chosen.variants, chosen.repeats) == (16, [], [], 1)


def test_what_a_variant_sets_in_one_target_does_not_reach_another(load):
    assert load(target="A", variant="many").target.extra_body == {"temperature": 0, "n": 4}
    assert load(target="A", variant="one").target.extra_body == {"temperature": 0}


def test_set_wins_over_target_and_variant(load):
    chosen = load(STUDY, "load.users=5", "target.url=http://127.0.0.1:9", target="A", variant="many")

    assert (chosen.load.users, chosen.target.url) == (5, "http://127.0.0.1:9")


def test_a_study_made_by_set(load):
    chosen = load("name: x", "targets=[{name: C, server: tgi}]", "repeats=3", "order=abba", target="C")

    assert (chosen.target.server, chosen.targets, chosen.repeats, chosen.order) == ("tgi", [], 1, "in-turn")


def test_variables_in_the_keys_of_a_study(load):
    assert load("repeats: ${N}\ntargets: [{name: A}]").repeats == 3


@pytest.mark.parametrize(
    ("text", "chosen", "told"),
    [
        ("targets: [{url: 'http://127.0.0.1:1'}]", {}, "targets[0].name: each needs a name, found None"),
        ("targets: [{name: A}, {name: A}]", {}, "targets: two are called 'A'; give each a name of its own"),
        ("variants: [{name: x}, {name: ' '}]", {}, "variants[1].name: each needs a name, found ' '"),
        ("targets: [{name: A}]", {"target": "B"}, "targets: none is called 'B'; there: A"),
        ("name: x", {"target": "B"}, "targets: none is called 'B'; there: none at all"),
        ("targets: [{name: A}]", {"variant": "v"}, "variants: none is called 'v'; there: none at all"),
        ("targets: [{name: A, ulr: x}]", {"target": "A"}, "unknown key 'target.ulr'"),
        ("targets: [3]", {}, "targets[0]: expected `object`, got `int`"),
        (
            "targets: [{name: A}]\nclaims: [{says: s, figure: e2e.p50, of: {target: C}, published: 1}]",
            {},
            "claims[0].of.target: no target is called 'C'",
        ),
        (
            "targets: [{name: A}]\nclaims: [{says: s, figure: e2e.p50, of: {target: A, variant: v}, published: 1}]",
            {},
            "claims[0].of.variant: none is called 'v'",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(load, text, chosen, told):
    with pytest.raises(ExperimentError) as error:
        load(text, **chosen)

    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_study(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no study\.json; give the folder of a study"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"study\.json: cannot be read"):
        read_study(tmp_path)
