import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks.page import MAX_LINE_CHARS, MAX_LINES, PageReader, parse_page

DATA = Path(__file__).parent / "data"


def same(left, right):
    """Equal pages; NaN is itself here."""
    (series, types), (others, other_types) = left, right
    pairs = [(series[key], others.get(key)) for key in series]
    return (
        series.keys() == others.keys()
        and types == other_types
        and all(one == two or (math.isnan(one) and math.isnan(two)) for one, two in pairs)
    )


def outcome(read, text):
    try:
        return read(text)
    except ValueError:
        return None


def check(reader, text):
    expected, found = outcome(parse_page, text), outcome(reader.read, text)

    assert (expected is None) == (found is None), text
    assert expected is None or same(expected, found), text


def test_a_page_of_a_real_server_is_read_whole():
    text = (DATA / "recorded_vllm_0.32_metrics_after.prom").read_text()
    series, types = parse_page(text)
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]

    assert len(series) == len(samples)
    assert types["vllm:time_to_first_token_seconds"] == "histogram"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("recorded_vllm_0.32_metrics_before.prom", "recorded_vllm_0.32_metrics_after.prom"),
        ("vllm_0.33_metrics_t0.prom", "vllm_0.33_metrics_t1.prom"),
    ],
)
def test_the_pages_of_real_servers_are_read_alike(before, after, monkeypatch):
    pages = [(DATA / name).read_text() for name in (before, after, after, before)]
    reader = PageReader()
    for page in pages:
        check(reader, page)


def test_a_page_whose_values_alone_changed_is_not_parsed_again(monkeypatch):
    text = (DATA / "vllm_0.33_metrics_t0.prom").read_text()
    grown = re.sub(r"(?m)^(vllm:\S+_total\{.*\}) .*$", r"\1 12345.0", text)
    reader = PageReader()
    reader.read(text)
    expected = parse_page(grown)
    monkeypatch.setattr("twoclocks.page.text_string_to_metric_families", None)

    assert grown != text
    assert same(reader.read(grown), expected)


def test_a_page_that_could_not_be_read_does_not_spoil_the_next():
    reader = PageReader()
    for text in ("a 1\nb 2\n", "a 1\nb oops\n", "a 3\nb 2\n", 'a{x="1",x="2"} 3\nb 2\n', "a 3\nb 2\n", "a 4\nb 2\n"):
        check(reader, text)


@pytest.mark.parametrize(
    "text",
    [
        "a 1 1795230000000\n",  # a time stamp
        "a\t1\n",
        " a 1\n",
        "a 1\r\n",
        'a{x="} 5"} 7\n',
        'a{x="\\"} 5"} 7\n',
        'a{x="1"} 5 # {y="2"} 1\n',
        '{"my.name",x="1"} 5\n',
        "a 1\na 2\n",
        "# TYPE a counter\na 1\nb 2\na 3\n",  # b ends the family, so the second a is another one
        "# TYPE a counter\na_total 1\na 3\n",
        "# TYPE a histogram\na_bucket 1\na_sum nan\na_count +Inf\n",
        "a 1_000\n",
        "a 0x10\n",
        "a 99999999999999999999999999\n",
        "a " + "9" * 400 + "\n",
        'a{x="1"}5\n',
        'a{} 5\na 6\na{,} 7\na{x="1",} 8\n',
        '{x=" "} 1\n',
        "# TYPE\n",
        "# TYPE a\n",
        "#\n#TYPE a counter\na 1\n",
        "a 1\x0ba 2\u2028a 3\n",
        "",
        "\n\n",
    ],
)
def test_odd_pages_are_read_alike(text):
    reader = PageReader()
    for page in (text, text, text.replace("5", "6").replace("1", "7"), text):
        check(reader, page)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a 1\n" * (MAX_LINES + 1), "300,000 lines"), ('a{x="' + MAX_LINE_CHARS * "y" + '"} 1\n', "65,536 characters")],
)
def test_a_page_that_takes_too_much_to_read_is_not_read(monkeypatch, text, problem):
    monkeypatch.setattr("twoclocks.page.parse_page", lambda text: pytest.fail("was read"))

    with pytest.raises(ValueError, match=problem):
        PageReader().read(text)


names = st.sampled_from(["a", "b", "a_total", "a_bucket", "a_sum", "a_count", "b_total", "c:d", "1x", ""])
labels = st.sampled_from(
    ["", "{}", '{x="1"}', '{x="1",}', '{x="} 5"}', '{x="\\""}', '{x="1",x="2"}', '{x="#"}', "{x=1}", '{x="\\\\"}', "{"]
)
values = st.sampled_from(
    ["1", "2", "0.5", "1e3", "NaN", "+Inf", "-Inf", "nan", "oops", "1 2", " 3", "1_0", "", "1 # {} 2"]
)
sample = st.builds("{}{} {}".format, names, labels, values)
comment = st.builds("# {} {} {}".format, st.sampled_from(["TYPE", "HELP", "EOF"]), names, names) | st.builds(
    "# TYPE {} {}".format, names, st.sampled_from(["counter", "gauge", "histogram", "summary", "untyped", "?"])
)
plain_sample = st.builds(
    "{}{} {}".format,
    st.sampled_from(["a", "b", "a_total", "a_bucket", "c:d"]),
    st.sampled_from(["", '{x="1"}', '{x="} 5"}', '{x="\\""}']),
    st.sampled_from(["1", "2", "0.5", "NaN", "+Inf"]),
)
hostile = st.lists(sample | comment | st.just("") | st.text(max_size=10), max_size=8)
ordinary = st.lists(
    plain_sample | st.sampled_from(["# TYPE a counter", "# TYPE a histogram", "# HELP b x", "# HELP a y"]), max_size=8
)


@given(ordinary | hostile, st.lists(st.tuples(st.integers(0, 7), plain_sample | sample | comment), max_size=6))
def test_a_page_is_read_alike_whatever_came_before(lines, edits):
    reader = PageReader()
    check(reader, "\n".join(lines))
    for place, line in edits:  # one line after another is replaced
        lines = [*lines[:place], line, *lines[place + 1 :]]
        check(reader, "\n".join(lines))


@given(
    ordinary, st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["3", "4", "NaN", "-Inf", "1 2", "x"])), max_size=6)
)
def test_changed_values_are_read_alike(lines, edits):
    reader = PageReader()
    check(reader, "\n".join(lines))
    for place, value in edits:
        if place < len(lines) and not lines[place].startswith("#"):
            lines = [*lines[:place], f"{lines[place].rpartition(' ')[0]} {value}", *lines[place + 1 :]]
        check(reader, "\n".join(lines))
