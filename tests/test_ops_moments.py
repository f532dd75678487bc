import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.ops import moments as module
from src.ops.moments import Moments


def rows_of(n: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments(3, 5)
    for batch in batches:
        moments.add(batch)
    return moments


def assert_equal(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    for name in ("mean", "variance", "sum_of_norms", "mean_norm"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(0, 2**31))
def test_moments_are_those_of_all_rows_however_they_are_cut(sizes: list[int], seed: int) -> None:
    rows = rows_of(sum(sizes) + 2, seed, offset=4.0)
    moments = moments_of(*rows.split([*sizes, 2]))
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.variance, rows.var(dim=0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(moments.sum_of_norms, rows.norm(dim=-1).sum(dim=0))
    torch.testing.assert_close(moments.mean_norm, rows.norm(dim=-1).mean(dim=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(2, 9), st.integers(0, 2**31))
def test_a_sum_is_the_moments_of_both_and_changes_neither(n: int, m: int, seed: int) -> None:
    first, second = rows_of(n, seed, 3.0), rows_of(m, seed + 1, -2.0)
    a, b = moments_of(first), moments_of(second)
    assert_equal(a + b, moments_of(torch.cat([first, second])))
    assert_equal(b + a, a + b)
    assert (a.count, b.count) == (n, m)
    assert_equal(b, moments_of(second))


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(40)
    whole = moments_of(rows)
    monkeypatch.setattr(module, "MAX_ELEMENTS_AT_ONCE", 31)
    assert_equal(moments_of(rows), whole)


def test_the_variance_keeps_its_digits_beside_a_large_mean() -> None:
    rows = rows_of(200)
    shifted = moments_of(*(rows + 1e8).split(7))
    torch.testing.assert_close(shifted.variance, rows.var(dim=0), rtol=1e-6, atol=0)


def test_half_precision_rows_are_summed_in_float64() -> None:
    rows = torch.full((4096, 3, 5), 1.0, dtype=torch.bfloat16)
    moments = moments_of(rows, rows)
    assert moments.mean.dtype == torch.float64
    assert (moments.mean == 1).all() and (moments.variance == 0).all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_no_numbers_are_refused_whole(odd: float) -> None:
    rows = rows_of(6)
    rows[4, 1, 2] = odd
    moments = moments_of(rows_of(3))
    with pytest.raises(ValueError, match=r"layer 1, in 1 of its 6"):
        moments.add(rows)
    assert_equal(moments, moments_of(rows_of(3)))


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 5), torch.zeros(2, 3, 4), torch.zeros(2, 5, 3), torch.zeros(2, 3, 5, dtype=torch.long)]
)
def test_other_shapes_and_dtypes_are_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        Moments(3, 5).add(rows)


def test_what_needs_rows_says_so() -> None:
    moments = Moments(3, 5)
    moments.add(rows_of(0))
    for name in ("mean", "mean_norm", "variance"):
        with pytest.raises(ValueError, match="needs at least"):
            getattr(moments, name)
    moments.add(rows_of(1))
    with pytest.raises(ValueError, match="variance needs at least 2 rows, there are 1"):
        _ = moments.variance


def test_moments_of_other_models_are_not_merged() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        Moments(3, 5) + Moments(3, 6)
    with pytest.raises(ValueError, match="at least 1"):
        Moments(0, 5)


def test_what_is_handed_out_is_not_the_inside() -> None:
    moments = moments_of(rows_of(4))
    before = moments.mean
    moments.mean.add_(1)
    assert torch.equal(moments.mean, before)
