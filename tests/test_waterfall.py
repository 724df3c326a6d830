import itertools

import numpy as np
import pytest

from twoclocks.waterfall import bar_rows, decodes, dominant, parting, stacks, waterfalls
from twoclocks.waterfall_plot import waterfall_plot

NAN = np.nan


def columns(count: int = 1, **values):
    """A joined table of requests that are all alike: sent at once on an open connection, first token after 100 ms."""
    given = {
        "intended_at": 10.0, "connect_started_at": NAN, "connected_at": NAN, "sent_at": 10.0, "written_at": 10.0,
        "ttft": 0.1, "tpot": NAN, "server_tpot": NAN, "server_ttft": NAN, "server_tokenize": NAN,
        "server_validation": NAN, "server_queue": NAN, "server_prefill": NAN,
        "server_source": "otlp", "server_kind": "vllm",
    } | values  # fmt: skip
    return {
        name: np.broadcast_to(np.asarray(value, dtype=object if name in ("server_source", "server_kind") else float),
                              count).copy()
        for name, value in given.items()
    }  # fmt: skip


def seconds(table, stages=()):
    """The bars of the first request, by name."""
    (waterfall,) = waterfalls(table, stages)
    return {bar.name: float(bar.seconds[0]) for bar in waterfall.bars}


SPAN = {"server_ttft": 0.085, "server_tokenize": 0.015, "server_queue": 0.02, "server_prefill": 0.05}


def test_a_request_by_hand():
    bars = seconds(
        columns(
            intended_at=9.9,
            connect_started_at=9.92,
            connected_at=9.97,
            sent_at=9.98,
            written_at=9.985,
            ttft=0.12,
            **SPAN,
        )
    )

    # 9.98 + 0.12 - 9.9 = 0.2 s in all
    assert bars == pytest.approx(
        {
            "late": 0.03,  # 20 ms until it connects, 10 ms from connected to sent
            "connect": 0.05,
            "send": 0.005,
            "http+delivery": 0.12 - 0.005 - 0.085,
            "template+tokenize": 0.015,
            "queue": 0.02,
            "prefill": 0.05,
        }
    )
    assert sum(bars.values()) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("told", "bars"),
    [
        ({"server_source": "in-band", "server_ttft": 0.07, "server_queue": 0.02, "server_prefill": 0.05},
         {"http+template+tokenize+delivery": 0.03, "queue": 0.02, "prefill": 0.05}),
        ({"server_source": "in-band", "server_kind": "llamacpp", "server_prefill": 0.06},
         {"http+template+tokenize+queue+delivery": 0.04, "prefill": 0.06}),
        ({"server_source": "log", "server_kind": "transformers", "server_queue": 0.06},
         {"http+template+tokenize+prefill+delivery": 0.04, "queue": 0.06}),
        ({"server_kind": "tgi", "server_validation": 0.01, "server_queue": 0.06},
         {"http+template+prefill+delivery": 0.03, "tokenize": 0.01, "queue": 0.06}),
        ({"server_kind": "sglang", "server_ttft": 0.09, "server_tokenize": 0.01},
         {"http+delivery": 0.01, "template+tokenize": 0.01, "queue+prefill": 0.08}),
        ({"server_ttft": 0.09}, {"http+delivery": 0.01, "template+tokenize+queue+prefill": 0.09}),
        ({"server_source": None, "server_kind": None}, {"http+template+tokenize+queue+prefill+delivery": 0.1}),
    ],
)  # fmt: skip
def test_what_a_server_does_not_tell_apart_stays_in_one_bar(told, bars):
    assert seconds(columns(**told)) == pytest.approx({"late": 0, "connect": 0, "send": 0} | bars)


def test_labels_name_what_is_in_a_bar():
    (waterfall,) = waterfalls(columns(server_source="in-band", server_queue=0.02, server_prefill=0.05))

    assert [bar.label for bar in waterfall.bars][3:] == ["HTTP, template, tokenize and delivery", "queue", "prefill"]
    assert all(len(bar.definition) > 20 for bar in waterfall.bars)


