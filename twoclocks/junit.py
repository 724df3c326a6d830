"""JUnit: judged gates -> the XML by which CI servers show test results.

There is no standard; this is what Jenkins, GitLab and GitHub's actions all read: testsuites > testsuite > testcase with
classname and name, and in it failure, error or skipped, each with its text as attribute and as content (Jenkins shows
the one, GitLab the other). Not enough data fails, as the command's exit code does; where it is allowed, it is skipped.
"""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from twoclocks.gate import Judged, interval_words, measured_words

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""
_ELEMENTS = {"fail": "failure", "not enough data": "failure", "invalid run": "error"}


def junit(judged: Sequence[Judged], allow_undecided: bool = False, timestamp: str | None = None) -> str:
    """The document. ``timestamp``: ISO 8601, without a zone."""
    elements = [_element(one, allow_undecided) for one in judged]
    counts = {
        "tests": len(judged),
        "failures": elements.count("failure"),
        "errors": elements.count("error"),
        "skipped": elements.count("skipped"),
    }
    told = {name: str(count) for name, count in counts.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": "twoclocks"} | told)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "twoclocks compare"} | told)
    if timestamp:
        suite.set("timestamp", timestamp)
    for one, element in zip(judged, elements, strict=True):
        named = {"classname": _legal(f"{one.other} against {one.first}"), "name": _legal(one.gate.text), "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", named)
        text = _legal(_words(one))
        if element is not None:
            found = ElementTree.SubElement(case, element, {"message": text})
            if element != "skipped":
                found.set("type", one.outcome)
            found.text = text
        else:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _element(one: Judged, allow_undecided: bool) -> str | None:
    if one.outcome == "not enough data" and allow_undecided:
        return "skipped"
    return _ELEMENTS.get(one.outcome)


def _words(one: Judged) -> str:
    told = f"{one.outcome}: {one.gate.figure} {measured_words(one)}"
    told += f"; 95 % interval {interval_words(one)}" if one.interval is not None else ""
    return f"{told}; {one.reason}" + (f"; {one.remedy}" if one.remedy else "")


def _legal(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
