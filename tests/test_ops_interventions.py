"""The five operations as identities, over dtypes, widths and rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.ops.interventions import (
    Intervention,
    ablate,
    add,
    cap,
    difference,
    holds,
    intervene,
    projection,
    scale,
    set_to,
    stacked,
)

D_MODEL = 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = st.integers(0, 10_000)
COEFFICIENTS = st.floats(-20, 20, width=32)
# Without a deadline: the first call of a test imports parts of torch.
PROPERTY = settings(deadline=None, max_examples=50)


def unit(seed: int, d_model: int = D_MODEL) -> Tensor:
    v = torch.randn(d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v / v.norm()).float()


def states(seed: int, rows: int = 7, size: float = 5.0) -> Tensor:
    return size * torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(seed + 1))


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.view(kind), y.view(kind))


def close(x: Tensor, y: Tensor, h: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((x - y).norm(dim=-1) <= tolerance * (1 + h.norm(dim=-1))).all())


@PROPERTY
@given(SEEDS, st.floats(0.01, 1e4))
def test_ablating_leaves_nothing_and_twice_is_once(seed: int, size: float) -> None:
    h, d = states(seed, size=size), unit(seed)
    once = intervene(h, ablate(d))
    assert (projection(once, d).abs() <= 1e-6 * h.norm(dim=-1)).all()
    assert close(intervene(once, ablate(d)), once, h, 1e-6)
    # What is orthogonal to the direction stays.
    rest = h - projection(h, d)[:, None] * d
    assert close(once, rest, h)


@PROPERTY
@given(SEEDS, COEFFICIENTS, st.booleans())
def test_adding_then_adding_the_opposite_gives_the_state_back(seed: int, c: float, alternate: bool) -> None:
    h, d = states(seed), unit(seed)
    back = intervene(intervene(h, add(d, c)), add(-d, c) if alternate else add(d, -c))
    assert ((back - h).norm(dim=-1) <= 1e-5 * h.norm(dim=-1)).all()


@PROPERTY
@given(SEEDS, COEFFICIENTS)
def test_each_operation_moves_the_projection_as_it_says(seed: int, c: float) -> None:
    h, d = states(seed), unit(seed)
    p, norm = projection(h, d), h.norm(dim=-1)
    wanted = {
        "add": (add(d, c), p + c),
        "relative": (add(d, c, relative=True), p + c * norm),
        "ablate": (ablate(d, c), (1 - c) * p),
        "scale": (scale(d, c), (1 + c) * p),
        "set": (set_to(d, c), torch.full_like(p, c)),
        "floor": (cap(d, lo=c), p.clamp(min=c)),
        "ceiling": (cap(d, hi=c), p.clamp(max=c)),
        "band": (cap(d, c - 1, c + 1), p.clamp(c - 1, c + 1)),
    }
    for name, (operation, expected) in wanted.items():
        moved = intervene(h, operation)
        limit = 1e-5 * (1 + abs(c)) * (1 + norm)
        assert ((projection(moved, d) - expected).abs() <= limit).all(), name
        across = (moved - projection(moved, d)[:, None] * d) - (h - p[:, None] * d)
        assert (across.norm(dim=-1) <= limit).all(), name


@PROPERTY
@given(SEEDS, COEFFICIENTS)
def test_a_relative_addition_has_the_coefficients_share_of_the_norm(seed: int, c: float) -> None:
    h = states(seed)
    length = difference(h, add(unit(seed), c, relative=True)).norm(dim=-1)
    torch.testing.assert_close(length, abs(c) * h.norm(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_coefficient_of_zero_is_none_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    h, d = states(seed).to(dtype), unit(seed)
    h[0, :3] = -0.0
    for operation in (add(d, 0.0), add(d, -0.0), add(d, 0.0, relative=True), ablate(d, 0.0), scale(d, 0.0)):
        assert same_bits(intervene(h, operation), h)
    p = projection(h, d)
    assert same_bits(intervene(h, cap(d, p.min().item() - 0.01, p.max().item() + 0.01)), h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_not_acted_on_stay_bit_for_bit_and_the_others_do_not(dtype: torch.dtype) -> None:
    h, d = states(3, rows=6).to(dtype), unit(3)
    h[1], h[3], h[5] = math.nan, -0.0, math.inf
    acting = torch.tensor([True, False, True, False, True, False])
    for operation in (add(d, 3.0), add(d, 3.0, relative=True), ablate(d), set_to(d, 2.0)):
        moved = intervene(h, operation, acting)
        assert same_bits(moved[~acting], h[~acting])
        assert (moved[acting] != h[acting]).any(dim=-1).all()
        assert same_bits(moved[acting], intervene(h[acting], operation))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=SEEDS, c=COEFFICIENTS)
@settings(max_examples=25, deadline=None)
def test_half_precision_is_rounded_once(dtype: torch.dtype, seed: int, c: float) -> None:
    """The nearest number of the dtype to the float32 result."""
    h, d = states(seed).to(dtype), unit(seed)
    for operation in (add(d, c), ablate(d, c), cap(d, hi=c)):
        wide = intervene(h.float(), operation)
        moved = intervene(h, operation)
        assert moved.dtype == dtype
        assert torch.equal(moved, wide.to(dtype))


@PROPERTY
@given(SEEDS, st.permutations(range(8)))
def test_a_table_acts_on_each_row_as_its_own_intervention(seed: int, order: list[int]) -> None:
    d = [unit(seed + i) for i in range(8)]
    singles = [
        add(d[0], 3.0), add(d[1], 0.5, relative=True), ablate(d[2]), ablate(d[3], 2.0), scale(d[4], -0.3),
        set_to(d[5], 1.5), cap(d[6], lo=1.0), cap(d[7], -0.5, 0.5),
    ]  # fmt: skip
    h = states(seed, rows=8)
    together = intervene(h, stacked(singles).rows(torch.tensor(order)))
    for i, which in enumerate(order):
        alone = intervene(h[i : i + 1], singles[which])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6)


def test_the_order_of_operations_counts() -> None:
    h, d = states(0), unit(0)
    added_last = intervene(intervene(h, ablate(d)), add(d, 2.0))
    added_first = intervene(intervene(h, add(d, 2.0)), ablate(d))
    torch.testing.assert_close(projection(added_last, d), torch.full((7,), 2.0))
    torch.testing.assert_close(projection(added_first, d), torch.zeros(7), atol=1e-5, rtol=0)


def test_a_condition_compares_strictly_and_nan_fulfils_none() -> None:
    p = torch.tensor([-1.0, 0.0, 1.0, math.nan, math.inf])
    assert holds(p, above=0.0).tolist() == [False, False, True, False, True]
    assert holds(p, below=0.0).tolist() == [True, False, False, False, False]
    assert holds(p, above=-2.0, below=1.0).tolist() == [True, True, False, False, False]


def test_a_table_can_be_compiled_without_a_break() -> None:
    """Nothing in the formula depends on values on the host."""
    d, h = unit(0), states(0)
    table = stacked([add(d, 2.0), ablate(d), cap(d, hi=0.0)])
    index = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    traced = torch.export.export(_Intervene(), (h, *vars(table.rows(index)).values())).module()
    torch.testing.assert_close(traced(h, *vars(table.rows(index)).values()), intervene(h, table.rows(index)))


class _Intervene(torch.nn.Module):
    def forward(self, h: Tensor, *fields: Tensor) -> Tensor:
        names = ("v", "u", "a", "lo", "hi", "relative")
        return intervene(h, Intervention(**dict(zip(names, fields, strict=True))), fields[2] > -9)


BAD = [
    (lambda d: add(2 * d, 1.0), "norm 2.0.*unit"),
    (lambda d: add(0 * d, 1.0), "norm 0.0"),
    (lambda d: ablate(d * math.nan), "norm nan"),
    (lambda d: ablate(d[None]), r"shape \(1, 48\)"),
    (lambda d: add(d, math.nan), "coefficient is nan"),
    (lambda d: scale(d, math.inf), "coefficient is inf"),
    (lambda d: set_to(d, math.nan), "value is nan"),
    (lambda d: cap(d), "lo, hi or both"),
    (lambda d: cap(d, lo=1.0, hi=0.0), "lo = 1.0 above hi = 0.0"),
    (lambda d: cap(d, hi=math.inf), "hi is inf"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(unit(0))
