import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.ops.row_space import check_classes, check_directions, check_rows, left_factor, orthonormal, without


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_the_left_factor_rebuilds_rows_of_any_shape_and_rank(n: int, d: int, rank: int, seed: int) -> None:
    rows = normal(n, rank, seed=seed) @ normal(rank, d, seed=seed + 1)
    u, s = left_factor(rows)
    assert len(s) <= min(n, d, rank)
    right = (u / s).T @ rows
    torch.testing.assert_close(u * s @ right, rows, rtol=1e-5, atol=1e-5 * float(rows.abs().max()))
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))
    assert (s[:-1] >= s[1:]).all() and (s > 0).all()


def test_rows_of_zeros_have_rank_0() -> None:
    for shape in ((3, 5), (5, 3)):
        assert left_factor(torch.zeros(shape, dtype=torch.float64)).s.shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_orthonormal_keeps_the_first_the_spans_and_the_sides(k: int, seed: int) -> None:
    vectors = normal(2, k, 8, seed=seed)
    found = orthonormal(vectors, "it")
    eye = torch.eye(k, dtype=torch.float64).expand(2, k, k)
    torch.testing.assert_close(found @ found.mT, eye)
    torch.testing.assert_close(found[:, 0], vectors[:, 0] / vectors[:, 0].norm(dim=-1, keepdim=True))
    shares = found @ vectors.mT
    assert (shares.diagonal(dim1=1, dim2=2) > 0).all()
    # A later direction has nothing of the earlier vectors.
    assert shares.tril(-1).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 0, 0], [0, 0, 0]], "layer 0, direction 1: it is zero"),
        ([[1.0, 2, 3], [-2, -4, -6]], "layer 0, direction 1: it depends on those before it"),
        ([[1.0, 0, 0], [1, 1e-5, 0]], "depends on those before it"),
        ([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], "4 orthonormal directions do not fit in width 3"),
    ],
)
def test_vectors_that_cannot_be_made_orthonormal_are_refused(vectors: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthonormal(torch.tensor([vectors]), "it")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_what_is_left_is_orthogonal_to_a_subspace_of_any_rank(m: int, rank: int, scale: float, seed: int) -> None:
    subspace = normal(2, m, rank, seed=seed) @ normal(2, rank, 9, seed=seed + 1) * scale
    vectors = normal(2, 2, 9, seed=seed + 2)
    rest = without(vectors, subspace)
    unit = subspace / subspace.norm(dim=-1, keepdim=True)
    assert (rest @ unit.mT).abs().max() < 1e-5
    torch.testing.assert_close(without(rest, subspace), rest)


def test_a_nearly_dependent_subspace_is_taken_out_whole() -> None:
    vectors, spanning = normal(1, 1, 50), normal(1, 1, 50, seed=1)
    nearly = torch.cat([spanning, spanning + 1e-3 * normal(1, 1, 50, seed=2)], dim=1)
    rest = without(vectors, nearly)
    difference = nearly[:, 1] - nearly[:, 0]
    assert (rest[0] @ (difference / difference.norm()).T).abs() < 1e-9


def test_a_subspace_of_zeros_takes_nothing() -> None:
    vectors = normal(1, 2, 4)
    assert torch.equal(without(vectors, torch.zeros(1, 3, 4)), vectors)


def test_rows_are_checked_by_layer_and_class() -> None:
    rows = torch.zeros(4, 3, 2)
    rows[:2, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"control rows hold NaN or infinity at layer 2, in 2 of its 4"):
        check_classes(torch.zeros(4, 3, 2), rows)
    with pytest.raises(ValueError, match="expected floats"):
        check_rows(torch.zeros(4, 2), "rows")
    with pytest.raises(ValueError, match="expected floats"):
        check_rows(torch.zeros(4, 0, 2), "rows")
    directions = torch.zeros(4, 2, 3)
    directions[3, 0, 1] = torch.inf
    with pytest.raises(ValueError, match=r"directions hold NaN or infinity at layer 3, in 1 of its 2"):
        check_directions(directions)
    check_directions(torch.zeros(4, 0, 3))
    with pytest.raises(ValueError, match=r"expected floats \(n_layers, k, d_model\)"):
        check_directions(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no target rows"):
        check_classes(torch.zeros(0, 3, 2), torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="must be the same"):
        check_classes(torch.zeros(4, 3, 2), torch.zeros(4, 3, 1))
    with pytest.raises(ValueError, match="there are 4 and 5"):
        check_classes(torch.zeros(4, 3, 2), torch.zeros(5, 3, 2), paired=True)
