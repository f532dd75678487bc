"""Agreement: Krippendorff's own example, and what must hold for any data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.ops.agreement import alpha_interval, alpha_nominal, exact_agreement

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C and D: 12 units, 4 observers, data missing.
EXAMPLE = [
    [1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
    [2, 2, 2, 2], [5, 5, 5], [1, 1], [3],
]  # fmt: skip
UNITS = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=4), max_size=8)


def test_krippendorffs_example() -> None:
    assert alpha_nominal(EXAMPLE) == pytest.approx(0.743, abs=5e-4)
    assert alpha_interval(EXAMPLE) == pytest.approx(0.849, abs=5e-4)


@given(UNITS)
def test_units_of_one_value_and_the_order_do_not_count(units: list[list[int]]) -> None:
    for alpha in (alpha_nominal, alpha_interval):
        value = alpha(units)
        assert alpha([*units, [9], []]) == value
        if value is not None:
            assert alpha([unit[::-1] for unit in units][::-1]) == pytest.approx(value)
            assert value <= 1 + 1e-12


@given(UNITS, st.integers(-1000, 1000), st.integers(1, 7))
def test_interval_agreement_does_not_see_origin_and_unit(units: list[list[int]], shift: int, scale: int) -> None:
    value = alpha_interval(units)
    moved = alpha_interval([[scale * number + shift for number in unit] for unit in units])
    assert moved == (None if value is None else pytest.approx(value, abs=1e-9))


def test_two_categories_are_the_same_to_both_where_numbers_are_two() -> None:
    units = [[0, 0], [0, 1], [1, 1], [1, 1, 0]]
    assert alpha_interval(units) == pytest.approx(alpha_nominal(units))


def test_without_pairs_or_without_difference_there_is_no_alpha() -> None:
    for alpha in (alpha_nominal, alpha_interval):
        assert alpha([]) is None and alpha([[1], [2]]) is None and alpha([[1, 1], [1, 1]]) is None
        assert alpha([[1, 1], [2, 2]]) == pytest.approx(1.0)
    assert exact_agreement([[1, 1], [1, 2], [3]]) == pytest.approx(0.5) and exact_agreement([[1]]) is None