def test_without_written_at_sending_is_in_the_bar_around_the_server():
    assert seconds(columns(written_at=NAN, **SPAN))["send+http+delivery"] == pytest.approx(0.015)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("http+delivery", {}),
        ("template+tokenize", {"server_ttft": 0.135, "server_tokenize": 0.065}),
        ("queue", {"server_ttft": 0.135, "server_queue": 0.07}),
        ("prefill", {"server_ttft": 0.135, "server_prefill": 0.1}),
    ],
)
def test_50_ms_before_in_and_after_the_server_land_in_the_right_bar(where, told):
    before, after = seconds(columns(**SPAN)), seconds(columns(**SPAN | {"ttft": 0.15} | told))

    moved = {name: after[name] - before[name] for name in after if abs(after[name] - before[name]) > 1e-9}
    assert moved == pytest.approx({where: 0.05})


@pytest.mark.parametrize(
    ("where", "late"),
    [
        ("late", {"intended_at": 9.95}),
        ("connect", {"intended_at": 9.95, "connect_started_at": 9.95, "connected_at": 10.0}),
        ("send", {"written_at": 10.05, "ttft": 0.15}),
    ],
)
def test_50_ms_at_the_client_land_in_the_right_bar(where, late):
    before, after = seconds(columns(**SPAN)), seconds(columns(**SPAN | late))

    moved = {name: after[name] - before[name] for name in after if abs(after[name] - before[name]) > 1e-9}
    assert moved == pytest.approx({where: 0.05})


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_of_any_record_sum_to_its_first_token(seed):
    """Whatever is unknown, whatever a server says, and in every order: no microsecond is lost or made."""
    rng = np.random.default_rng(seed)
    count = 2000
    told_by = [("otlp", "vllm"), ("in-band", "vllm"), ("otlp", "tgi"), ("otlp", "sglang"), ("in-band", "llamacpp"),
               ("log", "transformers"), (None, None)]  # fmt: skip
    who = [told_by[number] for number in rng.integers(0, len(told_by), count)]
    table = columns(count, server_source=[source for source, _ in who], server_kind=[server for _, server in who])
    start = 1e5 * rng.random(count)
    for name in ("intended_at", "connect_started_at", "connected_at", "sent_at", "written_at"):
        table[name] = start + rng.normal(0, 1, count)
    stages = ["gateway", "router"]
    for name in ("ttft", "server_ttft", "server_tokenize", "server_validation", "server_queue", "server_prefill",
                 *(f"stage_{stage}_ttft" for stage in stages)):  # fmt: skip
        table[name] = rng.lognormal(-2, 2, count)
    for name in set(table) - {"intended_at", "sent_at", "server_source", "server_kind"}:
        table[name][rng.random(count) < 0.2] = NAN
    unknown = np.isnan(table["server_ttft"]) | np.isnan(table["server_queue"]) | np.isnan(table["server_prefill"])
    table["server_tokenize"] = np.where(
        unknown, table["server_tokenize"], table["server_ttft"] - table["server_queue"] - table["server_prefill"]
    )

    made = waterfalls(table, stages)

    rows = np.concatenate([waterfall.rows for waterfall in made])
    assert sorted(rows) == list(np.flatnonzero(~np.isnan(table["ttft"])))
    first_token = table["sent_at"] + table["ttft"] - table["intended_at"]
    for waterfall in made:
        parts = sum(bar.seconds for bar in waterfall.bars)
        assert np.abs(parts - first_token[waterfall.rows]).max() < 1e-6, [bar.name for bar in waterfall.bars]


def test_requests_of_which_other_parts_are_known_make_a_waterfall_of_their_own():
    table = columns(5, server_source=["otlp"] * 3 + ["in-band"] + [None], server_kind=["vllm"] * 4 + [None], **SPAN)

    made = waterfalls(table)

    assert [(one.source, list(one.rows)) for one in made] == [("otlp", [0, 1, 2]), ("in-band", [3]), (None, [4])]


def test_a_request_without_a_token_is_in_none():
    assert waterfalls(columns(ttft=NAN)) == []


def test_stages_part_the_way_to_the_server():
    table = columns(stage_gateway_ttft=0.095, stage_router_ttft=0.09, **SPAN)
    bars = seconds(table, ["gateway", "router"])

    assert list(bars)[3:] == ["to gateway", "to router", "http+delivery", "template+tokenize", "queue", "prefill"]
    assert list(bars.values())[3:6] == pytest.approx([0.005, 0.005, 0.005])


