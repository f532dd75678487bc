import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.ops.statistics import summarize

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


@settings(max_examples=50, deadline=None)
@given(VALUES, st.integers(0, 2**31))
def test_the_interval_lies_within_the_data_and_around_the_mean(values: list[float], seed: int) -> None:
    summary = summarize(values, range(len(values)), seed)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert summary.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    assert min(values) - 1e-9 <= summary.ci_low <= summary.ci_high <= max(values) + 1e-9
    assert summary == summarize(values, range(len(values)), seed)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        summary = summarize(generator.normal(size=60).tolist(), range(60), seed=i, n_resamples=500)
        hits += summary.ci_low <= 0 <= summary.ci_high
    assert 0.90 <= hits / 400 <= 0.98


def test_repeats_of_one_prompt_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=20).tolist()
    alone = summarize(values, range(20), seed=3)
    repeated = summarize(values * 10, list(range(20)) * 10, seed=3)
    assert (repeated.ci_low, repeated.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    independent = summarize(values * 10, range(200), seed=3)
    assert independent.ci_high - independent.ci_low < 0.5 * (alone.ci_high - alone.ci_low)


def test_clusters_of_different_sizes_weigh_by_their_values() -> None:
    summary = summarize([0.0] * 9 + [10.0], [*["a"] * 9, "b"], seed=0)
    assert summary.mean == 1.0
    assert (summary.ci_low, summary.ci_high) == (0.0, 10.0)


def test_too_little_data_has_no_interval() -> None:
    assert summarize([], [], seed=0) is None
    assert summarize([2.0], ["a"], seed=0)[1:] == (None, 1, None, None)
    assert summarize([2.0, 4.0], ["a", "a"], seed=0)[3:] == (None, None)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(odd: float) -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        summarize([1.0, odd], [0, 1], seed=0)
