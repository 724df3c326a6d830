import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twoclocks.buckets import Distribution, Reason, StepDensity, as_density, binned, step_density


def test_percentiles_of_known_buckets():
    gained = Distribution(10, 10.0, np.array([1.0, 2.0, 4.0, np.inf]), np.array([2.0, 0.0, 6.0, 2.0]))

    assert gained.percentile(0.1).estimate is None  # first bucket
    middle = gained.percentile(0.5)
    assert (middle.lower, middle.estimate, middle.upper) == (2.0, 3.0, 4.0)
    assert gained.percentile(0.99).upper == np.inf
    assert gained.percentile(0.99).estimate is None


def distribution(values, bounds):
    bounds = np.append(bounds, np.inf)
    return Distribution(len(values), float(np.sum(values)), bounds, binned(np.asarray(values), bounds))


def test_binned_counts_as_numpy_and_as_a_server_do():
    values = np.random.default_rng(1).exponential(1.0, 1000)
    bounds = np.array([0.5, 1.0, 2.0, np.inf])

    assert binned(values, bounds).tolist() == np.histogram(values, [0, 0.5, 1.0, 2.0, np.inf])[0].tolist()
    assert binned(np.array([0.5, 0.500001, np.nan, 9.0]), bounds).tolist() == [1, 1, 0, 1]  # le: the bound is in
    assert binned(np.array([0.5, 9.0]), bounds[:-1]).tolist() == [1, 0, 0]


def test_a_step_density_is_share_over_width():
    values = np.random.default_rng(1).gamma(4, 0.1, 10_000)
    bounds = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 1.2])

    shape = step_density(distribution(values, bounds))

    assert isinstance(shape, StepDensity)
    expected = np.histogram(values, np.concatenate([[0], bounds]))[0] / len(values) / np.diff([0, *bounds])
    assert shape.density == pytest.approx(expected)
    assert shape.beyond == pytest.approx((values > 1.2).mean())
    assert float((shape.density * np.diff(shape.edges)).sum()) + shape.beyond == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([0.05] * 4 + [0.15, 0.25, 0.35], "only 4 buckets"),
        ([0.05] * 51 + [0.15, 0.25, 0.35, 0.45] * 10, "0 .. 100 ms"),
        ([9.0] * 51 + [0.15, 0.25, 0.35, 0.45] * 10, "> 500 ms"),
        ([], "no observation"),
    ],
)
def test_no_shape_where_it_would_be_that_of_the_buckets(values, why):
    shape = step_density(distribution(values, np.array([0.1, 0.2, 0.3, 0.4, 0.5])))

    assert isinstance(shape, Reason)
    assert why in shape.text


def test_half_of_them_in_one_of_five_buckets_still_has_a_shape():
    values = [0.05] * 40 + [0.15, 0.25, 0.35, 0.45] * 10

    assert isinstance(step_density(distribution(values, np.array([0.1, 0.2, 0.3, 0.4, 0.5]))), StepDensity)


@given(
    values=st.lists(st.floats(0, 5), min_size=1, max_size=60),
    bounds=st.lists(st.floats(0.001, 4), min_size=1, max_size=8, unique=True),
    p=st.floats(0, 1),
)
def test_a_percentile_lies_in_its_interval(values, bounds, p):
    gained = distribution(values, np.array(sorted(bounds)))

    interval = gained.percentile(p)

    true = float(np.sort(values)[max(0, math.ceil(p * len(values) - 1e-9) - 1)])  # nearest rank, from below
    assert interval.lower <= true <= interval.upper
    assert interval.estimate is None or interval.lower <= interval.estimate <= interval.upper
    density = as_density(gained.counts, gained.bounds)
    assert density.shares.sum() + density.beyond == pytest.approx(1)
