"""JUnit XML against the structure that Jenkins' junit-10.xsd gives it, written down here by hand."""

from xml.etree import ElementTree

import pytest

from twoclocks import gate
from twoclocks.gate import Judged
from twoclocks.intervals import Interval
from twoclocks.junit import junit

ATTRIBUTES = {  # of each element: those it must have, and those it may have
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors", "disabled", "skipped"}),
    "testsuite": (
        {"name", "tests"},
        {"time", "failures", "errors", "skipped", "timestamp", "hostname", "id", "package"},
    ),
    "testcase": ({"name", "classname"}, {"time", "assertions", "status"}),
    "failure": (set(), {"message", "type"}),
    "error": (set(), {"message", "type"}),
    "skipped": (set(), {"message"}),
    "system-out": (set(), set()),
}
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testcase"},
    "testcase": {"failure", "error", "skipped", "system-out"},
}


def judged(outcome, text="ttft.p95 <= +5%", other="after", **fields):
    told = {"unit": "s", "definition": "d", "first_value": 0.1, "value": 0.11, "reason": "because"} | fields
    found = {"interval": Interval(1.1, 1.05, 1.2, 100, same=1.0)} if outcome in ("pass", "fail") else {}
    return Judged(gate=gate.parse(text), first="before", other=other, outcome=outcome, **found, **told)


def check(element):
    needed, allowed = ATTRIBUTES[element.tag]
    assert needed <= element.attrib.keys() <= needed | allowed, element.attrib
    for child in element:
        assert child.tag in CHILDREN[element.tag]
        check(child)


def cases(text):
    root = ElementTree.fromstring(text)  # noqa: S314 - ours
    check(root)
    suite = root[0]
    counted = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for one in (root, suite):
        assert {name: one.get(name) for name in counted} == {
            name: str(len(list(suite.iter(tag)))) for name, tag in counted.items()
        }
    return list(suite)


@pytest.mark.parametrize(
    ("outcome", "allowed", "element"),
    [
        ("pass", False, None),
        ("fail", True, "failure"),
        ("not enough data", False, "failure"),
        ("not enough data", True, "skipped"),
        ("invalid run", True, "error"),
    ],
)
def test_an_outcome_is_shown_as_the_exit_code_has_it(outcome, allowed, element):
    (case,) = cases(junit([judged(outcome, remedy="measure for longer")], allowed))

    found = [child for child in case if child.tag != "system-out"]
    assert [child.tag for child in found] == ([element] if element else [])
    for child in found:
        assert "because; measure for longer" in child.get("message")
        assert child.text == child.get("message")  # one is shown by Jenkins, the other by GitLab
    if element is None:
        assert "+10.0 % (+5.0 % .. +20.0 %)" in case.find("system-out").text
    failed = gate.exit_code([outcome], allowed) != 0
    assert failed == (element in ("failure", "error"))


def test_each_gate_of_each_run_is_a_test_of_its_own():
    made = [judged("pass", text, other) for text in ("ttft.p95 <= +5%", "e2e.mean <= 1 s") for other in ("b", "c")]
    made.append(judged("fail", "error_rate <= 1%"))

    named = [(case.get("classname"), case.get("name")) for case in cases(junit(made, timestamp="2026-01-02T03:04:05"))]

    assert named[0] == ("b against before", "ttft.p95 <= +5%")
    assert len(set(named)) == 5


def test_names_that_would_break_xml_do_not():
    hostile = 'a"<b>&]]>\x00\x1b[31m\ufffe\ud800 é 日本 \U0001f600'

    text = junit([judged("fail", other=hostile, reason=hostile)])
    (case,) = cases(text)

    assert case.get("classname").startswith('a"<b>&]]>\ufffd\ufffd[31m\ufffd\ufffd é 日本 \U0001f600')
    assert "<b>" not in text
    text.encode("utf-8")


def test_no_gates_are_no_tests():
    assert cases(junit([])) == []