def test_a_negative_part_is_shown_and_counted():
    table = columns(4, ttft=[0.1, 0.1, 0.08, 0.0849999], **SPAN)
    (waterfall,) = waterfalls(table)
    row = next(row for row in bar_rows(waterfall) if row["name"] == "http+delivery")

    assert row["negative"] == 1  # a tenth of a microsecond is rounding
    assert row["least"] == pytest.approx(-0.005)
    assert row["mean"] == pytest.approx((0.015 + 0.015 - 0.005 - 1e-7) / 4)


def test_rows_hold_each_parts_own_percentiles_and_means_that_add_up():
    rng = np.random.default_rng(1)
    queue = rng.exponential(0.1, 500)
    (waterfall,) = waterfalls(
        columns(500, ttft=queue + 0.08, server_ttft=queue + 0.065, server_tokenize=0.015, server_queue=queue,
                server_prefill=0.05)
    )  # fmt: skip
    rows = {row["name"]: row for row in bar_rows(waterfall)}

    assert rows["queue"]["p99"] == pytest.approx(np.percentile(queue, 99))
    assert sum(row["mean"] for name, row in rows.items() if name != "total") == pytest.approx(rows["total"]["mean"])
    assert sum(row["share"] for name, row in rows.items() if name != "total") == pytest.approx(1)


def test_a_stack_is_of_requests_near_its_percentile_and_sums_to_its_total():
    total = np.arange(1.0, 1001.0)
    (waterfall,) = waterfalls(columns(1000, ttft=np.random.default_rng(2).permutation(total), **SPAN))
    stacked = {stack["name"]: stack for stack in stacks(waterfall)}

    assert stacked["mean"]["total"] == pytest.approx(500.5)
    assert (stacked["p99"]["n"], stacked["p99"]["total"]) == (10, pytest.approx(990.5))  # ranks 984.01 .. 994.01
    for stack in stacked.values():
        assert sum(stack["bars"].values()) == pytest.approx(stack["total"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_requests_have_stacks_too(count):
    (waterfall,) = waterfalls(columns(count, **SPAN))

    assert [stack["total"] for stack in stacks(waterfall)] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ttft": 3.4, "server_ttft": 3.385, "server_queue": 3.32},
         "Requests waited in the server's queue for 3,320.0 of 3,400.0 ms (98%) until their first token: "
         "the server is saturated"),
        ({}, "is prefill, 50.0 of 100.0 ms (50%): the server works on prompts"),
        ({"intended_at": 9.0}, "is late start, 1,000.0 of 1,100.0 ms (91%): the load generator sent late"),
        ({"ttft": 0.05}, "The clocks contradict each other: HTTP and delivery is negative in the mean, -35.0 ms"),
        ({"ttft": 1.0}, "is HTTP and delivery, 915.0 of 1,000.0 ms"),
    ],
)  # fmt: skip
def test_the_part_that_dominates_is_named(values, words):
    (waterfall,) = waterfalls(columns(**SPAN | values))

    assert words in dominant(waterfall)


@pytest.mark.parametrize(
    ("client", "words"),
    [(0.0202, "tokens arrive as they are made"), (0.03, "tokens wait after they are made"), (0.01, "caught up")],
)
def test_where_the_clocks_part_in_decode(client, words):
    table = columns(3, tpot=[client, client, NAN], server_tpot=0.02)
    (decode,) = decodes(table)

    assert len(decode.client) == 2
    assert f"{client * 1e3:.2f} ms a token at the client, 20.00 ms in the server: " in parting(decode)
    assert words in parting(decode)


def test_a_picture_is_drawn_of_anything(tmp_path):
    full = columns(50, tpot=0.02, server_tpot=0.02, **SPAN)
    silent = columns(50, server_source=None, server_kind=None)
    negative = columns(50, ttft=0.05, **SPAN)
    for number, table in enumerate(itertools.chain((full, silent, negative), [columns(0)])):
        path = tmp_path / f"{number}.png"
        waterfall_plot(waterfalls(table), decodes(table), path, "a $name$ of a run")
        assert path.stat().st_size > 5_000
