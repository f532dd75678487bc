"""Edits in closed form against the dense edits that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from src.ops.weight_edits import NORMS, edited, orthonormal_mix, products, weight_edit


def dense(weight: Tensor, v: Tensor, w: Tensor, norm: str, mask: Tensor | None = None) -> Tensor:
    """The edit as it is defined, in float64: v (d, k) orthonormal, w (k,)."""
    weight, v, w = weight.double(), v.double(), w.double()
    keep = torch.ones(weight.shape[-1]).double() if mask is None else mask.double()
    removed = lambda x: (v * w) @ (v.mT @ x * keep)  # noqa: E731
    if norm == "none":
        return weight - removed(weight)
    dim = -2 if norm == "column" else -1
    unit = normalize(weight, dim=dim)
    return normalize(unit - removed(unit), dim=dim) * torch.linalg.vector_norm(weight, dim=dim, keepdim=True)


def drawn(seed: int, d: int = 12, n: int = 17, m: int = 5, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, m unit directions, a mix of k of them and the weights."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight, directions = draw(d, n) * draw(d, 1).exp(), normalize(draw(m, d), dim=-1)
    mix = orthonormal_mix(directions.double() @ directions.double().mT, draw(m, k))
    return weight, directions, mix, 2 * draw(k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.integers(1, 3), st.booleans())
def test_the_closed_form_is_the_dense_edit(seed: int, norm: str, k: int, masked: bool) -> None:
    weight, directions, mix, w = drawn(seed, k=k)
    mask = torch.arange(17) % 3 > 0 if masked else None
    found = edited(weight, weight_edit(products(weight, directions, norm, mask), mix, w))
    expected = dense(weight, directions.mT @ mix, w, norm, mask)
    assert torch.allclose(found.double(), expected, atol=2e-5 * weight.abs().max().item())
    if masked and norm != "row":
        assert torch.equal(found[:, ~mask], weight[:, ~mask])
    for dim in {"column": [0], "row": [1]}.get(norm, []):
        lengths = [torch.linalg.vector_norm(x.double(), dim=dim) for x in (found, weight)]
        assert torch.allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_experts_are_edited_each_as_if_alone(norm: str) -> None:
    weights, (_, directions, mix, w) = torch.stack([drawn(i)[0] for i in range(3)]), drawn(9)
    found = edited(weights, weight_edit(products(weights, directions, norm), mix, w))
    for one, whole in zip(weights, found, strict=True):
        alone = edited(one, weight_edit(products(one, directions, norm), mix, w))
        assert torch.allclose(alone, whole, atol=1e-5 * one.abs().max().item())


def test_columns_keep_their_lengths_and_lose_the_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, v = torch.randn(576, 1536, generator=generator), torch.randn(576, 1, generator=generator)
    v /= v.norm()
    found = edited(weight, weight_edit(products(weight, v.mT, "column"), torch.ones(1, 1), torch.ones(1)))
    assert (v.mT @ found).norm() / (v.mT @ weight).norm() < 5e-6


@pytest.mark.parametrize("norm", NORMS)
def test_weight_0_changes_nothing_and_2_twice_is_none(norm: str) -> None:
    weight, directions, mix, _ = drawn(3, k=1)
    known = products(weight, directions, norm)
    assert torch.equal(edited(weight, weight_edit(known, mix, torch.zeros(1))), weight)
    reflected = edited(weight, weight_edit(known, mix, torch.full((1,), 2.0)))
    again = edited(reflected, weight_edit(products(reflected, directions, norm), mix, torch.full((1,), 2.0)))
    # Lengths of columns stay under a reflection, and lengths of rows have to be restored by what is known of W alone.
    if norm != "row":
        assert torch.allclose(again, weight, atol=1e-5 * weight.abs().max().item())


@pytest.mark.parametrize("norm", ["column", "row"])
def test_what_has_no_length_left_stays_finite(norm: str) -> None:
    v = torch.eye(4)[:1]
    weight = torch.zeros(4, 4)
    weight[0, :2], weight[2, 2] = 3.0, 1.0
    found = edited(weight, weight_edit(products(weight, v, norm), torch.ones(1, 1), torch.ones(1)))
    assert found.isfinite().all() and found[2, 2] == 1 and found[1].abs().max() == 0


def test_a_mix_of_dependent_directions_is_refused() -> None:
    for seed in range(20):
        v = normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
        with pytest.raises(ValueError, match="linearly dependent"):
            orthonormal_mix(v[:1] @ v[:1].mT, torch.ones(1, 2))
        v[2] = normalize(v[0] - 0.3 * v[1], dim=-1)
        with pytest.raises(ValueError, match="linearly dependent"):
            orthonormal_mix(v @ v.mT, torch.eye(3))
        v[2] = normalize(v[0] + 0.1 * v[1], dim=-1)
        mix = orthonormal_mix(v @ v.mT, torch.eye(3)[:, [0, 2]])
        assert torch.allclose(mix.mT @ v @ v.mT @ mix, torch.eye(2), atol=0.01)
    with pytest.raises(ValueError, match="norm 'l1'"):
        products(torch.eye(8), v, "l1")
